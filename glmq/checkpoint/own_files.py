"""What glmq writes into an output folder: by these names --overwrite knows what it may replace."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from glmq.checkpoint.sidecar import SIDE_FILES
from glmq.errors import OutputError
from glmq.quoting import file_text
from glmq.wording import counted

MARKS: Final = ("glmq_*.json", "statistics.json", "sweep.json", "part*-of-*")
"""Every output has one of them; float checkpoints and those of other tools have none, but for parts."""
WRITTEN: Final = (
    *MARKS, "glmq_*", "glmq.log", "sweep.*", "*.safetensors", "*.safetensors.index.json", "quant_model_description*.json",
    "config.json", "README.md", *SIDE_FILES,
)  # fmt: skip
"""All that lies in one."""


def foreign_names(names: Sequence[str]) -> list[str]:
    """Those of a folder's entries that glmq does not write; all of them where none tells an output of glmq."""
    if not any(_is_one_of(name, MARKS) for name in names):
        return list(names)
    return [name for name in names if not _is_one_of(name, WRITTEN)]


def check_contents(target: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Raise OutputError unless an output folder with these entries may be filled: it is empty, or an output of glmq that
    `overwrite` gives up. What somebody else put there stays: nobody may have a copy."""
    foreign = foreign_names(names)
    if foreign:
        others = f" and {counted(len(foreign) - 1, 'other entry', 'other entries')}" if len(foreign) > 1 else ""
        raise OutputError(
            f"{target}: is not empty, and glmq did not write {file_text(foreign[0])}{others} in it, so that even --overwrite "
            "replaces nothing there; choose another folder, or empty this one yourself"
        )
    if names and not overwrite:
        raise OutputError(f"{target}: is not empty; choose another folder, or pass --overwrite to replace its contents")


def _is_one_of(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
