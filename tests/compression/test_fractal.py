import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmq.compression.fractal import COLS, ROWS, count_fractals, to_nz


def from_nz(fractals, rows, cols):
    """The inverse of to_nz."""
    k1, n1 = count_fractals(rows, cols)
    return fractals.reshape(k1, n1, ROWS, COLS).transpose(1, 2, 0, 3).reshape(n1 * ROWS, k1 * COLS)[:rows, :cols]


def reference(matrix):
    """One byte at a time: where element (r, c) goes."""
    rows, cols = matrix.shape
    k1, n1 = (cols + 31) // 32, (rows + 15) // 16
    flat = [0] * (k1 * n1 * 512)
    for r in range(rows):
        for c in range(cols):
            flat[((c // 32) * n1 + r // 16) * 512 + (r % 16) * 32 + c % 32] = int(matrix[r, c])
    return np.array(flat, dtype=np.int8)


@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (48, 64), (5, 100), (31, 31)])
def test_fractals_lie_as_the_compress_program_reads_them(shape):
    matrix = np.random.default_rng(7).integers(-128, 128, shape, dtype=np.int8)
    assert to_nz(matrix).tobytes() == reference(matrix).tobytes()


def test_a_matrix_of_zeros_and_one_shows_the_order_of_fractals():
    matrix = np.zeros((32, 64), dtype=np.int8)
    matrix[16, 32] = 1
    fractals = to_nz(matrix)
    assert fractals.shape == (2, 2, 16, 32)
    assert np.argwhere(fractals).tolist() == [[1, 1, 0, 0]]


@given(st.integers(1, 70), st.integers(1, 100), st.integers(0, 2**32))
def test_the_way_back_is_exact(rows, cols, seed):
    matrix = np.random.default_rng(seed).integers(-128, 128, (rows, cols), dtype=np.int8)
    fractals = to_nz(matrix)
    k1, n1 = count_fractals(rows, cols)
    assert fractals.shape == (k1, n1, 16, 32)
    assert fractals.flags.c_contiguous
    assert np.array_equal(from_nz(fractals, rows, cols), matrix)


def test_padding_is_zero():
    fractals = to_nz(np.full((17, 33), 5, dtype=np.int8))
    assert int((fractals == 5).sum()) == 17 * 33
    assert int((fractals == 0).sum()) == fractals.size - 17 * 33
