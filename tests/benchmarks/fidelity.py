"""Fidelity on a tiny trained model: the vendor's package, llm-compressor and glmq; same pictures, held-out cases, one judge.

    python tests/benchmarks/fidelity.py --judge judge.py \
        --reference-python vendor/bin/python --reference-runner run_reference.py \
        --llmc-python llmc/bin/python --llmc-runner run_llmcompressor.py \
        [--model FOLDER] [--modes seed W8A8] [--variants pictures answers] [--keep FOLDER]

The model is the embedded one, or one of the same layout that glmq has never seen (train_sibling.py makes such).

Every program is a whole process of its own and is judged by the same script, which knows only the saved tensors. Columns:

    bits     zero-order entropy of the stored integers, per weight
    coded    bytes of glmq's lossless codec over int8 bytes, for anybody's integers
    error    mean over the quantized linears of ||y_q - y|| / ||y||, each fed the float model's own hidden states
    KL       KL(float || quantized), nats, mean over the scored positions
    top-1    share of positions where both prefer the same token
    dNLL     negative log-likelihood of the answers, nats per token, minus the float model's
    CPU s    of the whole processes, which other programs on the machine change less than wall seconds; run with
             OMP_NUM_THREADS=1 to count no idle threads; with glmq calibration and quantization together
    MiB      peak resident memory

`texts` is text that no calibration picture contains. glmq's variants differ in what it is calibrated on: `pictures` alone as
both peers; `default`: and the texts that come with glmq; `generate`: the same with answers by the float model (--generate);
`answers`: the pictures with their true descriptions; `texts`: these and docstrings of Python. No calibration picture or
text is a held-out one, which is asserted.
Peers' checkpoints are kept in --keep and not made again, for they do not change with glmq.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib.util
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

import torch
from PIL import Image
from process import Measured, measure
from safetensors.torch import load_file

from glmq.calibration.samples import builtin_texts
from glmq.codec.codec import encode
from glmq.model.tiny import TINY_CHECKPOINT

GENERATE: Final = 64
DOCSTRINGS: Final = ("argparse", "bisect", "calendar", "csv", "difflib", "fractions", "heapq", "mailbox", "optparse", "pickle",
                     "queue", "sched", "shelve", "statistics", "tarfile", "textwrap")  # fmt: skip
"""Modules of Python whose longest docstrings are the text samples."""
DOCSTRING_CHARACTERS: Final = 600
SHINGLE: Final = 8
"""Words in a row that no calibration text shares with a held-out one."""


@dataclass(frozen=True)
class Mode:
    """One quantization type in the words of both tools."""

    reference: tuple[str, ...]
    glmq: tuple[str, ...]
    share: float | None = None
    """glmq is also run at this share of the bits that the reference takes."""


_LOWBIT: Final = ("--w_bit", "4", "--is_lowbit", "True")
MODES: Final = {
    "seed": Mode(("--w_bit", "4", "--is_lowbit", "--use_sigma"), (*_LOWBIT, "--use_sigma", "True"), 0.75),
    "fraction 0.01": Mode(("--w_bit", "4", "--is_lowbit"), _LOWBIT),
    "co_sparse": Mode(("--w_bit", "4", "--co_sparse"), ("--co_sparse", "True")),
    "W8A8": Mode((), (), 1),
    "W8A8_DYNAMIC": Mode(("--is_dynamic",), ("--is_dynamic", "True"), 1),
    "W4A8_DYNAMIC g64": Mode(
        ("--w_bit", "4", "--is_lowbit", "--is_dynamic", "--closed_outlier", "--group_size", "64"),
        (*_LOWBIT, "--is_dynamic", "True", "--group_size", "64"),
        1,
    ),
    "W4A8_DYNAMIC g256": Mode(
        ("--w_bit", "4", "--is_lowbit", "--is_dynamic", "--closed_outlier", "--group_size", "256"),
        (*_LOWBIT, "--is_dynamic", "True", "--group_size", "256"),
    ),
}
LLMC_MODE: Final = "W8A8_DYNAMIC"
VARIANTS: Final = ("pictures", "default", "generate", "answers", "texts")


@dataclass(frozen=True)
class Judged:
    """What the judge says about one checkpoint on one set of cases."""

    entropy_bits: float
    linear_err: float
    kl: float
    top1: float
    nll_float: float
    nll_quant: float


class Judge:
    """Runs the judge's script in this process, which saves its start for every checkpoint."""

    def __init__(self, path: Path, model: Path) -> None:
        self._model = model
        spec = importlib.util.spec_from_file_location("judge", path)
        assert spec is not None
        assert spec.loader is not None
        self._module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._module)

    def __call__(self, candidate: Path, kind: str) -> Judged:
        """The checkpoint on the model's held-out `images` or `texts`."""
        cases = self._model / "cases" / f"{kind}.jsonl"
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            argv, sys.argv = sys.argv, [
                "judge", str(self._model), str(candidate), "--cases", str(cases), "--json", file.name,
            ]  # fmt: skip
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    self._module.main()
            finally:
                sys.argv = argv
            found = json.load(file)
        assert not found["missing"], found["missing"]
        return Judged(**{field: found[field] for field in Judged.__dataclass_fields__})


