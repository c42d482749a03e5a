"""`glmq clean`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glmq.cli import options as o
from glmq.cli.help import Tier
from glmq.wording import counted, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from glmq.jobs.clean import Leftover


def clean(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER...]",
            help="Folders to look in, or output folders of unfinished runs.",
            show_default="the current folder",
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove what is unfinished.", rich_help_panel=o.RUN), Tier.USUAL
    ] = False,
    json_output: Annotated[o.JsonOutput, Tier.USUAL] = False,
    debug: o.Debug = False,
) -> None:
    """List the unfinished runs in a folder, with the command that continues each; with --yes remove them.

    A run that is at work is left alone, and so is everything that glmq did not write.

        glmq clean OUTPUTS --yes
    """
    from glmq.cli.render import print_json
    from glmq.jobs.clean import find_leftovers, remove_leftovers

    looked_in = folders or [Path()]
    found = find_leftovers(looked_in)
    removed = remove_leftovers(found) if yes else []
    if json_output:
        print_json({"schema": "glmq.clean/1", "runs": [_row(one, removed) for one in found]})
    else:
        _show(found, removed, looked_in, yes=yes)


def _row(one: Leftover, removed: Sequence[Leftover]) -> dict[str, object]:
    return {
        "path": str(one.path),
        "state": one.state.value,
        "verb": one.verb or None,
        "bytes": one.nbytes,
        "age_seconds": one.age_seconds,
        "resume": one.command or None,
        "removed": one in removed,
    }


def _show(found: Sequence[Leftover], removed: Sequence[Leftover], folders: Sequence[Path], *, yes: bool) -> None:
    from shlex import join

    from glmq.cli.console import stdout
    from glmq.jobs.clean import State

    for one in found:
        stdout.say(_describe(one, is_removed=one in removed), hang=2)
        if one.command and one not in removed and one.state is State.UNFINISHED:
            stdout.print(f"  to continue: {one.command}", soft_wrap=True)
    chosen = removed if yes else [one for one in found if one.state is State.UNFINISHED]
    total = f"{counted(len(chosen), 'unfinished run')}, {size(sum(one.nbytes for one in chosen))}"
    if not found:
        stdout.say(f"no unfinished run in {', '.join(str(folder.absolute()) for folder in folders)}")
    elif yes:
        stdout.print(f"{total}: removed")
    elif chosen:
        command = join(["glmq", "clean", *map(str, folders), "--yes"])
        stdout.print(f"{total}; to remove {'it' if len(chosen) == 1 else 'them'}: {command}", soft_wrap=True)


def _describe(one: Leftover, *, is_removed: bool) -> str:
    """A line for one work folder: what it is, what it takes, and how long nothing was done in it."""
    from glmq.jobs.clean import State, result_of
    from glmq.spec import assert_never

    match one.state:
        case State.UNFINISHED:
            what = "removed" if is_removed else f"unfinished, last changed {_age(one.age_seconds)} ago"
        case State.RUNNING:
            what = "a run is at work in it, so it is left alone"
        case State.FINISHED:
            what = f"the result is whole, move it where you want it: {result_of(one)}"
        case State.REPLACING:
            what = "holds the former contents of its output folder, move them where they belong"
        case State.UNKNOWN:
            what = "does not say which run it is of, so it is left alone; remove it by hand if none is at work"
        case other:
            assert_never(other)
    return f"{one.path}: {one.verb or 'a run'}, {size(one.nbytes)}, {what}"


def _age(seconds: float) -> str:
    from glmq.cli.render import duration

    days = int(seconds // 86400)
    return duration(seconds) if days < 2 else f"{days} days"
