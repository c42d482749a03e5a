"""docs/cli.md is what the commands say of themselves.

`python tests/cli/test_reference.py` writes it anew, from their signatures: these are the same in every version of typer.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from glmq.cli.app import app
from glmq.cli.help import Entry, Tier, entries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DOCUMENT = Path(__file__).parents[2] / "docs" / "cli.md"
HEAD = """# Command line

Every option of every verb, drawn from the commands themselves; `glmq VERB --help` shows the usual ones, `--help-all` all.
Options may be written with dashes or underscores. A flag takes `True` and `False` too, as the vendor's script does:
`--is_lowbit True` is `--is-lowbit`.
"""


def draw() -> str:
    return HEAD + "".join(_section(command.callback) for command in app.registered_commands)


def _section(verb: Callable[..., object]) -> str:
    text = f"\n## glmq {verb.__name__}\n\n{inspect.getdoc(verb)}\n"
    panels: dict[str, list[str]] = {}
    for entry in entries(verb):
        panels.setdefault(entry.panel, []).append(f"| {' | '.join(_cells(entry))} |\n")
    for panel, rows in panels.items():
        text += f"\n### {verb.__name__}: {panel}\n\n| option | value | default | what it does |\n|---|---|---|---|\n"
        text += "".join(rows)
    return text


def _cells(entry: Entry) -> Iterator[str]:
    is_flag = not entry.kind and not entry.choices
    off = "off" if is_flag else ""
    yield ", ".join(f"`{one}`" for one in entry.spellings)
    yield _escaped(" ".join([", ".join(entry.choices) or entry.kind, entry.bounds]).strip())
    yield _escaped("required" if entry.tier is Tier.REQUIRED else entry.default or off)
    yield _escaped(entry.text)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def test_the_command_line_reference_is_what_the_commands_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == draw(), "run: python tests/cli/test_reference.py"


if __name__ == "__main__":
    DOCUMENT.write_text(draw(), encoding="utf-8")
