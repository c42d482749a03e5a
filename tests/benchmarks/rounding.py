"""What error compensation costs for one linear of the real width, beside reading its weights and running it.

    python tests/benchmarks/rounding.py [--columns 4096] [--rows 4096 27392] [--tokens 3000]

Prints seconds, FLOPs and the share of this machine's float32 matrix rate, which F.linear shows on the same shapes in the same
run. The factor is made once for all linears that share an input.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from process import best_seconds
from safetensors.torch import load_file, save_file
from torch import Tensor

from glmq.numerics import gptq
from glmq.numerics.hessian import factor, shrunk_correlation
from glmq.spec import INT8


def read_seconds(weight: Tensor) -> float:
    """Reading a bfloat16 weight from the page cache and widening it, as quantize does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.safetensors"
        save_file({"w": weight.bfloat16()}, path)
        return best_seconds(lambda: load_file(path)["w"].float())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 27392])
    parser.add_argument("--tokens", type=int, default=3000)
    a = parser.parse_args()
    k = a.columns
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(a.tokens, k, generator=generator)
    x += torch.randn(a.tokens, 64, generator=generator) @ torch.randn(64, k, generator=generator)
    moment = shrunk_correlation(x.T @ x / a.tokens, x.square().mean(0).sqrt())
    found = factor(moment)
    seconds = best_seconds(lambda: factor(moment), 2)
    flops = k**3  # two thirds for the order, one third for the Cholesky factor
    print(f"{torch.get_num_threads()} threads, kernel {gptq.rounding_kernel()}, {a.tokens} tokens")
    print(f"factor of {k} columns: {seconds:.2f} s, {flops / 1e9:.0f} GFLOP, {flops / seconds / 1e9:.0f} GFLOP/s")
    for rows in a.rows:
        weight = torch.randn(rows, k, generator=generator)
        step = torch.full((rows, 1), 0.2)
        linear = best_seconds(lambda w=weight: torch.nn.functional.linear(x, w))
        rate = 2 * a.tokens * rows * k / linear
        rounding = best_seconds(lambda w=weight, s=step: gptq.round_compensated(w, s, found, INT8), 2)
        flops = rows * k * k
        reading = read_seconds(weight)
        print(
            f"{rows} x {k}: rounding {rounding:.2f} s, {flops / 1e9:.0f} GFLOP, {flops / rounding / 1e9:.0f} GFLOP/s, "
            f"{flops / rounding / rate:.0%} of F.linear's {rate / 1e9:.0f}; reading {reading:.2f} s, products with the tokens "
            f"{linear:.2f} s: rounding takes {rounding / (reading + linear):.1f} times both"
        )


if __name__ == "__main__":
    main()
