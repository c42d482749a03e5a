"""What is said when a command fails or is stopped, whatever state the streams are in."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Final

import typer

from glmq.cli.lines import broken, width_of
from glmq.cli.stopped import describe_rest, describe_stop, find_unfinished, resuming_command
from glmq.cli.streams import silence
from glmq.errors import GlmqError, MemoryShortError, SpaceError, UnreadableError
from glmq.machine import is_out_of_memory
from glmq.quoting import visible

ANSWERED: Final = ContextVar("answered", default=False)
"""Whether the one object that --json promises on stdout has been printed by this command."""


def complain(code: str, message: str, *, json_wanted: bool, debug: bool, **more: object) -> None:
    """Say what stopped the command: one sentence on stderr, or an object on stdout with --json, or the sentence after all where
    stdout takes nothing or has the command's own object already.

    Args:
        code: of the error.
        message: the sentence.
        json_wanted: whether --json was given.
        debug: print the traceback first.
        more: what the object has beside these.
    """
    message = visible(message)
    said = json.dumps({"error": {"code": code, "message": message, **more}}, sort_keys=True)
    try:
        if debug:
            traceback.print_exc()
        if not json_wanted or ANSWERED.get() or not _say_object(said):
            _say_sentence(code, message)
    except OSError:  # nobody hears it; the exit code still says it
        silence(sys.stderr)


def _say_object(said: str) -> bool:
    """Print a line on stdout, and whether that took it."""
    try:
        typer.echo(said)
    except OSError:
        silence(sys.stdout)
        return False
    return True


def _say_sentence(code: str, message: str) -> None:
    head, width = f"error[{code}]:", width_of(sys.stderr)
    sentence = f"{head} {message}"
    first, *rest = [sentence] if width is None else broken(sentence, width)
    typer.secho(head, fg="red", bold=True, err=True, nl=False)
    for line in (first.removeprefix(head), *rest):
        typer.echo(line, err=True)


def say(line: str) -> None:
    """Print a line on stderr, if that takes it."""
    try:
        typer.echo(visible(line), err=True)
    except OSError:
        silence(sys.stderr)


def say_stopped(code: str, by: str, params: Mapping[str, object], *, json_wanted: bool, debug: bool) -> None:
    """How far the run came, where its unfinished output lies, and the command that continues it."""
    left = find_unfinished(params) if resuming_command() else []
    message, rest = describe_stop(by, left), describe_rest(left)
    unfinished = [{"path": str(one.path), "bytes": one.nbytes} for one in left]
    more = {"unfinished": unfinished, "resume": resuming_command()} if left else {}
    complain(code, message, json_wanted=json_wanted, debug=debug, **more)
    for line in rest if not json_wanted or ANSWERED.get() else ():
        say(line)


def describe_failure(error: BaseException) -> tuple[str, str, int]:
    """The code, the sentence and the exit code of what is no error of glmq's own."""
    if is_out_of_memory(error):
        sentence = "the machine's memory is used up; close other programs, or use a machine with more"
        if "NPU out of memory" in str(error):  # torch_npu's words
            sentence = (
                "the NPU's memory is used up; begin again with smaller pictures (--max-pixels), or --device-type cpu"
            )
        return MemoryShortError.code, sentence, MemoryShortError.exit_code
    if isinstance(error, OSError):
        kind = SpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else UnreadableError
        what = f"{error.filename}: " if error.filename else ""
        advice = "check the path, its permissions and the disk"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            advice = "raise the limit of open files (ulimit -n)"
        elif kind is SpaceError:
            advice = "make room there, for bytes and for files (df -h, df -i)"
        elif error.filename and os.path.islink(error.filename):
            advice = f"it is a link to {os.readlink(error.filename)}: mount or copy what it leads to as well"
        sentence = f"{what}{error.strerror or error}; {advice}"
        return kind.code, sentence, kind.exit_code
    name = type(error).__name__
    return (
        GlmqError.code,
        f"unexpected failure, {name}: {error}; run again with --debug and report the traceback",
        GlmqError.exit_code,
    )
