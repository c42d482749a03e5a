"""Where all four writing verbs put their output, and what they do to what others put there."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.command_line import glmq, run
from helpers import tree

from glmq.checkpoint.folder import OutputFolder
from glmq.checkpoint.journal import Journal
from glmq.checkpoint.workplace import Workplace

VERBS = ("calibrate", "quantize", "compress", "decompress")


@pytest.fixture(scope="module")
def commands(
    small: Path, small_stats: Path, small_seed: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list]:
    """Each verb on small inputs, with the output's option at the end."""
    packed = tmp_path_factory.mktemp("inputs") / "packed"
    sparse = ["--w_bit", 4, "--is_lowbit", "True", "--use_sigma", "True", "--torch_dtype", "fp16"]
    calibrate = ["calibrate", "--model_path", small, "--calib-images", pictures, "--limit", 1, "--no-texts", "--stats"]
    compress = ["compress", "--model_path", small_seed, "--codec", "portable", "--save_directory"]
    glmq(*compress, packed)
    return {
        "calibrate": calibrate,
        "quantize": ["quantize", "--model_path", small, "--stats", small_stats, *sparse, "--save_directory"],
        "compress": compress,
        "decompress": ["compress", "--decompress", "--model_path", packed, "--save_directory"],
    }


@pytest.fixture(scope="module")
def usual(commands: dict[str, list], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What each verb writes into a folder that is not there yet."""
    root = tmp_path_factory.mktemp("usual")
    for verb, words in commands.items():
        glmq(*words, root / verb, "-q")
    return {verb: tree(root / verb) for verb in commands}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_that_somebody_fills_during_the_run_is_left_alone(
    verb: str,
    commands: dict[str, list],
    usual: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, real = tmp_path / "out", OutputFolder.finish

    def late(folder: OutputFolder) -> None:
        if folder.target == out:
            out.mkdir()
            (out / "thesis.txt").write_text("years of work")
        real(folder)

    monkeypatch.setattr(OutputFolder, "finish", late)
    result = run(*commands[verb], out, "--json")
    assert result.exit_code == 5
    error = json.loads(result.stdout)["error"]
    kept = tmp_path / ".out.partial" / "result"
    assert error["code"] == "GLMQ-E533"
    assert error["message"].startswith(
        f"{out}: was changed by somebody else while the run was at work; the output is finished"
    )
    assert tree(out).keys() == {"thesis.txt"}
    assert tree(kept) == usual[verb]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("extra", [[], ["--overwrite"]])
def test_a_second_run_ends_at_once_with_the_name_of_the_first(
    verb: str, extra: list[str], commands: dict[str, list], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with OutputFolder(out, overwrite=False) as folder:
        Journal(folder.work, {}, writes=True).record("first block", {})
        before = tree(tmp_path)
        result = run(*commands[verb], out, "--json", *extra)
        assert tree(tmp_path) == before
    assert result.exit_code == 5
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "GLMQ-E531"
    assert f"{out}: is being written by process {os.getpid()} on {os.uname().nodename} since " in error["message"]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "volume"
    target.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", target], capture_output=True).returncode:
        pytest.skip("a mount needs root")
    yield target
    subprocess.run(["umount", target], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_mount_point_is_as_good_as_a_folder(
    verb: str, commands: dict[str, list], usual: dict[str, dict[str, str]], mount: Path, tmp_path: Path
) -> None:
    glmq(*commands[verb], mount)
    assert tree(mount) == usual[verb]
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_says_that_nothing_can_be_written_there(
    verb: str, commands: dict[str, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access

    def access(path: Path, mode: int, **how: bool) -> bool:
        return path != tmp_path and real(path, mode, **how)

    monkeypatch.setattr(os, "access", access)
    monkeypatch.setattr(os, "supports_effective_ids", {access})
    sentence = (
        f"{tmp_path / 'out'}: {tmp_path} is not writable, where its work folder would lie; "
        f"make {tmp_path / 'out'} as an empty folder of your own, or choose another one"
    )
    result = run(*commands[verb], tmp_path / "out")
    assert (result.exit_code, result.stderr) == (2, f"error: {sentence}\n")
    shown = glmq(*commands[verb], tmp_path / "out", "--dry-run").stdout
    assert shown.splitlines()[-1] == f"!! this would stop a real run: {sentence}"
    (tmp_path / "out").mkdir()
    glmq(*commands[verb], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_goes_on_whatever_lies_in_the_output_folder(
    verb: str, commands: dict[str, list], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    read = Path(commands[verb][commands[verb].index("--model_path") + 1])
    itself = "is or holds the folder that is read; choose another --save_directory"
    if verb in ("calibrate", "quantize"):
        option = "--stats" if verb == "calibrate" else "--save_directory"
        itself = f"is the folder of the float weights; choose another {option}"
    foreign = (
        "is not empty, and glmq did not write thesis.txt in it, so that even --overwrite replaces nothing there; choose "
        "another folder, or empty this one yourself"
    )
    for place, why in (
        (tmp_path / "full", foreign),
        (tmp_path / "full" / "thesis.txt", "is a file, a folder is needed; choose another name"),
        (read, itself),
    ):
        before = tree(read)
        assert json.loads(glmq(*commands[verb], place, "--dry-run", "--json").stdout)["obstacles"] == [
            f"{place}: {why}"
        ]
        assert tree(read) == before
        assert run(*commands[verb], place).exit_code == 2
    answer = glmq(*commands[verb], tmp_path / "full", "--dry-run", "--json", "--overwrite").stdout
    assert json.loads(answer)["obstacles"] == [f"{tmp_path / 'full'}: {foreign}"]
    assert run(*commands[verb], tmp_path / "full", "--overwrite").exit_code == 2
    assert os.listdir(tmp_path / "full") == ["thesis.txt"]
    (tmp_path / "full" / "thesis.txt").rename(tmp_path / "full" / "glmq_report.json")
    answer = glmq(*commands[verb], tmp_path / "full", "--dry-run", "--json", "--overwrite").stdout
    assert json.loads(answer)["obstacles"] == []


@pytest.mark.parametrize(("verb", "options"), [("quantize", ["--dry-run"]), ("calibrate", ["-q"])])
def test_a_limit_of_file_size_is_named_before_the_work(
    verb: str, options: list[str], commands: dict[str, list], tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        result = run(*commands[verb], tmp_path / "out", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 5
    assert "calibrate: 1/" not in result.stderr
    assert result.stderr.endswith(
        "bytes are to be written, but files are limited to 100000 bytes here (ulimit -f); raise the limit, "
        "or write smaller weight files with --part_file_size\n"
    )


@pytest.mark.slow
def test_statistics_that_nobody_named_lie_in_the_work_folder(
    small: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's folder with such a name is none of our business."""
    (tmp_path / ".out.statistics").mkdir()
    (tmp_path / ".out.statistics" / "mine.txt").touch()
    command = ["quantize", "--model_path", small, "--calib-images", pictures, "--limit", 1, "--no-texts", "-q"]
    for extra in ([], ["--overwrite"]):
        glmq(*command, "--save_directory", tmp_path / "out", *extra)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.statistics", "out"]
    assert tree(tmp_path / ".out.statistics").keys() == {"mine.txt"}
    assert Workplace.of(tmp_path / "out").contents() == sorted(path.name for path in (tmp_path / "out").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_work_folder_may_lie_elsewhere(
    verb: str, commands: dict[str, list], usual: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    glmq(*commands[verb], tmp_path / "out", "--work-dir", elsewhere, "-q")
    assert tree(tmp_path / "out") == usual[verb]
    assert list(elsewhere.iterdir()) == []
    inside = run(*commands[verb], tmp_path / "new", "--work-dir", tmp_path / "new" / "work")
    assert (inside.exit_code, (tmp_path / "new").exists()) == (2, False)
    assert "lies in the output folder" in inside.stderr
