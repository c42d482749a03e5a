"""Which files of a folder hold its weights: what its index says, or all of them but those that trainers leave there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Final

from glmq.checkpoint.header import Header
from glmq.checkpoint.json_file import Fields, read_json_object
from glmq.checkpoint.names import natural_key
from glmq.errors import DamagedError, WrongFolderError
from glmq.wording import list_names, say_absent

INDEX_SUFFIX: Final = ".safetensors.index.json"
SINGLE: Final = "model.safetensors"
BESIDE: Final[Mapping[str, str]] = {
    "adapter_model*.safetensors": "an adapter, which transformers would load over the weights; merge it into them first if "
    "it shall count (peft: merge_and_unload)",
    "value_head*.safetensors": "the value head of a trainer, which no engine reads",
    "optimizer*.safetensors": "the state of a trainer, which no engine reads",
}
"""Weight files that trainers leave beside a checkpoint's own, and what each is."""
SHARD: Final = re.compile(r"(?P<stem>.+)-[0-9]{5}-of-(?P<total>[0-9]{5})\.safetensors")
"""What a file of a checkpoint in several files is called."""
PART_FOLDER: Final = re.compile(r"part([0-9]{1,4})-of-([0-9]{1,4})")
"""What MindIE calls the folder of one rank's weights."""
RANK_FILE: Final = re.compile(r"model-rank-([0-9]{1,4})-part-[0-9]{1,4}\.safetensors")
"""What vLLM-Ascend calls a file of one rank's weights."""
MOST_FOLDERS: Final = 3
"""So many sub-folders are named, of more the first and the last."""


def left_beside(directory: Path) -> dict[str, str]:
    """Weight files of a folder that are not the checkpoint's own but a trainer's -> what each is."""
    return {path.name: what for pattern, what in BESIDE.items() for path in sorted(directory.glob(pattern))}


def bare_files(directory: Path) -> list[Path]:
    """The weight files of a folder without an index, sorted.

    Raises:
        CheckpointError: there are none, or they are the parts of single ranks.
    """
    files = sorted(
        path
        for path in directory.glob("*.safetensors")
        if not path.name.startswith(".") and not any(fnmatchcase(path.name, pattern) for pattern in BESIDE)
    )
    if files and all(RANK_FILE.fullmatch(path.name) for path in files):
        raise _is_cut(directory, [path.name for path in files])
    if not files:
        parts = {path.parent.name for path in directory.glob("part*-of-*/*.safetensors")}
        if parts:
            raise _is_cut(directory, parts)
        raise WrongFolderError(
            f"{directory}: wanted *.safetensors weight files, but there are none; {_found_instead(directory)}"
        )
    check_downloaded(files)
    _check_shards(directory, files)
    return files


def shard_names(stem: str, count: int) -> list[str]:
    """What the files of a checkpoint in several files are called."""
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _check_shards(directory: Path, files: Iterable[Path]) -> None:
    """Raise DamagedError where files are numbered and one of the numbers is not there: no index tells what is in it."""
    names = {path.name for path in files}
    shards = filter(None, map(SHARD.fullmatch, sorted(names)))
    for (stem, total), name in {(shard["stem"], shard["total"]): shard[0] for shard in shards}.items():
        missing = [other for other in shard_names(stem, int(total)) if other not in names]
        if missing:
            raise DamagedError(
                f"{directory}: is incomplete: {name} is one of {int(total)} files, of which {list_names(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not there, nor is their index; download them"
            )


def _is_cut(directory: Path, parts: Iterable[str]) -> WrongFolderError:
    named = list_names(sorted(parts, key=natural_key))
    return WrongFolderError(
        f"{directory}: is quantized already and cut into the parts of single ranks ({named}); give the float model"
    )


def check_downloaded(files: Iterable[Path]) -> None:
    """Raise DamagedError if aria2 has not finished one of the files: it gives them their full size at once."""
    for path in files:
        control = path.with_name(f"{path.name}.aria2")
        if control.exists():
            raise DamagedError(
                f"{control}: says that aria2 has not finished {path.name}; start the same download again, or remove the "
                "file if another program has fetched it whole"
            )


def folders_below(directory: Path, pattern: str) -> str:
    """Which sub-folders hold files like `pattern`, as part of a sentence; empty where none does."""
    holders = {path.parent.name for path in directory.glob(f"*/{pattern}")}
    models = (name for name in holders if not name.startswith(".") and not PART_FOLDER.fullmatch(name))
    names = sorted(models, key=natural_key)
    if not names:
        return ""
    shown = names if len(names) <= MOST_FOLDERS else [names[0], "...", names[-1]]
    return f"its sub-folder{'s' * (len(names) > 1)} {', '.join(shown)} may be meant; give {directory / names[-1]}"


def _found_instead(directory: Path) -> str:
    """What a folder without weight files has in their place, and what to do."""
    for name, what in left_beside(directory).items():
        return f"found {name} alone: {what}"
    others = sorted(path.name for path in directory.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".gguf"})
    if others and others[0].endswith(".gguf"):
        return f"found {others[0]}, which llama.cpp's tools have made; give the float release that it was made from"
    if others:
        return f"found {', '.join(others[:3])}; convert them to safetensors"
    return folders_below(directory, "*.safetensors") or "is this the right folder?"


def read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index: tensor name -> file name, file names without folders."""
    fields = Fields(read_json_object(path), str(path), lambda sentence: DamagedError(f"{sentence}; download it again"))
    weight_map = fields.texts("weight_map")
    if not weight_map:
        raise DamagedError(f"{path}: its weight_map is empty; download it again")
    for name, file in weight_map.items():
        if not file.endswith(".safetensors") or any(char in file for char in "/\\\0"):
            advice = "download it again"
            if file.endswith(".safetensors") and not PurePath(file).is_absolute() and "\0" not in file:
                advice = "move all weight files beside it, and take the folders out of their names"
            raise DamagedError(
                f"{path}: says that {name!r} is in {file!r}, which is no name of a file beside it; {advice}"
            )
    missing = [file for file in sorted(set(weight_map.values())) if not (path.parent / file).is_file()]
    if missing:
        files = "files" if len(missing) > 1 else "file"
        other = SINGLE if (path.parent / SINGLE).is_file() else ""
        choice = f", or remove the index if {other} is the whole model" if other else ""
        raise DamagedError(f"{path}: names {say_absent(missing)}; download the missing {files}{choice}")
    check_downloaded(path.parent / file for file in sorted(set(weight_map.values())))
    return weight_map


def check_index(path: Path, weight_map: Mapping[str, str], headers: Mapping[Path, Header]) -> None:
    """Index and headers must list the same tensors in the same files."""
    for name, file in weight_map.items():
        if name not in headers[path.parent / file].tensors:
            raise DamagedError(f"{path}: says that {name!r} is in {file}, but it is not; download both again")
    for file_path, header in headers.items():
        for name in header.tensors:
            if name not in weight_map:
                raise DamagedError(f"{path}: does not list {name!r}, which is in {file_path.name}; download both again")
