"""Whether two installations of glmq write the same bytes: every type, form and codec, on the embedded model.

    python tests/benchmarks/same_bytes.py BEFORE/bin/glmq AFTER/bin/glmq

prints each output with its number of files, and those that differ. Files that describe a run, rather than what it made
(checksums, manifests, reports), are compared as JSON without the keys that name versions and digests of each other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from glmq.model.tiny import TINY_CHECKPOINT, TINY_PICTURES

SPARSE = ("--w_bit", "4", "--is_lowbit", "True", "--torch_dtype", "fp16")
QUANTIZE = {
    "w8a8": (),
    "w8a8-fp16-minmax": ("--torch_dtype", "fp16", "--act_method", "1"),
    "w8a8-mindie": ("--mindie_format", "True"),
    "w8a8-smooth": ("--do_smooth", "True"),
    "w8a8-shards": ("--part_file_size", "1MB"),
    "w8a8-bits": ("--target_bits", "6.5"),
    "w8a8-down": ("--layer", "*.mlp.down_proj=W8A8_DYNAMIC"),
    "dynamic": ("--is_dynamic", "True"),
    "dynamic-mindie": ("--is_dynamic", "True", "--mindie_format", "True"),
    "w4a8": ("--w_bit", "4", "--is_lowbit", "True", "--is_dynamic", "True"),
    "sigma": (*SPARSE, "--use_sigma", "True"),
    "sigma-mindie": (*SPARSE, "--use_sigma", "True", "--mindie_format", "True"),
    "sigma-bits": (*SPARSE, "--use_sigma", "True", "--target_bits", "2.94"),
    "sigma-reference": (*SPARSE, "--use_sigma", "True", "--method", "reference"),
    "sigma-fallback": (*SPARSE, "--use_sigma", "True", "--fallback_topk", "2"),
    "fraction": (*SPARSE, "--fraction", "0.02"),
    "co_sparse": ("--w_bit", "8", "--co_sparse", "True", "--torch_dtype", "fp16"),
    "plain": (*SPARSE, "--use_sigma", "True", "--method", "plain", "--anti_method", "none"),
}
COMPRESS = {
    "portable": ("--codec", "portable"),
    "portable-tp2": ("--codec", "portable", "--tp", "2"),
}
VERSION_KEYS = {"glmq", "schema", "checksums", "digest", "files", "fingerprint", "source"}
"""Keys of the documents about a run whose values name versions and other documents."""


def run(program: Path, *args: object) -> None:
    done = subprocess.run([program, *map(str, args), "-q"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{program} {' '.join(map(str, args))}: exit code {done.returncode}\n{done.stderr}")


def digests(folder: Path) -> dict[str, str]:
    """By file: its sha256, or that of its JSON without versions where it describes the run."""
    found: dict[str, str] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.name.startswith("glmq_") and path.suffix == ".json":
            document = json.loads(data)
            data = json.dumps({k: v for k, v in document.items() if k not in VERSION_KEYS}, sort_keys=True).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", nargs="+", default=[*QUANTIZE, *COMPRESS, "decompressed"])
    a = parser.parse_args()
    outputs = differing = 0
    with tempfile.TemporaryDirectory() as text:
        sides = {label: (Path(text) / label, program) for label, program in (("before", a.before), ("after", a.after))}

        def both(label: str, *args: object) -> None:
            """Run both programs; `{}` in an argument stands for the program's own folder."""
            nonlocal outputs, differing
            for folder, program in sides.values():
                folder.mkdir(exist_ok=True)
                run(program, *(str(arg).replace("{}", str(folder)) for arg in args))
            old, new = (digests(folder / label) for folder, _ in sides.values())
            changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
            outputs += 1
            differing += bool(changed)
            print(
                f"{label:18} {len(new):3} files  {'DIFFER: ' + ', '.join(changed) if changed else 'the same'}",
                flush=True,
            )

        # The bytes of statistics may change with their schema, so both quantize from their own.
        both(
            "stats",
            "calibrate",
            "--model-path",
            TINY_CHECKPOINT,
            "--calib-images",
            TINY_PICTURES,
            "--stats",
            "{}/stats",
        )
        base = ("quantize", "--model_path", TINY_CHECKPOINT, "--stats", "{}/stats", "--save_directory")
        for label, options in QUANTIZE.items():
            if label in a.only or (label == "sigma" and not {*COMPRESS, "decompressed"}.isdisjoint(a.only)):
                both(label, *base, f"{{}}/{label}", *options)
        for label, options in COMPRESS.items():
            if label in a.only or (label == "portable" and "decompressed" in a.only):
                both(label, "compress", "{}/sigma", f"{{}}/{label}", *options)
        if "decompressed" in a.only:
            both("decompressed", "compress", "--decompress", "{}/portable", "{}/decompressed")
    print(f"{outputs} outputs, {differing} differ")


if __name__ == "__main__":
    main()
