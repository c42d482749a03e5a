import errno
import json
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pytest
import typer
from cli.command_line import glmq, run
from helpers import PACKAGES
from programs import start_glmq
from typer.testing import CliRunner, Result

from glmq import errors
from glmq.checkpoint.folder import OutputFolder
from glmq.checkpoint.journal import Journal
from glmq.cli import command
from glmq.cli.command import CONTEXT, GlmqCommand
from glmq.cli.stopped import remember_reached


def work() -> None:
    """What the command does; tests replace it."""


def make_app() -> typer.Typer:
    """One command with the options that GlmqCommand knows about."""
    app = typer.Typer(pretty_exceptions_enable=False, context_settings=CONTEXT)

    @app.command(cls=GlmqCommand, context_settings=CONTEXT)
    def act(
        is_lowbit: Annotated[bool, typer.Option("--is-lowbit/--no-is-lowbit")] = False,
        open_outlier: Annotated[bool, typer.Option("--open-outlier/--no-open-outlier")] = True,
        w_bit: Annotated[int, typer.Option("--w-bit")] = 8,
        prompt: Annotated[str, typer.Option("--prompt")] = "",
        json_output: Annotated[bool, typer.Option("--json")] = False,
        debug: Annotated[bool, typer.Option("--debug")] = False,
    ) -> None:
        work()
        typer.echo(f"{is_lowbit} {open_outlier} {w_bit} {prompt!r}")

    @app.command(cls=GlmqCommand, context_settings=CONTEXT)
    def long_run(
        out: Path | None = None,
        json_output: Annotated[bool, typer.Option("--json")] = False,
        resume: Annotated[bool, typer.Option("--resume/--no-resume")] = False,
    ) -> None:
        work()

    return app


def call(*args: str) -> Result:
    return CliRunner().invoke(make_app(), args)


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(sys.modules[__name__], "work", fail)


@pytest.mark.parametrize(
    ("args", "value"),
    [
        ([], False),
        (["--is-lowbit"], True),
        (["--is_lowbit"], True),
        (["--no-is-lowbit"], False),
        (["--no_is_lowbit"], False),
        (["--is_lowbit", "True"], True),
        (["--is_lowbit", "False"], False),
        (["--is-lowbit", "true"], True),
        (["--is-lowbit=false"], False),
        (["--is_lowbit=TRUE"], True),
        (["--is_lowbit", "1"], True),
        (["--is_lowbit=0"], False),
        (["--is_lowbit", "yes"], True),
        (["--is_lowbit", "off"], False),
        (["--is_lowbit", "True", "--is_lowbit", "False"], False),
    ],
)
def test_a_flag_takes_every_spelling_of_the_seed(args: list[str], value: bool) -> None:
    result = call("act", *args, "--w_bit", "4")
    assert (result.exit_code, result.stdout) == (0, f"{value} True 4 ''\n")


def test_a_flag_that_is_on_by_default_can_be_switched_off() -> None:
    for args in (["--open_outlier", "False"], ["--no-open-outlier"], ["--open-outlier=no"]):
        assert call("act", *args).stdout == "False False 8 ''\n"


def test_a_flags_word_is_not_taken_from_another_option() -> None:
    assert call("act", "--is_lowbit", "--prompt", "True").stdout == "True True 8 'True'\n"
    assert call("act", "--prompt", "is_lowbit", "--is_lowbit", "False").stdout == "False True 8 'is_lowbit'\n"


@pytest.mark.parametrize("word", ["maybe", "2", "None", "TrueTrue"])
def test_another_word_for_a_flag_is_wrong_usage(word: str) -> None:
    attached = call("act", f"--is_lowbit={word}")
    assert attached.exit_code == 2
    sentence = f"error[GLMQ-E201]: --is_lowbit {word}: True or False is needed; see `root act --help`\n"
    assert attached.stderr == sentence
    apart = call("act", "--is_lowbit", word)
    assert (apart.exit_code, apart.stdout, apart.stderr) == (2, "", sentence)


