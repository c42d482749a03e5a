"""`glmq doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

from glmq.cli import options as o
from glmq.cli.help import Tier
from glmq.wording import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from glmq.jobs.doctor import Diagnosis

GIB: Final = 2**30
NAMES: Final = 14
"""Columns of the names of what is shown."""
NO_PROGRAM: Final = "the vendor's program is not found; without it `glmq compress` takes --codec portable alone"


def doctor(
    json_output: Annotated[o.JsonOutput, Tier.USUAL] = False,
    debug: o.Debug = False,
) -> None:
    """Say what of this machine glmq depends on, and what stands in its way: the first thing for a bug report."""
    from dataclasses import asdict

    from glmq.cli.console import stdout
    from glmq.cli.render import print_json
    from glmq.jobs.doctor import diagnose

    found = diagnose()
    if json_output:
        ascend = {**asdict(found.ascend), "set_env": _text(found.ascend.set_env), "driver": _text(found.ascend.driver)}
        print_json({"schema": "glmq.doctor/1", **asdict(found), "ascend": ascend})
        return
    for name, value in _lines(found):
        stdout.say(f"{name:<{NAMES}}{value}", hang=NAMES)
    for problem in found.problems:
        stdout.say(f"warning: {problem}")
    if not found.problems:
        stdout.say("Nothing stands in the way of what runs on the CPU.")


def _lines(found: Diagnosis) -> Iterator[tuple[str, str]]:
    """What is shown of each, by its name."""
    ascend = found.ascend
    yield "glmq", f"{found.glmq}, Python {found.python}"
    for package, version in found.packages.items():
        yield package, version or "not installed"
    yield "platform", found.platform
    yield (
        "processor",
        f"{found.processor}, {counted(found.cores, 'core')}; {' '.join(found.features) or 'none of the known features'}",
    )
    yield "kernels", ", ".join(f"{what}: {kernel}" for what, kernel in found.kernels.items()) or "unknown"
    yield "memory", f"{found.memory_available / GIB:.1f} of {found.memory_total / GIB:.1f} GiB available"
    for folder, free in found.disks.items():
        yield "disk", f"{free / GIB:.1f} GiB free in {folder}"
    yield "CANN", ascend.home or ("installed, not set up" if ascend.set_env else "not found; only NPUs need it")
    yield "driver", _text(ascend.driver) or "not found"
    yield "NPUs", ", ".join(ascend.devices) or "none"
    yield "compress", found.compress_program or NO_PROGRAM


def _text(value: object) -> str | None:
    return None if value is None else str(value)
