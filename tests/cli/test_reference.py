"""docs/cli.md is what the commands say of themselves.

`python tests/cli/test_reference.py` writes it anew, from their signatures: these are the same in every version of typer.
"""

from __future__ import annotations

import inspect
import re
import types
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Union, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo

from glmq.cli.app import app

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DOCUMENT = Path(__file__).parents[2] / "docs" / "cli.md"
HEAD = """# Command line

Every option of every verb, drawn from the commands themselves; `glmq VERB --help` shows the same. Options may be written with
dashes or underscores. A flag takes `True` and `False` too, as the vendor's script does: `--is_lowbit True` is `--is-lowbit`.
"""
NAMES = {Path: "path", int: "number", float: "number", str: "text"}


def draw() -> str:
    return HEAD + "".join(_section(command.callback) for command in app.registered_commands)


def _section(verb: Callable[..., object]) -> str:
    text = f"\n## glmq {verb.__name__}\n\n{_prose(inspect.getdoc(verb) or '')}\n"
    hints, panels = get_type_hints(verb, include_extras=True), {}
    for name, parameter in inspect.signature(verb).parameters.items():
        kind, info = get_args(hints[name])[:2]
        row = " | ".join(_cells(name, kind, info, parameter.default))
        panels.setdefault(info.rich_help_panel or "Options", []).append(f"| {row} |\n")
    for panel, rows in panels.items():
        text += f"\n### {verb.__name__}: {panel}\n\n| option | value | default | what it does |\n|---|---|---|---|\n"
        text += "".join(rows)
    return text


def _cells(name: str, kind: object, info: ArgumentInfo, default: object) -> Iterator[str]:
    dashed = name.replace("_", "-")
    declared = (
        info.default,
        *(info.param_decls or ()),
    )  # in Annotated the first declaration stands where a default would
    given = [one for one in declared if isinstance(one, str) and one.startswith("-")]
    names = [name.upper()] if isinstance(info, ArgumentInfo) else given or [f"--{dashed}"]
    if kind is bool and not given:
        names.append(f"--no-{dashed}")
    said = re.search(r"\[default: (.*)\]$", _plain(info.help))
    yield ", ".join(f"`{one}`" for one in names)
    yield _escaped(_value(kind, info))
    yield _escaped(said[1] if said else "required" if default is inspect.Parameter.empty else _shown(default))
    yield _escaped(re.sub(r"\s*\[default: .*\]$", "", _plain(info.help)))


def _value(kind: object, info: ArgumentInfo) -> str:
    """What a value looks like: its kind, the words to choose from, or its range."""
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(str(one.value) for one in kind)
    if get_origin(kind) in (Union, types.UnionType, list):
        return _value(next(one for one in get_args(kind) if one is not type(None)), info)
    if kind is bool:
        return ""
    low = "" if info.min is None else f" from {info.min:g}"
    return NAMES[kind] + low + ("" if info.max is None else f" to {info.max:g}")


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return "" if default is None else str(default.value if isinstance(default, Enum) else default)


def _prose(text: str) -> str:
    """Help text as Markdown: examples, which are bold there, as code."""
    text = re.sub(r"\[bold\](.*?)\[/(?:bold)?\]", r"`\1`", text.replace("\f", ""), flags=re.S)
    return re.sub(r"`([^`]*)`", lambda code: f"`{' '.join(code[1].split())}`", _plain(text)).replace("\b\n", "").strip()


def _plain(text: str | None) -> str:
    return (text or "").replace("\\[", "[")


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def test_the_command_line_reference_is_what_the_commands_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == draw(), "run: python tests/cli/test_reference.py"


if __name__ == "__main__":
    DOCUMENT.write_text(draw(), encoding="utf-8")
