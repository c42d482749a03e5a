"""`glmq` with its arguments, in the process of the tests."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING
from unittest import mock

from typer import testing
from typer.core import TyperGroup
from typer.main import get_command

from glmq.cli.app import app

if TYPE_CHECKING:
    from typer import Typer
    from typer.testing import Result


def run(*args: object) -> Result:
    """Run `glmq` with these arguments; whatever the exit code. Sentences come without their codes, which have own tests."""
    with mock.patch.object(testing, "_get_command", _commands):
        result = testing.CliRunner().invoke(app, [str(arg) for arg in args])
    result.stderr_bytes = without_codes(result.stderr_bytes.decode()).encode()
    return result


def without_codes(shown: str) -> str:
    """`error: sentence` for `error[GLMQ-E201]: sentence`."""
    return re.sub(r"^error\[GLMQ-E\d{3}\]: ", "error: ", shown, flags=re.MULTILINE)


def glmq(*args: object) -> Result:
    """Run `glmq` with these arguments; it must succeed."""
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


@functools.cache
def _commands(app: Typer) -> TyperGroup:
    """The commands of the app, read from their signatures once a process rather than once a run: that takes 50 ms."""
    command = get_command(app)
    assert isinstance(command, TyperGroup)
    return command


def commands() -> TyperGroup:
    """Every verb of `glmq`, as typer has read it. Do not change it."""
    return _commands(app)
