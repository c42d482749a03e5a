"""Calibration samples: a folder of images or a JSON-lines file -> a sorted, hashed, checked list."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from PIL import Image

from glmq.checkpoint.disk import read_input
from glmq.checkpoint.json_file import parse_json
from glmq.errors import CheckpointError, SampleError
from glmq.machine import is_out_of_memory

IMAGE_SUFFIXES: Final = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MAX_LINES_BYTES: Final = 256 * 2**20
"""Of a file of samples."""
WANTED_IMAGES: Final = 30
"""Calibration images that good accuracy takes: with fewer the command still runs, and says so where it matters."""


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
    image: Path | None
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
    """A file that cannot be a calibration image, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class SampleSet:
    """What was found: samples in a fixed order, and files that were left out."""

    samples: tuple[Sample, ...]
    rejected: tuple[Rejected, ...]


def default_images() -> Path:
    """The folder of photographs that comes with glmq, installed or in a source checkout."""
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


def list_images(directory: Path, prompt: str, *, skip_bad: bool, limit: int | None) -> SampleSet:
    """One sample per image of the folder, sorted by name, each with the same prompt.

    Text files (.md, .txt, .json, .jsonl) and hidden files are no images and are passed over silently;
    anything else that does not decode is rejected.

    Raises:
        SampleError: no such folder, no image in it, or a rejected file without `skip_bad`.
    """
    if not directory.is_dir():
        raise SampleError(f"{directory}: no such folder; give a folder of images as --calib-images")
    samples: list[Sample] = []
    rejected: list[Rejected] = []
    for path in sorted(p for p in directory.iterdir() if not p.is_dir() and not p.name.startswith(".")):
        if path.suffix.lower() in (".md", ".txt", ".json", ".jsonl"):
            continue
        reason = _image_defect(path)
        if reason is None:
            samples.append(_sample(path.name, path, prompt, None))
        else:
            rejected.append(Rejected(path, reason))
    if rejected and not skip_bad:
        listed = "; ".join(f"{r.path.name} ({r.reason})" for r in rejected[:5])
        more = f" and {len(rejected) - 5} more" if len(rejected) > 5 else ""
        raise SampleError(
            f"{directory}: {len(rejected)} of {len(rejected) + len(samples)} files are not usable images: "
            f"{listed}{more}; remove them or pass --skip-bad-images"
        )
    if not samples:
        raise SampleError(
            f"{directory}: holds no image ({', '.join(s[1:] for s in IMAGE_SUFFIXES)} are read); "
            f"put some there, {WANTED_IMAGES} are wanted for accuracy"
        )
    return SampleSet(tuple(samples[:limit]), tuple(rejected))


def read_samples(path: Path, *, limit: int | None) -> SampleSet:
    """The samples of a JSON-lines file, in its order.

    Each line is an object with `image` (path relative to the file), `prompt` and `text` (the answer); any may be null or
    absent, but not all. A line with `text` alone is plain text.

    Raises:
        SampleError: no such file, a line that is not such an object, or an image that does not decode.
    """
    try:
        raw = read_input(path, MAX_LINES_BYTES)
        lines = raw.decode("utf-8-sig").split("\n")  # splitlines also cuts at U+2028, which JSON may hold
    except CheckpointError as error:
        raise SampleError(str(error)) from error
    except UnicodeDecodeError as error:
        raise SampleError(f"{path}: cannot be read ({error}); give a JSON-lines file as --calib-samples") from error
    if len(raw) > MAX_LINES_BYTES:
        raise SampleError(
            f"{path}: has more than {MAX_LINES_BYTES // 2**20} MiB, which no calibration needs; give fewer or shorter lines"
        )
    samples = tuple(_parse_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip())
    if not samples:
        raise SampleError(f"{path}: holds no sample; write one JSON object a line with image, prompt or text")
    return SampleSet(samples[:limit], ())


def open_image(sample: Sample) -> Image.Image | None:
    """The sample's decoded RGB image, or None."""
    if sample.image is None:
        return None
    with Image.open(sample.image) as image:
        rgb: Image.Image = image.convert("RGB")
        return rgb


def digest(samples: Sequence[Sample], generate: int | None) -> str:
    """One hash over all samples in their order, and over how many tokens of answer the model gives to those without one."""
    parts = [s.digest for s in samples] + ([] if generate is None else [f"generate {generate}"])
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _parse_line(path: Path, number: int, line: str) -> Sample:
    where = f"{path.name}:{number}"
    try:
        fields = parse_json(line)
    except ValueError as error:
        raise SampleError(f"{path}, line {number}: is not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise SampleError(f"{path}, line {number}: is a JSON {type(fields).__name__}, an object is needed")
    unknown = sorted(set(fields) - {"image", "prompt", "text"})
    if unknown:
        raise SampleError(f"{path}, line {number}: unknown key {unknown[0]!r:.60}; known are image, prompt, text")
    for key, value in fields.items():
        if value is not None and not isinstance(value, str):
            raise SampleError(f"{path}, line {number}: {key} is {value!r:.60}, a string or null is needed")
    image, prompt, text = fields.get("image"), fields.get("prompt"), fields.get("text")
    if not (image or prompt or text):
        raise SampleError(f"{path}, line {number}: has neither image nor prompt nor text; give at least one")
    file = None if image is None else path.parent / image
    if file is not None:
        reason = _image_defect(file)
        if reason is not None:
            raise SampleError(f"{path}, line {number}: image {image} is not usable ({reason})")
    return _sample(where, file, prompt, text)


def _sample(name: str, image: Path | None, prompt: str | None, answer: str | None) -> Sample:
    sha = hashlib.sha256()
    for part in _parts(image, prompt, answer):
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return Sample(name, image, prompt, answer, sha.hexdigest())


def _parts(image: Path | None, prompt: str | None, answer: str | None) -> Iterator[bytes]:
    yield b"" if image is None else image.read_bytes()
    yield (prompt or "").encode()
    yield (answer or "").encode()


def _image_defect(path: Path) -> str | None:
    """Why the file cannot be used as an image, or None."""
    try:
        if path.exists() and not path.is_file():
            return "no regular file"  # opening a pipe would wait for somebody to write into it
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        return "no such file"
    except PermissionError:
        return "no permission to read it"
    except Exception as error:  # Pillow's decoders raise whatever a broken file trips over
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: does not decode as an image"
    return None