def test_a_number_that_is_none_is_wrong_usage() -> None:
    result = call("act", "--w_bit", "four")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error[GLMQ-E201]: --w_bit four: a whole number is needed; see `root act --help`\n"


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and "code" in vars(kind)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_its_code_one_sentence_and_its_exit_code(
    kind: type[errors.GlmqError], monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(monkeypatch, kind("a [red] sentence"))
    result = call("act")
    assert (result.exit_code, result.stdout) == (kind.exit_code, "")
    assert result.stderr == f"error[{kind.code}]: a [red] sentence\n"
    result = call("act", "--json")
    assert (result.exit_code, result.stderr) == (kind.exit_code, "")
    assert json.loads(result.stdout) == {"error": {"code": kind.code, "message": "a [red] sentence"}}
    assert kind.code.startswith(f"GLMQ-E{kind.exit_code}")


def test_every_kind_of_error_has_its_own_code() -> None:
    assert len({kind.code for kind in KINDS}) == len(KINDS) > 30
    assert (errors.UsageError.code, errors.DamagedError.code) == ("GLMQ-E201", "GLMQ-E402")


@pytest.mark.parametrize(
    ("error", "exit_code", "code", "sentence"),
    [
        (
            ZeroDivisionError("division by zero"), 1, "GLMQ-E101",
            "unexpected failure, ZeroDivisionError: division by zero; run again with --debug and report the traceback",
        ),
        (MemoryError(), 5, "GLMQ-E502", "the machine's memory is used up; close other programs, or use a machine with more"),
        (
            RuntimeError("NPU out of memory. Tried to allocate 26.00 GiB (NPU 0; 21.02 GiB total capacity)"), 5, "GLMQ-E502",
            "the NPU's memory is used up; begin again with smaller pictures (--max-pixels), or --device-type cpu",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/out"), 5, "GLMQ-E501",
            "/data/out: No space left on device; make room there, for bytes and for files (df -h, df -i)",
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"), 5, "GLMQ-E501",
            "Disk quota exceeded; make room there, for bytes and for files (df -h, df -i)",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/out"), 4, "GLMQ-E406",
            "/data/out: Permission denied; check the path, its permissions and the disk",
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "/data/out"), 4, "GLMQ-E406",
            "/data/out: Too many open files; raise the limit of open files (ulimit -n)",
        ),
        (KeyboardInterrupt(), 130, "GLMQ-E130", "stopped by Ctrl-C; nothing half-written was left behind"),
    ],
)  # fmt: skip
def test_other_failures_are_one_sentence_too(
    error: BaseException, exit_code: int, code: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(monkeypatch, error)
    result = call("act")
    assert (result.exit_code, result.stdout, result.stderr) == (exit_code, "", f"error[{code}]: {sentence}\n")
    assert json.loads(call("act", "--json").stdout) == {"error": {"code": code, "message": sentence}}


def test_a_link_that_leads_nowhere_is_called_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    link = tmp_path / "README.md"
    link.symlink_to("../../blobs/abc")
    raising(monkeypatch, FileNotFoundError(errno.ENOENT, "No such file or directory", str(link)))
    assert call("act").stderr == (
        f"error[GLMQ-E406]: {link}: No such file or directory; it is a link to ../../blobs/abc: mount or copy what it leads "
        "to as well\n"
    )


def test_a_folder_that_is_gone_and_python_without_docstrings_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Path:
        raise FileNotFoundError(2, "No such file or directory")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "cwd", gone)
        result = call("act")
    assert result.exit_code == 2
    assert result.stderr.endswith("the folder that glmq was started in is gone; change to one that exists\n")
    monkeypatch.setattr(command, "sys", SimpleNamespace(flags=SimpleNamespace(optimize=2), stderr=sys.stderr))
    result = call("act")
    assert result.exit_code == 2
    assert result.stderr.endswith(
        "Python leaves docstrings out here (-OO, PYTHONOPTIMIZE=2), which transformers reads; unset it\n"
    )


