"""A folder of pictures: what in it may be one, sorted by name, without what systems and their tools leave there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from glmq.errors import SampleError

_SYSTEM_ENTRIES: Final = frozenset(
    {"thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin"}
)
"""What systems and their tools leave in folders of pictures, in small letters; hidden ones aside.
Windows' attachments of them have a colon on other systems' disks: Thumbs.db:encryptable."""
_TEXT_SUFFIXES: Final = (
    *(".aae", ".csv", ".db", ".htm", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".md5", ".npy", ".npz"),
    *(".parquet", ".py", ".sh", ".sha256", ".toml", ".tsv", ".txt", ".xml", ".xmp", ".yaml", ".yml"),
)
"""Of descriptions, labels and captions beside the pictures."""


def list_entries(directory: Path, *, recursive: bool, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """What lies in a folder of pictures, sorted by name; with `recursive` what its sub-folders hold in their place.

    Args:
        above: folders on the way, links followed, so that a link to one of them is not entered again.

    Raises:
        SampleError: a folder that may not be read.
    """
    try:
        entries = sorted(path for path in directory.iterdir() if not _is_beside(path))
    except OSError as error:
        raise SampleError(f"{directory}: cannot be listed ({error.strerror}); check its permissions") from error
    way = above | {directory.resolve()}
    for path in entries:
        if not (recursive and path.is_dir()):
            yield path
        elif path.resolve() not in way:
            yield from list_entries(path, recursive=True, above=way)


def _is_beside(path: Path) -> bool:
    """Whether an entry of a folder of pictures is none by its name."""
    name = path.name.lower()
    is_system = name.startswith(".") or name.split(":")[0] in _SYSTEM_ENTRIES
    return is_system or (path.suffix.lower() in _TEXT_SUFFIXES and not path.is_dir())
