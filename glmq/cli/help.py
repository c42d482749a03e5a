"""The text of `--help`: required and usual options first, fitted to the width of the terminal, no word broken.

It is drawn from the signatures of the verbs, which are the same in every version of typer.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import typer
from typer.models import ArgumentInfo, OptionInfo

from glmq.wording import counted

HELP_ALL: Final = "--help-all"
KINDS: Final = {Path: "path", int: "number", float: "number", str: "text"}
LABELS: Final = {"path": "PATH", "number": "N", "text": "TEXT", "": ""}
"""Kind of a value -> how it is written behind its option."""
WIDEST_LABEL: Final = 26
"""Characters of an option and its value beside which its text stands; a longer one has a line of its own."""
WIDEST: Final = 100
"""Characters of a line, however wide the terminal is: longer ones are hard to read."""
NARROWEST: Final = 40
LONGEST_CHOICE: Final = 12
"""Characters of `a|b|c` behind the option itself; longer choices stand in the text."""

UNBROKEN: Final = 20
"""Characters of a default in brackets that stands in one line."""


class Tier(Enum):
    """Where `--help` shows an option, as a mark in its `Annotated`; without one it is left to `--help-all`."""

    REQUIRED = "Required"
    USUAL = "Usual"
    VENDOR = "Flags of the vendor's quant_glm41v.py, with the same meaning"


@dataclass(frozen=True, slots=True)
class Entry:
    """One option or argument, as its verb declares it."""

    spellings: tuple[str, ...]
    """As declared: `--jobs`, `-q`, `--texts/--no-texts`; of an argument its name in capital letters."""
    kind: str
    """What a value is: `path`, `number`, `text`; empty for a flag and for a choice."""
    choices: tuple[str, ...]
    bounds: str
    """Of a number: `from 1 to 8`; empty for none."""
    default: str
    """As text: `on`, `m2`; empty for none."""
    variable: str
    """The environment variable that stands in for it; empty for none."""
    text: str
    panel: str
    """Its subject."""
    tier: Tier | None


def entries(verb: Callable[..., object]) -> list[Entry]:
    """The options and arguments of a verb, in the order of its signature."""
    # Not typing.get_type_hints, which Python 3.10 lets wrap what has None as its default into Optional.
    parameters = inspect.signature(inspect.unwrap(verb), eval_str=True).parameters
    return [_entry(name, parameter.annotation, parameter.default) for name, parameter in parameters.items()]


def _entry(name: str, hint: object, default: object) -> Entry:
    kind, *marks = get_args(hint)
    info = next(mark for mark in marks if isinstance(mark, OptionInfo | ArgumentInfo))
    # In Annotated the first declaration stands where a default would.
    declared = [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str)]
    required = default is inspect.Parameter.empty
    tiers = [mark for mark in marks if isinstance(mark, Tier)]
    usual = Tier.REQUIRED if required else Tier.USUAL if isinstance(info, ArgumentInfo) else None
    return Entry(
        spellings=(info.metavar or name.upper(),) if isinstance(info, ArgumentInfo) else tuple(declared),
        kind=_kind(kind),
        choices=_choices(kind),
        bounds=" ".join(f"{word} {end:g}" for word, end in (("from", info.min), ("to", info.max)) if end is not None),
        default=info.show_default if isinstance(info.show_default, str) else "" if required else _shown(default),
        variable=info.envvar if isinstance(info.envvar, str) else "",
        text=" ".join((info.help or "").split()),
        panel=info.rich_help_panel or "Options",
        tier=usual if required else tiers[-1] if tiers else usual,
    )


def _plain(kind: Any) -> Any:
    """The type of one value: `Path` of `Path | None`, `str` of `list[str]`."""
    while get_origin(kind) in (Union, types.UnionType, list, Annotated):
        kind = next(one for one in get_args(kind) if one is not type(None))
    return kind


def _choices(kind: Any) -> tuple[str, ...]:
    plain = _plain(kind)
    if get_origin(plain) is Literal:
        return tuple(map(str, get_args(plain)))
    return tuple(str(one.value) for one in plain) if issubclass(plain, Enum) else ()


def _kind(kind: Any) -> str:
    plain = _plain(kind)
    return "" if plain is bool or _choices(plain) else KINDS[plain]


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else ""
    return "" if default is None else str(default.value if isinstance(default, Enum) else default)


def help_of_verb(command: str, verb: Callable[..., object], epilog: str, *, everything: bool) -> str:
    """The help of one verb.

    Args:
        command: as it is typed: `glmq quantize`.
        verb: the function behind it.
        epilog: the last paragraph of `--help-all`.
        everything: `--help-all`: also the options that are neither required nor usual nor the vendor's, by subject, and
            the whole text of each, of which `--help` has the first sentence.
    """
    width, listed = _width(), entries(verb)
    shown: dict[str, list[Entry]] = {tier.value: [] for tier in Tier}
    for entry in listed:
        if everything or entry.tier:
            shown.setdefault(entry.tier.value if entry.tier else entry.panel, []).append(entry)
    required = [
        _label(entry) for entry in listed if entry.tier in (Tier.REQUIRED, Tier.USUAL) and not _is_option(entry)
    ]
    required += [_label(entry) for entry in listed if entry.tier is Tier.REQUIRED and _is_option(entry)]
    hidden = len(listed) - sum(map(len, shown.values()))
    further = f"{command} {HELP_ALL} shows {counted(hidden, 'more option')}. " if hidden else ""
    footer = f"{further}Dashes and underscores in options are alike; flags take True and False."
    return _page(
        [" ".join(["Usage:", command, *required, "[OPTIONS]"]), *_paragraphs(inspect.getdoc(verb) or "")],
        {title: [(_label(entry), _said(entry, everything)) for entry in group] for title, group in shown.items()},
        [footer, epilog] if everything else [footer],
        width,
    )


def help_of_group(
    command: str, text: str, verbs: Mapping[str, str], options: Iterable[tuple[str, str]], epilog: str
) -> str:
    """The overview: every verb with what it does, and the options of none of them."""
    sections = {"Verbs": list(verbs.items()), "Options": list(options)}
    return _page(
        [f"Usage: {command} VERB [OPTIONS]", text], sections, [f"{command} help VERB says more.", epilog], _width()
    )


def _is_option(entry: Entry) -> bool:
    return entry.spellings[0].startswith("-")


def _label(entry: Entry) -> str:
    """`-q, --quiet`, `--[no-]texts`, `--w-bit NUMBER`, `--device-type cpu|npu`."""
    names = []
    for spelling in sorted(entry.spellings, key=lambda one: one.startswith("--")):
        on, _, off = spelling.partition("/")
        names.append(f"--[no-]{on[2:]}" if off == f"--no-{on[2:]}" else on)
    choices = "|".join(entry.choices)
    value = LABELS[entry.kind] or (choices if len(choices) <= LONGEST_CHOICE else "WORD" if choices else "")
    return ", ".join(names) + (f" {value}" if value and _is_option(entry) else "")


def _said(entry: Entry, everything: bool) -> str:
    """The text of an option or its first sentence, then what it takes and its default in brackets."""
    text = entry.text if everything else re.split(r"(?<=\.) (?=[A-Z])", entry.text, maxsplit=1)[0]
    choices = entry.choices if len("|".join(entry.choices)) > LONGEST_CHOICE else ()
    facts = [f"one of {', '.join(choices)}"] if choices else []
    facts += [entry.bounds] if entry.bounds else []
    facts += [f"default: {entry.default}"] if entry.default else []
    facts += [f"env: {entry.variable}"] if entry.variable else []
    taken = f"[{'; '.join(facts)}]" if facts else ""
    if len(taken) <= UNBROKEN:
        taken = taken.replace(" ", "\N{NO-BREAK SPACE}")
    return f"{text} {taken}".rstrip()


def _paragraphs(docstring: str) -> list[str]:
    """The paragraphs of a docstring; examples are indented, and keep their lines."""
    return [part if part.startswith("    ") else " ".join(part.split()) for part in docstring.split("\n\n")]


def examples(verb: Callable[..., object]) -> list[str]:
    """The command lines in the help of a verb."""
    parts = [part for part in _paragraphs(inspect.getdoc(verb) or "") if part.startswith("    ")]
    return [line.strip() for part in parts for line in part.splitlines()]


def _page(
    head: Sequence[str], sections: Mapping[str, Sequence[tuple[str, str]]], foot: Sequence[str], width: int
) -> str:
    blocks = [_filled(part, width) for part in head]
    for title, rows in sections.items():
        if rows:
            blocks.append("\n".join([_styled(title), *_rows(rows, width)]))
    blocks += [_filled(part, width) for part in foot]
    return "\n\n".join(blocks) + "\n"


def _rows(rows: Sequence[tuple[str, str]], width: int) -> Iterator[str]:
    """Two columns, the labels in the first; under each other where that leaves no room for the text."""
    fitting = [len(label) for label, _ in rows if len(label) <= WIDEST_LABEL]
    beside = max(fitting, default=2) + 4 if width >= 2 * WIDEST_LABEL else 6
    for label, text in rows:
        lines = _wrapped(text, width - beside)
        first = "  " + _styled(label, "cyan")
        if len(label) + 4 <= beside:
            yield first + " " * (beside - 2 - len(label)) + lines.pop(0)
        else:
            yield first
        yield from (" " * beside + line for line in lines)


def _filled(text: str, width: int) -> str:
    return text if text.startswith("    ") else "\n".join(_wrapped(text, width))


def _wrapped(text: str, width: int) -> list[str]:
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _styled(text: str, colour: str | None = None) -> str:
    """Bold and with a colour, which typer leaves out again where the output is no terminal."""
    return text if os.environ.get("NO_COLOR") else typer.style(text, fg=colour, bold=True)


def _width() -> int:
    return min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
