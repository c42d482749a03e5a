"""`--config run.toml` and `--dump-config`: the options of a command as a TOML file."""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Final

import typer

from glmq.checkpoint.disk import read_input
from glmq.errors import CheckpointError, UsageError
from glmq.values import DTYPE_WORDS

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
MAY_BE_EMPTY: Final = ("prompt",)
"""Parameters that an empty text may be given for."""
CONTROLS: Final = re.compile("[\x7f-\x9f]")
"""DEL, which TOML takes only as an escape, and others that a terminal would act on."""


def read_config_file(file: str, params: Sequence[object]) -> dict[str, object]:
    """The values of a TOML file, keyed as the command's parameters are.

    Raises:
        typer.BadParameter: unreadable, not TOML, or a key that is no option of this command.
    """
    names = {str(name) for param in params if (name := getattr(param, "name", None)) not in NOT_IN_FILES}
    try:
        return known_values(read_toml(file), names, file)
    except UsageError as error:
        raise typer.BadParameter(f"--config {error}") from error


def read_toml(file: str) -> dict[str, object]:
    """The contents of a TOML file. Raises UsageError for one that cannot be read."""
    try:
        raw = read_input(Path(file), MAX_BYTES)
        if len(raw) > MAX_BYTES:
            raise UsageError(f"{file}: has more than {MAX_BYTES} bytes; give a TOML file")
        values: dict[str, object] = tomllib.loads(raw.decode("utf-8"))
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: cannot be read ({error})") from error
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:  # ValueError: numbers of thousands of digits
        raise UsageError(f"{file}: is not TOML ({error})") from error
    return values


def known_values(table: Mapping[str, object], names: Collection[str], where: str) -> dict[str, object]:
    """The values of a table by parameter, torch's names of dtypes as --torch_dtype takes them.

    Raises:
        UsageError: a key that is no parameter, or an empty text, which as a path would be the current folder.
    """
    found = {_known_key(key, names, where): value for key, value in table.items()}
    for name, value in found.items():
        if value == "" and name not in MAY_BE_EMPTY:
            raise UsageError(f"{where}: {name} is empty; give a value, or leave the key out")
    if isinstance(dtype := found.get("torch_dtype"), str):
        found["torch_dtype"] = DTYPE_WORDS.get(dtype, dtype)
    return found


def _known_key(key: str, names: Collection[str], where: str) -> str:
    """The parameter that a key stands for, dashes and underscores being alike. Raises UsageError if there is none."""
    name = key.replace("-", "_")
    if name not in names:
        near = difflib.get_close_matches(name, sorted(names), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(names))}"
        raise UsageError(f"{where}: unknown key {key!r}; {hint}")
    return name


def dump_config(params: Mapping[str, object]) -> str:
    """The options in effect as TOML, sorted; what is unset is left out.

    Raises:
        UsageError: a path that is no UTF-8, which TOML cannot hold.
    """
    lines = []
    for name, value in sorted(params.items()):
        if name in NOT_IN_FILES or value is None:
            continue
        try:
            lines.append(f"{name} = {_toml(value)}\n")
        except UnicodeEncodeError:
            raise UsageError(
                f"--{name.replace('_', '-')} {value}: is not UTF-8, which TOML cannot hold; give it another name"
            ) from None
    return "".join(lines)


def _toml(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    plain = str(value) if isinstance(value, Path) else value.value if isinstance(value, Enum) else value
    if isinstance(plain, float) and not math.isfinite(plain):
        return str(plain)
    # JSON's booleans, other numbers and strings are TOML's too, but for control characters that JSON leaves as they are.
    text = json.dumps(plain, ensure_ascii=False)
    text.encode()  # fails at bytes of a path that are no UTF-8
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
