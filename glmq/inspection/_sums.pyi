import numpy as np
from numpy.typing import NDArray

def list_kernels() -> tuple[str, ...]: ...
def sum_pair(
    kernel: str,
    a: NDArray[np.uint8],
    kind_a: int,
    steps_a: NDArray[np.uint8] | None,
    groups_a: int,
    b: NDArray[np.uint8],
    kind_b: int,
    steps_b: NDArray[np.uint8] | None,
    groups_b: int,
    column_scales: NDArray[np.uint8] | None,
    row_scales: NDArray[np.uint8] | None,
    counts: NDArray[np.int64],
    rows: int,
    columns: int,
    /,
) -> tuple[float, float, float, float, int]: ...