def coded_share(candidate: Path) -> float:
    """Bytes of the codec over int8 bytes, all quantized linears of a checkpoint together."""
    before = after = 0
    for path in sorted(candidate.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(".weight") and tensor.dtype == torch.int8:
                second = tensors.get(name.removesuffix("weight") + "weight_scale_second")
                if second is not None and second.shape[0] != tensor.shape[0]:  # two rows of int4 in one of bytes
                    low = ((tensor.to(torch.int16) & 15) ^ 8) - 8
                    tensor = torch.stack([low.to(torch.int8), tensor >> 4], 1).reshape(second.shape[0], -1)
                before += tensor.numel()
                after += len(encode(tensor.contiguous().numpy()))
    return after / before


def write_samples(pictures: Path, folder: Path) -> dict[str, list[str]]:
    """The calibration options of each variant."""
    answers = [json.loads(line) for line in (pictures / "answers.jsonl").read_text().splitlines()]
    for answer in answers:
        answer["image"] = str(pictures / answer["image"])
    texts = [{"text": text} for text in docstrings()]
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (*answers, *texts)))
    images = ["--calib-images", str(pictures)]
    answered = ["--calib-samples", str(pictures / "answers.jsonl")]
    return {
        "pictures": [*images, "--no-texts"],
        "default": images,
        "generate": [*images, "--generate", str(GENERATE)],
        "answers": [*answered, "--no-texts"],
        "texts": ["--calib-samples", str(path), "--no-texts"],
    }


def docstrings() -> Iterator[str]:
    """The first characters of the longest docstring of each module."""
    for name in DOCSTRINGS:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        yield max(docstrings_in(Path(spec.origin)), key=len)[:DOCSTRING_CHARACTERS]


