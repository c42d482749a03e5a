"""Calibration samples: a folder of images or a JSON-lines file -> a sorted, hashed, checked list."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from PIL import Image

from glmq.calibration.lines import Left, LineError, OptionNames, check_prompt, parse_line, shortened
from glmq.calibration.picture_folder import list_entries
from glmq.calibration.pictures import (
    IMAGE_SUFFIXES,
    NO_FILE,
    Examined,
    InlinePicture,
    PictureFile,
    PictureRules,
    examine_picture,
    load_picture,
)
from glmq.calibration.samples_file import documents
from glmq.errors import PictureError, SampleError
from glmq.quoting import file_text
from glmq.wording import counted

WANTED_IMAGES: Final = 30
"""Calibration images that good accuracy takes: with fewer the command still runs, and says so where it matters."""
CALIBRATION_NAMES: Final = OptionNames("--calib-samples", "--skip-bad-images")
_LISTED: Final = 5
"""Bad files and lines that a message names."""


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """The float model's own answer to a sample."""

    ids: tuple[int, ...]
    """Tokens, without the end token."""
    text: str
    """The tokens decoded, without special tokens."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One calibration sample as the user gave it, before it is tokenized."""

    name: str
    """What messages and reports call it: the image's file name, or file:line for a JSON line."""
    image: PictureFile | None
    prompt: str | None
    answer: str | None
    digest: str
    """sha256 over the image's bytes, the prompt and the answer."""
    generated: GeneratedAnswer | None = None
    """Stands for the answer of a sample that has none."""
    is_builtin: bool = False
    """One of the texts that come with glmq."""

    @property
    def has_answer(self) -> bool:
        """Whether calibration runs over an answer, the sample's own or a generated one."""
        return self.answer is not None or self.generated is not None


@dataclass(frozen=True, slots=True)
class Rejected:
    """What cannot be a calibration sample, and why."""

    name: str
    """Of the file or line."""
    reason: str


@dataclass(frozen=True, slots=True)
class SampleSet:
    """What was found: samples in a fixed order, and what was left out."""

    samples: tuple[Sample, ...]
    rejected: tuple[Rejected, ...]
    notes: tuple[str, ...] = ()
    """What the user should know of them, a sentence each."""


def default_images() -> Path:
    """The folder of 30 pictures that comes with glmq, installed or in a source checkout."""
    package = Path(__file__).parents[1]
    installed = package / "calibImages"
    return installed if installed.is_dir() else package.parent / "calibImages"


def builtin_texts() -> tuple[Sample, ...]:
    """The short conversations that come with glmq, without images.

    Most tokens of a model that reasons before it answers are text, which pictures alone do not bring into the statistics.
    These are lists, tables, code, mathematics and reasoning, in English and Chinese.
    """
    found = read_samples(Path(__file__).with_name("texts.jsonl"), limit=None).samples
    return tuple(replace(sample, is_builtin=True) for sample in found)


def list_images(
    directory: Path,
    prompt: str,
    *,
    skip_bad: bool,
    limit: int | None,
    recursive: bool = False,
    rules: PictureRules = PictureRules(),
    names: OptionNames = CALIBRATION_NAMES,
    read: Callable[[int], None] = lambda count: None,
) -> SampleSet:
    """One sample per image of the folder, sorted by name, each with the same prompt.

    Hidden files, those that systems leave in folders of pictures, and files whose name says that they are text or data are
    passed over silently; anything else that cannot be used is rejected. With a limit no file is read behind the last that
    is needed.

    Args:
        directory: of the images.
        prompt: of every sample.
        skip_bad: leave out what cannot be used, instead of stopping.
        limit: use only the first images, this many.
        recursive: enter sub-folders, in their place among the names.
        rules: for images.
        names: of the options, for messages.
        read: is called after each file with how many were read.

    Raises:
        SampleError: no such folder, no image in it, a rejected file without `skip_bad`, or a prompt that is no UTF-8.
    """
    check_prompt("the prompt", prompt)
    if not directory.is_dir():
        what = (
            "is a file; give the folder of the images"
            if directory.exists()
            else "no such folder; give a folder of images"
        )
        raise SampleError(f"{directory}: {what} as --calib-images, or a list of samples as {names.lines}")
    samples: list[Sample] = []
    rejected: list[Rejected] = []
    deep: list[str] = []
    folders: list[str] = []
    for path in list_entries(directory, recursive=recursive):
        name = file_text(str(path.relative_to(directory)))
        if path.is_dir():
            folders.append(name)
            continue
        if len(samples) == limit:
            continue
        found = examine_picture(path, rules)
        read(len(samples) + len(rejected) + 1)
        if found.defect is not None:
            rejected.append(Rejected(name, found.defect))
            continue
        samples.append(_sample(name, path, prompt, None))
        if found.is_deep:
            deep.append(name)
    if rejected and not skip_bad:
        raise PictureError(
            f"{directory}: {len(rejected)} of {len(rejected) + len(samples)} files are not usable images: "
            f"{_reasons(rejected)}; remove them" + (f" or pass {names.skip_bad}" if names.skip_bad else "")
        )
    if not samples:
        raise SampleError(f"{directory}: holds no image {_why_none(directory, rejected, folders)}")
    return SampleSet(tuple(samples), tuple(rejected), (*_folder_note(folders), *_deep_note(deep)))


