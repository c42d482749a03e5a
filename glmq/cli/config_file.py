"""`--config run.toml` and `--dump-config`: the options of a command as a TOML file."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Final

import typer

from glmq.checkpoint.disk import read_input
from glmq.errors import CheckpointError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES: Final = 1_000_000
"""Of a file of options; more is none."""
NOT_IN_FILES: Final = frozenset(
    {"config", "dump_config", "help", "debug", "log_file", "events", "json_output", "quiet", "verbose", "dry_run"}
)
"""Options of one run, not of a recipe."""


def read_config_file(file: str, params: Sequence[object]) -> dict[str, object]:
    """The values of a TOML file, keyed as the command's parameters are.

    Raises:
        typer.BadParameter: unreadable, not TOML, or a key that is no option of this command.
    """
    try:
        raw = read_input(Path(file), MAX_BYTES)
        if len(raw) > MAX_BYTES:
            raise typer.BadParameter(f"--config {file}: has more than {MAX_BYTES} bytes; give a TOML file")
        values = tomllib.loads(raw.decode("utf-8"))
    except CheckpointError as error:
        raise typer.BadParameter(f"--config {error}") from error
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"--config {file}: cannot be read ({error})") from error
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:  # ValueError: numbers of thousands of digits
        raise typer.BadParameter(f"--config {file}: is not TOML ({error})") from error
    names = {str(name) for param in params if (name := getattr(param, "name", None)) not in NOT_IN_FILES}
    found: dict[str, object] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, sorted(names), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(names))}"
            raise typer.BadParameter(f"--config {file}: unknown key {key!r}; {hint}")
        found[name] = value
    return found


def dump_config(params: Mapping[str, object]) -> str:
    """The options in effect as TOML, sorted; what is unset is left out."""
    lines = []
    for name, value in sorted(params.items()):
        if name in NOT_IN_FILES or value is None:
            continue
        lines.append(f"{name} = {_toml(value)}\n")
    return "".join(lines)


def _toml(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    plain = str(value) if isinstance(value, Path) else value.value if isinstance(value, Enum) else value
    # JSON's booleans, numbers and strings are TOML's too.
    return json.dumps(plain, ensure_ascii=False)
