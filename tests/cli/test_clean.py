"""What `glmq clean` shows."""

import json
import re
from contextlib import suppress
from pathlib import Path

from cli.command_line import glmq, run

from glmq.checkpoint.folder import OutputFolder
from glmq.checkpoint.journal import Journal
from glmq.checkpoint.run_note import RunNote


def interrupt(target: Path, command: str) -> None:
    note = RunNote("quantize", command, {})
    with suppress(KeyboardInterrupt), OutputFolder(target, overwrite=False, run=note) as folder:
        Journal(folder.work, {}).record("a block", {})
        (folder.path / "weights").write_bytes(bytes(2**20))
        raise KeyboardInterrupt


def test_unfinished_runs_are_listed_and_removed_when_that_is_asked_for(tmp_path: Path) -> None:
    interrupt(tmp_path / "a", "glmq quantize --resume")
    interrupt(tmp_path / "b", "")
    shown = re.sub(r"1\.\d MiB", "1 MiB", re.sub(r"2\.\d MiB", "2 MiB", glmq("clean", tmp_path).stdout))
    assert re.sub(r"\d\.\d s ago", "1.0 s ago", shown) == (
        f"{tmp_path}/.a.partial: quantize, 1 MiB, unfinished, last changed 1.0 s ago\n"
        "  to continue: glmq quantize --resume\n"
        f"{tmp_path}/.b.partial: quantize, 1 MiB, unfinished, last changed 1.0 s ago\n"
        f"2 unfinished runs, 2 MiB; to remove them: glmq clean {tmp_path} --yes\n"
    )
    (row,) = json.loads(glmq("clean", tmp_path / "a", "--json").stdout)["runs"]
    assert (row["state"], row["verb"], row["resume"], row["removed"]) == (
        "unfinished", "quantize", "glmq quantize --resume", False,
    )  # fmt: skip
    shown = re.sub(r"1\.\d MiB", "1 MiB", glmq("clean", tmp_path / "a", "--yes").stdout)
    assert shown == f"{tmp_path}/.a.partial: quantize, 1 MiB, removed\n1 unfinished run, 1 MiB: removed\n"
    assert [path.name for path in tmp_path.iterdir()] == [".b.partial"]
    glmq("clean", tmp_path, "--yes")
    assert glmq("clean", tmp_path).stdout == f"no unfinished run in {tmp_path}\n"
    assert run("clean", tmp_path / "no").exit_code == 4


def test_a_whole_result_is_left_where_it_is(tmp_path: Path) -> None:
    interrupt(tmp_path / "a", "")
    (tmp_path / ".a.partial" / "result.json").write_text("{}")
    shown = re.sub(r"1\.\d MiB", "1 MiB", glmq("clean", tmp_path, "--yes").stdout)
    assert shown == (
        f"{tmp_path}/.a.partial: quantize, 1 MiB, the result is whole, move it where you want it: "
        f"{tmp_path}/.a.partial/result\n0 unfinished runs, 0 B: removed\n"
    )