@pytest.mark.parametrize(
    ("error", "code", "name", "spelled"),
    [
        (KeyboardInterrupt(), 130, "Ctrl-C", ["--no_resume"]),
        (command.Terminated(), 143, "SIGTERM", ["--resume", "False"]),
    ],
)
def test_a_stopped_run_says_how_far_it_came_where_it_lies_and_what_continues_it(
    error: BaseException, code: int, name: str, spelled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def work() -> None:
        remember_reached("calibrate (pass 1 of 3): 12 of 66 blocks are finished")
        raise error

    monkeypatch.setattr(__name__ + ".work", work)
    arguments = ["long-run", "--out", str(tmp_path / "my out"), *spelled]
    result = call(*arguments)
    assert result.exit_code == code
    assert result.stderr == (
        f"error[GLMQ-E{code}]: stopped by {name}; calibrate (pass 1 of 3): 12 of 66 blocks are finished; "
        "nothing half-written was left behind\n"
        f"  to start again: root long-run --out '{tmp_path}/my out'\n"
    )
    unfinished = tmp_path / ".my out.partial"
    with suppress(KeyboardInterrupt), OutputFolder(tmp_path / "my out", overwrite=False) as folder:
        Journal(folder.work, {}).record("a block", {})
        (folder.work / "states").write_bytes(bytes(2**20))
        raise KeyboardInterrupt
    (size,) = re.findall(r"1\.\d MiB", (result := call(*arguments)).stderr)
    assert result.exit_code == code
    assert result.stderr == (
        f"error[GLMQ-E{code}]: stopped by {name}; calibrate (pass 1 of 3): 12 of 66 blocks are finished\n"
        f"  unfinished: {unfinished}, {size}\n"
        f"  to continue: root long-run --out '{tmp_path}/my out' --resume\n"
        f"  to remove: glmq clean --yes {tmp_path}\n"
    )
    shown = json.loads(call(*arguments, "--json").stdout)["error"]
    assert shown["resume"] == f"root long-run --out '{tmp_path}/my out' --json --resume"
    assert [one["path"] for one in shown["unfinished"]] == [str(unfinished)]


def test_a_traceback_is_shown_only_with_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, errors.ModelError("no"))
    assert "Traceback" not in call("act").stderr
    shown = call("act", "--debug").stderr
    assert shown.startswith("Traceback (most recent call last):\n")
    assert shown.endswith("glmq.errors.ModelError: no\nerror[GLMQ-E411]: no\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--w_bit", "four"], "--w_bit four: a whole number is needed"),
        (["--is_lowbit=maybe"], "--is_lowbit maybe: True or False is needed"),
        (["--is_lowbit="], "--is_lowbit: is empty; give a value (perhaps a variable of the shell is not set)"),
        (["--w_bit", ""], "--w_bit: is empty; give a value (perhaps a variable of the shell is not set)"),
        (["--prompt", "", ""], "an argument: is empty; give a value (perhaps a variable of the shell is not set)"),
        (["--no-such-option"], "--no-such-option: no such option"),
        (["surplus"], "surplus: not expected"),
    ],
)
def test_wrong_usage_is_one_object_with_json(args: list[str], message: str) -> None:
    result = call("act", "--json", *args)
    assert (result.exit_code, result.stderr) == (2, "")
    found = json.loads(result.stdout)["error"]
    assert found["code"] == "GLMQ-E201"
    assert found["message"].startswith(message)


SCRIPT = """
import sys, time
from typing import Annotated
import typer
from glmq.cli.command import CONTEXT, GlmqCommand
app = typer.Typer(context_settings=CONTEXT)
@app.command(cls=GlmqCommand)
def act(
    rows: int = 0,
    json_output: Annotated[bool, typer.Option("--json")] = False,
    resume: Annotated[bool, typer.Option("--resume/--no-resume")] = False,
) -> None:
    try:
        print("started", flush=True)
        for number in range(rows):
            print(number, flush=True)
        time.sleep(30 if not rows else 0)
    finally:
        print("cleaned up", file=sys.stderr, flush=True)
app()
"""


def start(*args: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PACKAGES
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_a_signal_cleans_up_and_has_its_exit_code(number: signal.Signals, code: int, name: str) -> None:
    process = start()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == code
    first, second, again = stderr.splitlines()
    assert (first, second) == (
        "cleaned up",
        f"error[GLMQ-E{code}]: stopped by {name}; nothing half-written was left behind",
    )
    assert again.startswith("  to start again: ")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), None])
