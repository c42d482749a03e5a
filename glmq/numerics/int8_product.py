"""Exact products of int8 matrices: the platform's own int8 product where it is exact, else float32 products.

float32 products over at most 1024 columns stay within 2^24 (128 * 128 * 1024), where every integer is a float32 number,
so the fast float32 matrix product serves, and the parts are added in float64. More columns go into one part where no
row's magnitudes over them add up to more than 2^17, so that 128 times that is within 2^24 too.

PyTorch's own int8 product, `torch._int_mm`, is not exact on every processor: without the instructions called VNNI its
library adds pairs of products in 16 bits, which saturate. So it is tried on each kind of device before it is used.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from glmq.numerics.rows import row_chunks

EXACT_COLUMNS = 1024
EXACT_LIMIT = 2**24
INT32_COLUMNS = 2**31 // (128 * 128) - 1
"""Columns over which sums of products stay within int32. With a single column PyTorch mistakes rows for columns."""
_CUDA_ROWS = 32
"""CUDA's product wants more than 16 rows, and columns that divide by 8."""


def matmul_int8(xq: Tensor, q: Tensor) -> Tensor:
    """Exact integer product xq . q^T.

    Args:
        xq: int8 [T, K].
        q: int8 [N, K], on the same device.

    Returns:
        float64 [T, N], integer-valued.
    """
    if 1 < q.shape[1] <= INT32_COLUMNS and has_exact_product(q.device.type):
        return _int_product(xq, q).double()
    return _float_product(xq, q)


@cache
def has_exact_product(device_type: str) -> bool:
    """Whether PyTorch's int8 product on this kind of device (`cpu`, `cuda`) is there, is fast and is exact.

    On processors without AVX-512 it is neither fast nor, with AVX2, exact.
    """
    if device_type != "cuda" and not (device_type == "cpu" and "AVX512" in torch.backends.cpu.get_cpu_capability()):
        return False
    generator = torch.Generator().manual_seed(0)
    xq, q = (torch.randint(-128, 128, (n, 300), generator=generator, dtype=torch.int8) for n in (17, 510))
    xq[:2] = torch.tensor([[-128], [127]], dtype=torch.int8)
    q[:2] = xq[:2]
    return torch.equal(_int_product(xq.to(device_type), q.to(device_type)).cpu().long(), xq.long() @ q.long().T)


def _int_product(xq: Tensor, q: Tensor) -> Tensor:
    """int8 [T, K], int8 [N, K] -> int32 [T, N]."""
    tokens, rows = xq.shape[0], q.shape[0]
    if q.is_cuda:
        columns = -q.shape[1] % 8
        xq = torch.nn.functional.pad(xq, (0, columns, 0, max(0, _CUDA_ROWS - tokens)))
        if columns or rows % 8:
            q = torch.nn.functional.pad(q, (0, columns, 0, -rows % 8))
    return torch._int_mm(xq, q.T)[:tokens, :rows]


def _float_product(xq: Tensor, q: Tensor) -> Tensor:
    x = xq.float()
    out = torch.empty(xq.shape[0], q.shape[0], dtype=torch.float64, device=q.device)
    for rows in row_chunks(q):
        part = q[rows].float()
        cuts = _exact_cuts(part)
        if len(cuts) == 1:
            out[:, rows] = x @ part.T
        else:
            out[:, rows] = sum(((x[:, cut] @ part[:, cut].T).double() for cut in cuts), start=torch.zeros(()))
    return out


def _exact_cuts(part: Tensor) -> list[slice]:
    """Runs of columns over which every product of an int8 input with the integer-valued float32 [n, K] stays exact."""
    columns = part.shape[1]
    reach = part.new_zeros(part.shape[0])
    cuts, start = [], 0
    for column in range(0, columns, EXACT_COLUMNS):
        magnitudes = torch.linalg.vector_norm(part[:, column : column + EXACT_COLUMNS], 1, dim=1)
        reach += magnitudes
        if column > start and 128 * float(reach.max()) > EXACT_LIMIT:
            cuts.append(slice(start, column))
            start, reach = column, magnitudes
    return [*cuts, slice(start, columns)]
