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