def read_samples(
    path: Path,
    *,
    limit: int | None,
    skip_bad: bool = False,
    rules: PictureRules = PictureRules(),
    names: OptionNames = CALIBRATION_NAMES,
    read: Callable[[int], None] = lambda count: None,
) -> SampleSet:
    """The samples of a file of JSON lines, or of one JSON array, in its order; `lines` says in which layouts.

    With a limit no line is looked at behind the last that is needed.

    Args:
        path: the file; images are relative to its folder.
        limit: use only the first lines, this many.
        skip_bad: leave out lines whose image cannot be used, instead of stopping.
        rules: for images.
        names: of the options, for messages.
        read: is called after each line with how many were read.

    Raises:
        SampleError: no such file, lines that are no samples, or images that cannot be used.
    """
    samples: list[Sample] = []
    bad: list[Rejected] = []
    rejected: list[Rejected] = []
    deep: list[str] = []
    left: Counter[Left] = Counter()
    for name, where, document in documents(path, names.lines):
        if len(samples) == limit:
            break
        read(len(samples) + len(bad) + len(rejected) + 1)
        try:
            if isinstance(document, ValueError):
                raise LineError(f"is not valid JSON ({document})")
            line = parse_line(document)
            image = line.image(path.parent)
        except LineError as error:
            bad.append(Rejected(where, str(error)))
            continue
        found = Examined(None) if image is None else examine_picture(image, rules)
        if found.defect is not None:
            named, defect = shortened(line.images[0]), found.defect
            if defect == NO_FILE and not Path(named).is_absolute():
                defect = f"{NO_FILE} in {path.parent}, from where names of images are followed"
            reason = f"image {named} is not usable ({defect})"
            (rejected if skip_bad else bad).append(Rejected(where, reason))
            continue
        samples.append(_sample(name, image, line.prompt, line.text or None))
        left.update(line.left)
        if found.is_deep:
            deep.append(name)
    if len(bad) == 1:
        raise SampleError(f"{path}, {bad[0].name}: {bad[0].reason}")
    if bad:
        total = len(bad) + len(rejected) + len(samples)
        listed = _listed([f"{line.name} {line.reason}" for line in bad], "; ")
        raise SampleError(f"{path}: {len(bad)} of {total} samples cannot be used: {listed}; correct them")
    if not samples:
        raise SampleError(f"{path}: holds no sample; write one JSON object a line with image, prompt or text")
    notes = tuple(f"{path.name}: of {counted(count, 'sample')} {what.value}" for what, count in left.items())
    return SampleSet(tuple(samples), tuple(rejected), (*notes, *_deep_note(deep)))


def open_image(sample: Sample) -> Image.Image | None:
    """The sample's decoded image in RGB, upright; or None."""
    return None if sample.image is None else load_picture(sample.image)


def digest(samples: Sequence[Sample], generate: int | None) -> str:
    """One hash over all samples in their order, and over how many tokens of answer the model gives to those without one."""
    parts = [s.digest for s in samples] + ([] if generate is None else [f"generate {generate}"])
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _why_none(directory: Path, rejected: Sequence[Rejected], folders: Sequence[str]) -> str:
    """What to do about a folder without a usable image."""
    if rejected:
        return f"that can be used: {_reasons(rejected)}"
    kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
    if folders:
        return (
            f"({kinds} are read); its sub-folders are not entered ({_listed(folders, ', ')}): "
            "give one of them, or --recursive"
        )
    for table in sorted(directory.glob("*.parquet")):
        return f"({kinds} are read) but {table.name}, a table of a data set; save its pictures as files of their own"
    return f"({kinds} are read); put some there, {WANTED_IMAGES} are wanted for accuracy"


def _reasons(rejected: Sequence[Rejected]) -> str:
    return _listed([f"{file.name} ({file.reason})" for file in rejected], "; ")


def _listed(names: Sequence[str], separator: str) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return separator.join(names[:_LISTED]) + more


def _folder_note(folders: Sequence[str]) -> tuple[str, ...]:
    if not folders:
        return ()
    return (
        f"{counted(len(folders), 'sub-folder')} of pictures not entered: {_listed(folders, ', ')}; --recursive enters them",
    )


def _deep_note(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (
        f"{counted(len(names), 'picture')} with more than 8 bits a channel ({_listed(names, ', ')}): values are cut to "
        "0 to 255, as transformers and the engines do, which leaves them nearly white or black; convert them to 8 bits",
    )


def _sample(name: str, image: PictureFile | None, prompt: str | None, answer: str | None) -> Sample:
    sha = hashlib.sha256()
    for part in _parts(image, prompt, answer):
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return Sample(name, image, prompt, answer, sha.hexdigest())


def _parts(image: PictureFile | None, prompt: str | None, answer: str | None) -> Iterator[bytes]:
    match image:
        case None:
            yield b""
        case Path():
            yield image.read_bytes()
        case InlinePicture():
            yield image.data
    yield (prompt or "").encode()
    yield (answer or "").encode()
