"""Of many changed outputs of quantize, how many does verify find: with checksums, without, and with checksums written anew.

    python tests/benchmarks/mutations.py [--mutations 150] [--types W8A8,W8A8S]

Each tensor of some linears, norms and float tensors is changed in each of a dozen ways, one at a time, and verified against the
float model. Prints how many are found a type and situation, and how many of which kind are not. A change of whole steps of a
sparse type may pass without checksums: docs/verify.md says what may.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import glmq
from glmq.checkpoint.checksums import CHECKSUMS, document_digest, write_checksums
from glmq.checkpoint.reader import Checkpoint
from glmq.model.tiny import TINY_PICTURES
from glmq.quantization.options import Options
from glmq.quantization.recipe import make_recipe
from glmq.verification.checks import verify_files
from glmq.verification.checksums import checksum_of
from glmq.verification.findings import Finding

sys.path.insert(0, str(Path(__file__).parent))
from make_checkpoint import Size, make_checkpoint

TYPES = {
    "W8A8": Options(),
    "W8A8S": Options(w_bit=4, is_lowbit=True, use_sigma=True, torch_dtype="fp16"),
    "W8A8_DYNAMIC": Options(is_dynamic=True),
    "W4A8_DYNAMIC": Options(w_bit=4, is_lowbit=True, is_dynamic=True),
}
SITUATIONS = ("checksums", "none", "written anew")
OWN = (CHECKSUMS, "glmq_report.json", "glmq_report.csv")
LAYER = "model.language_model.layers.0"
CHANGED = (
    f"{LAYER}.self_attn.q_proj.", f"{LAYER}.self_attn.o_proj.", f"{LAYER}.mlp.gate_up_proj.", f"{LAYER}.input_layernorm.",
    f"{LAYER}.post_attention_layernorm.", f"{LAYER}.mlp.down_proj.", "model.visual.blocks.0.attn.qkv.", "lm_head.",
)  # fmt: skip
Change = Callable[[Tensor], Tensor]


def scaled(factor: float) -> Change:
    return lambda t: (t.double() * factor).to(t.dtype)


def one(change: Change) -> Change:
    """The change of one value in the middle."""

    def changed(t: Tensor) -> Tensor:
        flat = t.clone().reshape(-1)
        middle = flat.numel() // 2
        flat[middle : middle + 1] = change(flat[middle : middle + 1])
        return flat.reshape(t.shape)

    return changed


def flipped(bit: int) -> Change:
    """One bit of the last byte of the value, the lowest or the highest of little-endian numbers."""

    def changed(t: Tensor) -> Tensor:
        view = t.clone().reshape(-1).view(torch.uint8)
        view[0 if bit == 0 else -1] ^= 1 << bit
        return view.view(t.dtype).reshape(t.shape)

    return changed


CHANGES: dict[str, Change] = {
    "all times 1.02": scaled(1.02),
    "all times 2": scaled(2),
    "all halved": scaled(0.5),
    "one doubled": one(scaled(2)),
    "one halved": one(scaled(0.5)),
    "one negated": one(scaled(-1)),
    "one zeroed": one(torch.zeros_like),
    "all zeroed": torch.zeros_like,
    "lowest bit of one": one(flipped(0)),
    "highest bit of one": one(flipped(7)),
    "moved by one": lambda t: t.roll(1, 0) if t.numel() == t.shape[0] else t.roll(1, t.ndim - 1),
    "one more": lambda t: t + 1,
}


def mutations(tensors: dict[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """(tensor, change, changed tensor) of every change that changes something."""
    for name in sorted(tensors):
        if name.startswith(CHANGED):
            for label, change in CHANGES.items():
                made = change(tensors[name]).contiguous()
                if not torch.equal(made, tensors[name]):  # 0 and -0 are the same
                    yield name, label, made


def prepare(folder: Path, situation: str) -> None:
    """Bring the files beside changed weights into a situation."""
    if situation == "none":
        for name in OWN:
            (folder / name).unlink(missing_ok=True)
    if situation == "written anew":
        with Checkpoint.open(folder) as checkpoint:
            sums = {name: checksum_of(checkpoint, name) for name in checkpoint}
        report = json.loads((folder / OWN[1]).read_text())
        report["checksums"] = document_digest(sums)
        report["linears"] = []  # nothing that the integers could contradict
        (folder / OWN[1]).write_text(json.dumps(report))
        (folder / CHECKSUMS).unlink()
        write_checksums(folder, sums, {})


def measure(reference: Path, good: Path, work: Path, most: int) -> None:
    tensors = load_file(next(good.glob("*.safetensors")))
    every = list(mutations(tensors))
    chosen = every[:: max(1, len(every) // most)]
    for situation in SITUATIONS:
        missed: Counter[str] = Counter()
        for name, label, made in chosen:
            folder = Path(shutil.copytree(good, work / "damaged"))
            path = next(folder.glob("*.safetensors"))
            save_file({**tensors, name: made}, path, metadata={"format": "pt"})
            prepare(folder, situation)
            found = [record for record in verify_files(folder, reference, []) if isinstance(record, Finding)]
            if not any(finding.severity == "error" for finding in found):
                missed[f"{name.rpartition('.')[2]}: {label}"] += 1
            shutil.rmtree(folder)
        print(f"| {good.name} | {situation} | {len(chosen)} | {len(chosen) - missed.total()} |", flush=True)
        for what, count in sorted(missed.items()):
            print(f"    not found: {what} ({count})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=150, help="at least so many a type, where there are so many")
    parser.add_argument("--types", default=",".join(TYPES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        work = Path(root)
        make_checkpoint(work / "float", Size())
        calibration = glmq.CalibrationOptions(images=TINY_PICTURES, limit=2)
        stats = glmq.calibrate(work / "float", out=work / "stats", options=calibration).folder
        print("| type | checksums | changes | found |\n|---|---|---|---|")
        for name in options.types.split(","):
            good = glmq.quantize(work / "float", stats, out=work / name, recipe=make_recipe(TYPES[name])).folder
            measure(work / "float", good, work, options.mutations)


if __name__ == "__main__":
    main()