def test_signals_that_come_while_a_stop_is_said_change_nothing(
    error: BaseException | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        if error is not None:
            raise error
        signal.raise_signal(signal.SIGTERM)

    def describe(by: str, _: object) -> str:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        return f"stopped by {by}"

    monkeypatch.setattr(__name__ + ".work", work)
    monkeypatch.setattr("glmq.cli.complaint.describe_stop", describe)
    result = call("long-run", "--out", "out")
    code, by = (143, "SIGTERM") if error is None else (130, "Ctrl-C")
    assert result.exit_code == code
    assert result.stderr == f"error[GLMQ-E{code}]: stopped by {by}\n  to start again: root long-run --out out\n"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)  # until the process has ended


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_program_quietly() -> None:
    process = start("--rows", "200000")
    assert process.stdout is not None
    process.stdout.close()
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.stderr is not None
    with process.stderr:
        assert (process.returncode, process.stderr.read()) == (1, "cleaned up\n")


@pytest.mark.slow
def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    done = start_glmq("quantize", "--model-path", tmp_path, "--save-directory", tmp_path / "out")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == (
        f"error[GLMQ-E411]: {tmp_path}: has no config.json, so it is not a model folder; give the folder that holds it\n"
    )


def test_a_log_file_has_the_machine_each_block_and_the_traceback_of_a_failure(
    small: Path, small_stats: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run.log"
    command = ("quantize", "--model_path", small, "--stats", small_stats, "--save_directory", tmp_path / "out", "-q")
    glmq(*command, "--log-file", path)
    text = path.read_text(encoding="utf-8")
    assert "versions: glmq " in text
    assert "quantize: 5/6 lm_head, " in text
    assert run(*command, "--log-file", path).exit_code == 2
    assert f"OutputError: {tmp_path / 'out'}: is not empty" in path.read_text(encoding="utf-8")


def test_a_log_file_that_cannot_be_written_is_one_sentence(small: Path, tmp_path: Path) -> None:
    result = run("inspect", small, "--log-file", tmp_path / "none" / "run.log")
    assert result.exit_code == 2
    folder = tmp_path / "none"
    assert result.stderr == (
        f"error: --log-file {folder / 'run.log'}: there is no folder {folder}; make it, or choose another place\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_file_on_a_full_disk_ends_no_run_and_is_said(small: Path) -> None:
    result = run("inspect", small, "--log-file", "/dev/full")
    assert result.exit_code == 0
    assert result.stderr == "warning: /dev/full: lines are missing in the log (No space left on device)\n"


class PanicException(BaseException):
    """As pyo3 names its own."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        ),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        PanicException("memory allocation of 1024 bytes failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_is_used_up_is_one_sentence_whoever_says_it(
    error: BaseException, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("glmq.jobs.inspect.inspect", fail)
    result = run("inspect", small)
    assert (result.exit_code, result.stdout) == (5, "")
    assert result.stderr == "error: the machine's memory is used up; close other programs, or use a machine with more\n"


def test_a_panic_of_a_library_is_one_sentence(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PanicException("index out of\nbounds")

    monkeypatch.setattr("glmq.jobs.inspect.inspect", fail)
    result = run("inspect", small)
    assert result.exit_code == 1
    assert result.stderr == (
        "error: unexpected failure, PanicException: index out of\\nbounds; run again with --debug and report the traceback\n"
    )


def test_memory_that_ends_when_the_output_is_whole_is_no_failure(
    small: Path, small_stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("glmq.cli.render.show_quantization", fail)
    out = tmp_path / "out"
    result = run("quantize", "--model_path", small, "--stats", small_stats, "--save_directory", out)
    assert result.exit_code == 0
    assert (
        result.stderr.splitlines()[-1] == f"note: the output in {out} is whole, but memory ran out while it was shown"
    )
    assert (out / "quant_model_description.json").is_file()


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("Invalid value for '--tp': Input should be greater than or equal to 1", "--tp 0: at least 1 is needed"),
        ("Invalid value for '--tp': Input should be less than or equal to 8", "--tp 0: at most 8 is needed"),
        (
            "Invalid value for '--jobs': Input should be a valid integer, unable to parse",
            "--jobs: a whole number is needed",
        ),
    ],
)
def test_what_typer_says_of_a_value_is_said_in_our_words(said: str, sentence: str) -> None:
    assert command._usage_sentence(said, ["compress", "--tp", "0"]) == sentence
