"""Peak memory of the seed command against depth: it grows with one block plus the samples, not with the number of layers.

python tests/benchmarks/depth.py [--hidden 1024] [--layers 4 16] [--images 2]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from make_checkpoint import make_checkpoint, text_size
from photographs import link_photographs
from process import SEED, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--images", type=int, default=2)
    a = parser.parse_args()
    print(f"{'layers':>8}{'weights MiB':>14}{'wall s':>10}{'peak MiB':>10}")
    for layers in a.layers:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_checkpoint(folder / "model", text_size(a.hidden, layers))
            weights = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
            paths = ["--model_path", str(folder / "model"), "--save_directory", str(folder / "out")]
            images = ["--calib_images", str(link_photographs(folder / "images")), "--limit", str(a.images)]
            ours = measure([sys.executable, "-m", "glmq", "quantize", *paths, *images, *SEED], folder)
            print(f"{layers:8}{weights / 2**20:14.0f}{ours.wall_s:10.1f}{ours.peak_mib:10.0f}")


if __name__ == "__main__":
    main()
