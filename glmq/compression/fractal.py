"""ND -> NZ: the order in which the NPU's matrix unit reads an int8 weight, as the vendor's compress program wants it.

The matrix is cut into fractals of 16 rows x 32 columns, each 512 bytes in row order. Fractals follow each other down a column
of fractals, then on to the next column: [n1, 16, k1, 32] transposed to [k1, n1, 16, 32]. Rows and columns that the matrix
lacks to whole fractals are zeros.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

ROWS: Final = 16
COLS: Final = 32


def count_fractals(rows: int, cols: int) -> tuple[int, int]:
    """How many fractals lie along the columns and along the rows of a matrix: (k1, n1)."""
    return -(-cols // COLS), -(-rows // ROWS)


def to_nz(matrix: NDArray[np.int8]) -> NDArray[np.int8]:
    """int8 [rows, cols] -> int8 [k1, n1, 16, 32], contiguous; what is added is 0. May share its memory."""
    rows, cols = matrix.shape
    k1, n1 = count_fractals(rows, cols)
    if (rows, cols) != (n1 * ROWS, k1 * COLS):
        padded = np.zeros((n1 * ROWS, k1 * COLS), dtype=np.int8)
        padded[:rows, :cols] = matrix
        matrix = padded
    return np.ascontiguousarray(matrix.reshape(n1, ROWS, k1, COLS).transpose(2, 0, 1, 3))
