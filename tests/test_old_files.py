"""Files that earlier versions of glmq wrote stay readable: never made anew."""

from pathlib import Path

import numpy as np

from glmq.codec.codec import decode

FILES = Path(__file__).parent / "old_files"


def test_a_matrix_of_gqsc_1_is_read_by_every_version() -> None:
    row, column = np.arange(40)[:, None], np.arange(70)[None]
    wanted = ((row * 37 + column * column * 11) % 61 - 30) // (1 + column % 7)
    assert np.array_equal(decode((FILES / "matrix-1.gqsc").read_bytes()), wanted)
