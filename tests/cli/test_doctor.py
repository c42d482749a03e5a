import json
from pathlib import Path

import pytest
from cli.command_line import glmq

from glmq.cann import AscendState
from glmq.jobs import doctor


def test_both_forms_of_the_report_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    state = AscendState("2.13.0", None, None, Path("/a/set_env.sh"), None, ())
    monkeypatch.setattr(doctor, "find_ascend", lambda: state)
    document = json.loads(glmq("doctor", "--json").stdout)
    assert document["ascend"]["set_env"] == "/a/set_env.sh"
    assert set(document["kernels"]) == {"statistics", "rounding", "codec", "comparison"}
    lines = glmq("doctor").stdout.splitlines()
    assert lines[0] == f"glmq          {document['glmq']}, Python {document['python']}"
    assert f"torch         {document['packages']['torch']}" in lines
    assert "CANN          installed, not set up" in lines
    assert "NPUs          none" in lines


def test_what_is_missing_and_not_needed_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = AscendState(None, None, None, None, None, ())
    monkeypatch.setattr(doctor, "find_ascend", lambda: nothing)
    monkeypatch.setattr(doctor, "_compress_program", lambda: None)
    monkeypatch.setattr(doctor, "_kernels", dict)
    assert glmq("doctor").stdout.splitlines()[-5:] == [
        "CANN          not found; only NPUs need it",
        "driver        not found",
        "NPUs          none",
        "compress      the vendor's program is not found; without it `glmq compress` takes --codec portable alone",
        "Nothing stands in the way of what runs on the CPU.",
    ]
    monkeypatch.setattr(doctor, "_kernels", lambda: {"codec": "numpy"})
    assert glmq("doctor").stdout.splitlines()[-1].startswith("warning: no compiled kernel for codec: ")
