"""glmq as a program, in a forked child of the test process: torch, transformers and typer are there, glmq is imported anew.

What such a child does not show is an import of these libraries and the first line of a Python process: for these there are
tests that start one. Everything else is real: its streams, its exit code, its signals, torchrun's agent and its ranks.
"""

from __future__ import annotations

import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import glmq

SECONDS: Final = 300
"""Until a child that hangs is killed."""


def start_glmq(
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    path: Path | None = None,
    before: Callable[[], object] | None = None,
    anew: bool = True,
) -> subprocess.CompletedProcess[str]:
    """`python -m glmq` with these arguments.

    Args:
        environment: variables that it has beside this process's.
        path: where glmq is imported from, if not from where this process has it.
        before: what the child does first.
        anew: import glmq once more: where not what an import does is of interest, it costs half a second for nothing.
    """

    def program() -> None:
        if before is not None:
            before()
        forget("glmq" if anew else "glmq.__main__")
        sys.path[:0] = [] if path is None else [str(path)]
        sys.argv = ["glmq", *map(str, arguments)]
        runpy.run_module("glmq", run_name="__main__", alter_sys=True)

    return start(program, environment)


def forget(*packages: str) -> None:
    """Take packages out of this process, which is a child's, so that their next import is their first."""
    for name in [name for name in sys.modules if name in packages or name.partition(".")[0] in packages]:
        del sys.modules[name]


def start(
    program: Callable[[], object], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Do `program` in a child process, as Python would a script of its own, and wait for its end.

    Args:
        environment: variables that it has beside this process's.

    Returns:
        the exit code (negative: the signal that ended it), and what it wrote.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = begin(program, {1: out.fileno(), 2: err.fileno()}, environment or {})
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess([], os.waitstatus_to_exitcode(status), *texts)


def begin(program: Callable[[], object], streams: Mapping[int, int], environment: Mapping[str, str]) -> int:
    """Do `program` in a child process, of which others may see the end; returns its id.

    Args:
        streams: by the number of a stream of its own (0 is stdin), the file of this process that it is.
        environment: variables that it has beside this process's.
    """
    child = _fork()
    if child == 0:
        _be_program(program, streams, environment)
    return child


def start_torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone` with these arguments: it alone is forked, its ranks are new Python processes."""

    def torchrun() -> None:
        from torch.distributed import run

        os.environ["PYTHONPATH"] = str(
            Path(glmq.__file__).parents[1]
        )  # the ranks import glmq from where this process has it
        run.main(["--standalone", *map(str, arguments)])

    return start(torchrun)


def fork_torchrun(
    world: int, *arguments: object, before: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone --nproc_per_node world -m glmq` with these arguments: its ranks are forks of it.

    Args:
        before: what each rank does first, in the glmq that it has imported.
    """

    def rank() -> None:
        forget("glmq")
        if before is not None:
            before()
        sys.argv = ["glmq", *map(str, arguments)]
        runpy.run_module("glmq", run_name="__main__", alter_sys=True)

    def torchrun() -> None:
        from torch.distributed import run

        parsed = run.config_from_args

        def forking(args: Any) -> tuple[object, object, list[str]]:
            config, *_ = parsed(args)
            config.start_method = "fork"
            return config, rank, []

        run.config_from_args = forking
        run.main(["--standalone", "--nproc_per_node", str(world), "glmq"])

    return start(torchrun)


def _fork() -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: none of them is at work
        return os.fork()


def _be_program(program: Callable[[], object], streams: Mapping[int, int], environment: Mapping[str, str]) -> None:
    """Never returns."""
    code = 1
    try:
        signal.alarm(SECONDS)
        for number, handle in streams.items():
            os.dup2(handle, number)
        if 0 in streams:
            sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        logging.root.handlers.clear()  # pytest's
        _warn_as_python_does()
        os.environ.update(environment)
        code = _run(program)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _warn_as_python_does() -> None:
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)


def _run(program: Callable[[], object]) -> int:
    """The exit code that Python gives a script."""
    try:
        program()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
