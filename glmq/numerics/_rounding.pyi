import numpy as np
from numpy.typing import NDArray

def list_kernels() -> tuple[str, ...]: ...
def arrange(
    plain: NDArray[np.float32],
    place: NDArray[np.int64],
    ordered: NDArray[np.float32],
    rows: int,
    columns: int,
    padded: int,
    /,
) -> None: ...
def restore(
    plain: NDArray[np.int8],
    place: NDArray[np.int64],
    ordered: NDArray[np.int8],
    rows: int,
    columns: int,
    padded: int,
    /,
) -> None: ...
def round_block(
    kernel: str,
    weight: NDArray[np.float32],
    target: NDArray[np.float32],
    feedback: NDArray[np.float32],
    steps: NDArray[np.float32],
    group: NDArray[np.int32],
    error: NDArray[np.float32],
    q: NDArray[np.int8],
    columns: int,
    rows: int,
    qmin: float,
    qmax: float,
    /,
) -> None: ...
