"""Hostile files against every reader of glmq, in this process.

    python tests/benchmarks/fuzz_readers.py [--count N] [--seed N] [--only READER ...]

Each input is a good file with some of its bytes, or of its JSON values, replaced. A reader may return something, or raise an
error of glmq with exit code 4 or 5 and one visible line; another exception, more than 10 seconds of processor time, more than
1 GB, or a file that was not there before is a failure, which is printed with its seed, and the exit status is 1. 20,000 inputs
unless told.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import glmq
from glmq.calibration.samples import list_images, open_image, read_samples
from glmq.calibration.stats import Statistics
from glmq.checkpoint.checksums import read_checksums
from glmq.checkpoint.description import read_description
from glmq.checkpoint.journal import Journal
from glmq.checkpoint.reader import Checkpoint
from glmq.codec.codec import decode, encode
from glmq.compression.restore import read_portable_manifest
from glmq.errors import GlmqError
from glmq.inspection.folder import scan_folder
from glmq.inspection.listing import tensor_rows
from glmq.model.config import read_config
from glmq.model.inputs import Preprocessor
from glmq.model.tiny import TINY_CHECKPOINT, TINY_PICTURES

SECONDS = 10.0
BYTES = 2**30


@dataclass(frozen=True)
class Reader:
    """One reader, and the file of a good folder that is altered for it."""

    folder: str
    """The good folder: model, stats, quantized, packed, or samples."""
    file: str
    """A pattern; the first that matches in the folder."""
    read: Callable[[Path], object]
    """Takes the folder."""
    weight: int = 4
    """How often, against the others: slow ones less."""


def _open_checkpoint(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        for name in list(checkpoint)[:3]:
            checkpoint.read(name)


def _open_statistics(folder: Path) -> None:
    statistics = Statistics.open(folder)
    statistics.samples()
    statistics.settled()
    for site in list(statistics.manifest.get("inputs") or [])[:2]:  # type: ignore[arg-type]
        statistics.input(site)


def _open_images(folder: Path) -> None:
    for sample in list_images(folder, "?", skip_bad=False, limit=None).samples:
        open_image(sample)


def _open_lines(folder: Path) -> None:
    read_samples(folder / "lines.jsonl", limit=None)


def _preprocess(folder: Path) -> None:
    preprocessor = Preprocessor(folder, read_config(folder), max_pixels=None, trust_remote_code=False)
    preprocessor.encode(Image.new("RGB", (56, 56)), "What is it?", "A cat.")


def _scan(folder: Path) -> None:
    tensor_rows(scan_folder(folder))


READERS: Mapping[str, Reader] = {
    "weights": Reader("model", "*.safetensors", _open_checkpoint),
    "weights scanned": Reader("model", "*.safetensors", _scan),
    "index": Reader("model", "*.index.json", _open_checkpoint),
    "config": Reader("model", "config.json", read_config),
    "config scanned": Reader("quantized", "config.json", _scan),
    "tokenizer config": Reader("model", "tokenizer_config.json", _preprocess, 1),
    "tokenizer": Reader("model", "tokenizer.json", _preprocess, 1),
    "processor": Reader("model", "preprocessor_config.json", _preprocess, 1),
    "template": Reader("model", "chat_template.jinja", _preprocess, 1),
    "description": Reader("quantized", "quant_model_description.json", read_description),
    "description scanned": Reader("quantized", "quant_model_description.json", _scan),
    "checksums": Reader("quantized", "glmq_checksums.json", read_checksums),
    "verified weights": Reader("quantized", "*.safetensors", glmq.verify, 1),
    "verified description": Reader("quantized", "quant_model_description.json", glmq.verify, 1),
    "verified report": Reader("quantized", "glmq_report.json", glmq.verify, 1),
    "manifest": Reader("packed", "glmq_manifest.json", read_portable_manifest),
    "verified manifest": Reader("packed", "glmq_manifest.json", glmq.verify, 1),
    "statistics": Reader("stats", "statistics.json", _open_statistics),
    "statistics shard": Reader("stats", "*.safetensors", _open_statistics),
    "journal": Reader("samples", "journal.jsonl", lambda folder: Journal(folder, {"model": "a"}, writes=False)),
    "lines": Reader("samples", "lines.jsonl", _open_lines),
    "picture": Reader("pictures", "*.png", _open_images),
    "codec": Reader("samples", "matrix.gqsc", lambda folder: decode((folder / "matrix.gqsc").read_bytes()), 2),
}

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**20, -(10**400), 0.5, -0.0, 1e308, "", "x", "\x1b[31m", "\n", "\ud800", "²",
    "9" * 5000, "../../etc/passwd", "/dev/zero", "a" * 100_000, [], {}, [[]], [None] * 1000, {"": {}}, [1, "a"], "\u202e",
)  # fmt: skip
WORDS = (
    b"NaN",
    b"Infinity",
    b"1e999",
    b'"\\ud800"',
    b"[" * 3000,
    b'{"a":' * 3000,
    b"9" * 6000,
    b"\x00",
    b"\xff\xfe",
    b"{{",
    b"{% for x in y %}",
)


def _altered_json(document: Any, rng: random.Random) -> Any:
    """The document with one of its values, keys or lengths replaced."""
    places: list[tuple[Any, Any]] = []
    stack = [document]
    while stack and len(places) < 20_000:
        value = stack.pop()
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in list(items):
            places.append((value, key))
            stack.append(inner)
    if not places:
        return rng.choice(ODD)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        holder, key = rng.choice(places)
        try:
            match rng.randrange(4):
                case 0:
                    del holder[key]
                case 1 if isinstance(holder, dict):
                    holder[str(rng.choice(ODD))] = holder.pop(key)
                case _:
                    holder[key] = rng.choice(ODD)
        except (KeyError, IndexError):
            continue
    return document if rng.random() < 0.97 else rng.choice(ODD)


def alter(data: bytes, name: str, rng: random.Random) -> bytes:
    """A hostile version of a file."""
    if name.endswith(".json") and rng.random() < 0.6:
        return json.dumps(_altered_json(json.loads(data), rng)).encode("utf-8", "surrogatepass")
    changed = bytearray(data)
    head = min(len(changed), 4096) if rng.random() < 0.7 else len(changed)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(head) if head else 0
        match rng.randrange(7):
            case 0:
                del changed[at:]
            case 1:
                changed[at : at + rng.choice((1, 4, 8))] = rng.randbytes(rng.choice((1, 4, 8)))
            case 2:
                changed[at:at] = rng.choice(WORDS)
            case 3 if changed:
                changed[min(at, len(changed) - 1)] ^= 1 << rng.randrange(8)
            case 4:
                changed[:8] = rng.choice((0, 1, 2**20, 2**40, 2**64 - 1)).to_bytes(8, "little")
            case 5:
                del changed[at : at + rng.randrange(64)]
            case _:
                changed += rng.choice(WORDS) * rng.choice((1, 100))
    return bytes(changed)


def make_good(root: Path, model: Path = TINY_CHECKPOINT) -> None:
    """The folders that inputs are made from, of this float model."""
    shutil.copytree(model, root / "model", ignore=shutil.ignore_patterns("cases", "pictures"))
    (root / "pictures").mkdir()
    for path in sorted(TINY_PICTURES.iterdir())[:2]:
        shutil.copy(path, root / "pictures")
    glmq.calibrate(root / "model", out=root / "stats", images=root / "pictures")
    recipe = glmq.Recipe.w8a8s(sigma=3.0)
    glmq.quantize(root / "model", root / "stats", out=root / "quantized", recipe=recipe)
    glmq.compress(root / "quantized", out=root / "packed", tp=1, codec="portable")
    samples = root / "samples"
    samples.mkdir()
    shutil.copy(root / "pictures" / "00.png", samples)
    asked = [{"type": "image", "image": "00.png"}, {"type": "text", "text": "What?"}]
    lines = (
        {"image": "00.png", "prompt": "What?", "text": "A."},
        {"text": "Only text."},
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "A."}]},
        {"image": "", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A."}]},
    )
    (samples / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    journal = Journal(samples, {"model": "a"}, writes=True)
    for block in ("first", "second"):
        journal.record(block, {"reports": [1, 2.5, {"a": "b"}]})
    for path in samples.glob(".*"):
        path.rename(samples / "journal.jsonl")
    matrix = np.random.default_rng(0).normal(0, 20, (64, 96)).clip(-128, 127).astype(np.int8)
    (samples / "matrix.gqsc").write_bytes(encode(matrix))


def _seconds() -> float:
    """Of processor time, child processes included: what a busy machine takes longer for is no fault of a reader."""
    return sum(os.times()[:4])


def problem(reader: Reader, folder: Path) -> str | None:
    """What is wrong with how a reader takes a folder; None: nothing."""
    before = sorted(str(path) for path in folder.rglob("*"))
    peak, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, _seconds()
    found = None
    try:
        reader.read(folder)
    except GlmqError as error:
        text = str(error)
        if error.exit_code not in (4, 5):
            found = f"exit code {error.exit_code}: {text[:300]}"
        elif len(text.splitlines()) != 1 or len(text) > 2100 or any(ord(char) < 32 for char in text):
            found = f"not one visible line: {text[:300]!r}"
    except (Exception, SystemExit) as error:
        found = f"{type(error).__name__}: {str(error)[:300]}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        found = f"{type(error).__name__}: {str(error)[:300]}"
    seconds = _seconds() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    if found is None and seconds > SECONDS:
        found = f"took {seconds:.1f} s"
    if found is None and grown > BYTES:
        found = f"took {grown / 2**20:.0f} MiB"
    if found is None and sorted(str(path) for path in folder.rglob("*")) != before:
        found = "left files behind"
    return found


def fuzz(good: Path, work: Path, seeds: range, only: list[str] | None = None) -> Iterator[tuple[str, int, str | None]]:
    """Give each seed's input to its reader; yields the reader's name, the seed and what went wrong."""
    names = [name for name, reader in READERS.items() if not only or name in only for _ in range(reader.weight)]
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice(names)
        reader = READERS[name]
        folder = work / "input"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good / reader.folder, folder, copy_function=_link)
        path = sorted(folder.glob(reader.file))[0]
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(alter(data, path.name, rng))
        yield name, seed, problem(reader, folder)


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="+", choices=READERS)
    a = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    inputs: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as text:
        root = Path(text)
        make_good(root)
        for name, seed, found in fuzz(root, root, range(a.seed, a.seed + a.count), a.only):
            inputs[name] += 1
            if found is not None:
                failures[name] += 1
                print(f"{name}, seed {seed}: {found}", flush=True)
    for name, count in sorted(inputs.items()):
        print(f"{name:22} {count:6} inputs, {failures[name]} failures")
    print(f"{inputs.total()} inputs, {failures.total()} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
