"""A killed run, continued with --resume, ends with the bytes of an unbroken one."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from cli.command_line import glmq, run
from helpers import tree
from programs import fork_torchrun

from glmq.checkpoint.journal import Journal

SEED = ["--w_bit", 4, "--is_lowbit", "True", "--use_sigma", "True", "--torch_dtype", "fp16", "-q"]
BLOCKS = 5
"""Of the small model: a vision block, the merger, two text layers, lm_head; calibrate and quantize pass each once."""
LINES = 2 * BLOCKS + 2
"""Of both journals: between the passes the two text layers are rated."""


def command(small: Path, pictures: Path, out: Path) -> list[object]:
    paths = ["--model_path", small, "--save_directory", out, "--calib_images", pictures]
    return ["quantize", *paths, "--limit", 2, "--no-texts", *SEED]


def run_and_die(arguments: list[object], record: int, *, after: bool) -> None:
    """Run in a forked child that kills itself (kill -9) right before or right after it journals that block."""
    child = os.fork()
    if child == 0:
        count = 0
        original = Journal.record

        def dying(self: Journal, *args: object) -> None:
            nonlocal count
            if count == record and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            original(self, *args)  # type: ignore[arg-type]
            if count == record and after:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        Journal.record = dying  # type: ignore[method-assign]
        run(*arguments)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.fixture(scope="module")
def unbroken(small: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    glmq(*command(small, pictures, out))
    return tree(out)


@pytest.mark.slow
@pytest.mark.parametrize("record", [0, 2, BLOCKS - 1, BLOCKS, BLOCKS + 1, BLOCKS + 3, LINES - 1])
def test_a_run_killed_around_any_block_resumes_to_the_same_bytes(
    small: Path, pictures: Path, unbroken: dict[str, str], tmp_path: Path, record: int
) -> None:
    out = tmp_path / "out"
    arguments = command(small, pictures, out)
    run_and_die(arguments, record, after=False)  # the block is written, the journal does not know of it
    assert not out.exists()
    run_and_die([*arguments, "--resume"], 0, after=True)  # the journal knows it, the next one is not begun
    assert not out.exists()
    glmq(*arguments, "--resume")
    assert tree(out) == unbroken
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_run_killed_again_and_again_resumes_to_the_same_bytes(
    small: Path, pictures: Path, unbroken: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [*command(small, pictures, out), "--resume"]
    for _ in range(LINES):
        run_and_die(arguments, 0, after=True)
        assert not out.exists()
    glmq(*arguments)
    assert tree(out) == unbroken


@pytest.mark.slow
def test_a_plain_run_after_a_kill_says_that_it_can_resume(small: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = command(small, pictures, out)
    run_and_die(arguments, 2, after=True)
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {out}: an interrupted run of 3 finished blocks lies beside it, in .out.partial; "
        "run the same command with --resume to continue it, or with --overwrite to start again\n"
    )


@pytest.mark.slow
def test_a_plain_run_after_a_kill_in_the_second_pass_does_not_drop_the_calibration(
    small: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = command(small, pictures, out)
    run_and_die(arguments, BLOCKS, after=False)
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {out}: an interrupted run that has finished its calibration lies beside it, in .out.partial; "
        "run the same command with --resume to continue it, or with --overwrite to start again\n"
    )
    assert (tmp_path / ".out.partial" / "statistics").is_dir()
    other = run(*arguments, "--resume", "--max_pixels", 4000)
    assert other.exit_code == 2
    assert other.stderr == (
        f"error: --resume: the unfinished run in {tmp_path / '.out.partial'} had no --max_pixels, this one has "
        "--max_pixels 4000; run with the same, or start again with --overwrite\n"
    )
    fewer = run(*arguments, "--resume", "--limit", 1)
    assert fewer.exit_code == 2
    assert f"the unfinished run in {tmp_path / '.out.partial'} had --limit 2, this one has --limit 1; " in fewer.stderr
    assert (tmp_path / ".out.partial" / "statistics").is_dir()


@pytest.mark.slow
def test_a_resume_with_another_recipe_is_refused_with_both_values(
    small: Path, small_stats: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    paths = ["--model_path", small, "--save_directory", out, "--stats", small_stats]
    run_and_die(["quantize", *paths, *SEED], 1, after=True)
    begin = f"error: --resume: the unfinished run in {tmp_path / '.out.partial'} had "
    end = "; run with the same, or start again with --overwrite\n"
    result = run("quantize", *paths, *SEED, "--resume", "--part_file_size", 1)
    assert result.exit_code == 2
    assert result.stderr == f"{begin}no --part_file_size, this one has --part_file_size 1GB{end}"
    result = run("quantize", *paths, *SEED, "--resume", "--use_sigma=False", "--act-method", 1)
    assert result.exit_code == 2
    assert result.stderr == (
        f"{begin}--act-method 2, --use_sigma True, this one has --act-method 1, --use_sigma False{end}"
    )


@pytest.mark.slow
def test_a_resumed_run_needs_room_for_the_rest_only(
    small: Path, small_stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", "--model_path", small, "--save_directory", out, "--stats", small_stats, *SEED]
    run_and_die(arguments, 5, after=True)
    monkeypatch.setattr("glmq.checkpoint.disk.free_bytes", lambda _: 500_000)
    result = run(*(tmp_path / "other" if argument == out else argument for argument in arguments))
    assert result.exit_code == 5
    assert "bytes are to be written, but its disk has 500000 free" in result.stderr
    glmq(*arguments, "--resume")


@pytest.mark.slow
def test_overwrite_drops_the_interrupted_run(small: Path, small_stats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", "--model_path", small, "--save_directory", out, "--stats", small_stats, *SEED]
    run_and_die(arguments, 1, after=True)
    glmq(*arguments, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_torn_last_line_of_the_journal_counts_as_absent(
    small: Path, pictures: Path, unbroken: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = command(small, pictures, out)
    run_and_die(arguments, BLOCKS + 4, after=True)
    path = tmp_path / ".out.partial" / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    glmq(*arguments, "--resume")
    assert tree(out) == unbroken


def die_in_the_second_pass() -> None:
    """Let rank 1 not survive it."""
    from glmq.checkpoint.journal import Journal

    original, count = Journal.record, 0

    def record(journal: Journal, block: str, payload: Any) -> None:
        nonlocal count
        original(journal, block, payload)
        count += 1
        if os.environ["RANK"] == "1" and count == LINES - 2:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.record = record  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_rank_of_torchrun_that_is_killed_stops_the_other_and_one_process_resumes_to_its_own_bytes(
    small: Path, pictures: Path, unbroken: dict[str, str], tmp_path: Path
) -> None:
    arguments = command(small, pictures, tmp_path / "out")
    died = fork_torchrun(2, *arguments, before=die_in_the_second_pass)
    assert died.returncode == 1
    assert died.stderr.count("error[GLMQ-E") == 1
    told = (
        died.stderr
    )  # torchrun writes into it meanwhile, also into lines; of ranks that end within a moment it names one
    assert "Signal 9 (SIGKILL)" in told or "rank 0 of 2: lost the other ranks" in told
    assert "stopped by SIGTERM; quantize (pass 3 of 3)" in told or "rank 0 of 2: lost the other ranks" in told
    assert sorted(path.name for path in tmp_path.iterdir()) in (
        [".out.partial"],
        [".out.glmq-lock", ".out.partial"],
    )
    glmq(*arguments, "--resume")
    assert tree(tmp_path / "out") == unbroken
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
