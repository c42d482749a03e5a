"""The first call of each of Intel MKL's vector functions, made in one thread before anything is computed.

MKL chooses its code for a function when that is first called. If two threads make this call at once, as torch's do, MKL 2024.2
may lead one of them through another, coarser code, for this call only: about one process in fifty then got other cosines, and
so other statistics, from the same pictures (https://github.com/pytorch/pytorch/issues/188792).
"""

from __future__ import annotations

from typing import Final

import torch

VECTOR_FUNCTIONS: Final = (
    "acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "lgamma", "log", "log10", "log1p",
    "log2", "sin", "sinh", "sqrt", "tan", "tanh",
)  # fmt: skip
"""Names in torch of those that may reach MKL."""


def make_first_calls() -> None:
    """Call each function on one number, in both precisions: a few milliseconds, and too little for torch to share out."""
    for dtype in (torch.float32, torch.float64):
        half = torch.full((1,), 0.5, dtype=dtype)
        for name in VECTOR_FUNCTIONS:
            getattr(torch, name)(half)
