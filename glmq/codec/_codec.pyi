import numpy as np
from numpy.typing import NDArray

def list_kernels() -> tuple[str, ...]: ...
def choose_tables(matrix: NDArray[np.int8], rows: int, cols: int, /) -> tuple[bytes, bytes, bytes]: ...
def count_values(matrix: NDArray[np.int8], /) -> bytes: ...
def encode_tiles(
    kernel: str,
    tiles: NDArray[np.int8],
    height: int,
    cols: int,
    ids: NDArray[np.uint8],
    table: NDArray[np.uint32],
    /,
) -> list[tuple[bytes, int]]: ...
def decode_tiles(
    kernel: str,
    file: NDArray[np.uint8],
    jobs: NDArray[np.int64],
    cols: int,
    ids: NDArray[np.uint8],
    table: NDArray[np.uint32],
    out: NDArray[np.int8],
    /,
) -> int: ...