def docstrings_in(path: Path) -> list[str]:
    """Of a file of Python: its own, and those of its classes and functions; empty where there is none."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    return [ast.get_docstring(node) or "" for node in documented]


def check_apart(model: Path) -> None:
    """Calibration pictures and texts are no held-out ones: by digest of the pixels, and by words in a row."""
    folder = model / "cases"
    cases = [json.loads(line) for kind in ("images", "texts") for line in (folder / f"{kind}.jsonl").open()]
    held_out = {pixel_digest(folder / case["image"]) for case in cases if case.get("image")}
    calibration = {pixel_digest(path) for path in sorted((model / "pictures").glob("*.png"))}
    assert held_out, "no held-out picture"
    assert not held_out & calibration, "a calibration picture is held out"
    shared = set().union(*(shingles(case["text"]) for case in cases if not case.get("image")))
    assert shared, "no held-out text"
    builtin = [(sample.name, sample.answer or "") for sample in builtin_texts()]
    for name, text in (*zip(DOCSTRINGS, docstrings(), strict=True), *builtin):
        assert not shared & shingles(text), f"{name} is in a held-out text"


def pixel_digest(path: Path) -> str:
    with Image.open(path) as image:
        return hashlib.sha256(f"{image.size}".encode() + image.convert("RGB").tobytes()).hexdigest()


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


class Table:
    """A Markdown table whose rows are printed as they come."""

    def __init__(self) -> None:
        header = ["mode", "tool", "bits", "coded"]
        for kind in ("images: ", "texts: "):
            header += [f"{kind}error", "KL", "top-1", "dNLL"]
        print(f"| {' | '.join([*header, 'CPU s', 'MiB'])} |")
        print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)

    def row(self, mode: str, tool: str, candidate: Path, judge: Judge, runs: Sequence[Measured]) -> Judged:
        """Judge a checkpoint and print it; returns what was found on the images."""
        images, texts = (judge(candidate, kind) for kind in ("images", "texts"))
        cells = [mode, tool, f"{images.entropy_bits:.2f}", f"{coded_share(candidate):.3f}"]
        for found in (images, texts):
            nll = found.nll_quant - found.nll_float
            cells += [f"{found.linear_err:.4f}", f"{found.kl:.1e}", f"{found.top1:.4f}", f"{nll:+.1e}"]
        cells += [f"{sum(run.cpu_s for run in runs):.0f}", f"{max(run.peak_mib for run in runs):.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
        return images


class Peer:
    """A program beside glmq, run by its own Python once for each set of flags."""

    def __init__(self, name: str, python: Path, runner: Path, model: Path, keep: Path) -> None:
        self.name, self._model = name, model
        self._python, self._runner, self._keep = python.absolute(), runner.resolve(), keep.absolute()
        self._keep.mkdir(parents=True, exist_ok=True)

    def run(self, flags: Sequence[str]) -> tuple[Path, Measured]:
        """The checkpoint of these flags, made now or kept from before."""
        name = "-".join([self.name, *(flag.strip("-") for flag in flags)])
        place, account = self._keep / name, self._keep / f"{name}.json"
        if not account.exists():
            shutil.rmtree(place, ignore_errors=True)
            paths = [str(self._model), str(place), "--images", str(self._model / "pictures")]
            with tempfile.TemporaryDirectory() as scratch:
                done = measure([str(self._python), str(self._runner), *paths, *flags], Path(scratch))
            account.write_text(json.dumps(asdict(done)))
        return place, Measured(**json.loads(account.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", type=Path, required=True)
    for tool in ("reference", "llmc"):
        parser.add_argument(f"--{tool}-python", type=Path)
        parser.add_argument(f"--{tool}-runner", type=Path)
    parser.add_argument("--model", type=Path, default=TINY_CHECKPOINT, help="with its `pictures` and `cases`")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--keep", type=Path, help="folder for the peers' checkpoints")
    a = parser.parse_args()
    model = a.model.absolute()
    check_apart(model)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        keep = a.keep or folder / "peers"
        judge, table = Judge(a.judge, model), Table()
        calibrated: dict[str, Measured] = {}
        for variant, options in write_samples(model / "pictures", folder).items():
            if variant in a.variants:
                stats = ["--model-path", str(model), "--stats", str(folder / variant)]
                calibrated[variant] = measure([sys.executable, "-m", "glmq", "calibrate", *stats, *options], folder)
        for name in a.modes:
            runs = [(name, MODES[name].glmq)]
            if a.reference_python is not None:
                peer = Peer("reference", a.reference_python, a.reference_runner, model, keep)
                try:
                    candidate, done = peer.run(MODES[name].reference)
                except SystemExit as error:
                    print(f"| {name} | reference | does not run: {str(error).splitlines()[-1]} |", flush=True)
                else:
                    found = table.row(name, "reference", candidate, judge, [done])
                    share = MODES[name].share
                    if share is not None:
                        bits = f"{share * found.entropy_bits - 0.005:.2f}"
                        runs.append((f"{name}, {share} x bits", (*MODES[name].glmq, "--target_bits", bits)))
            if a.llmc_python is not None and name == LLMC_MODE:
                peer = Peer("llm-compressor", a.llmc_python, a.llmc_runner, model, keep)
                candidate, done = peer.run(())
                table.row(name, "llm-compressor", candidate, judge, [done])
            for label, flags in runs:
                for variant, calibration in calibrated.items():
                    out = folder / "quantized"
                    command = [
                        sys.executable, "-m", "glmq", "quantize", "--model_path", str(model), "--save_directory", str(out),
                        "--torch_dtype", "fp16", "--stats", str(folder / variant), *flags,
                    ]  # fmt: skip
                    try:
                        done = measure(command, folder)
                    except SystemExit as error:
                        print(f"| {label} | glmq | does not run: {str(error).splitlines()[-1]} |", flush=True)
                        break
                    table.row(label, f"glmq, {variant}", out, judge, [calibration, done])
                    shutil.rmtree(out)


if __name__ == "__main__":
    main()
