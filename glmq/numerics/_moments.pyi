import numpy as np
from numpy.typing import NDArray

def list_kernels() -> tuple[str, ...]: ...
def observe(
    kernel: str,
    x: NDArray[np.float32],
    scales: NDArray[np.float32],
    counts: NDArray[np.int32],
    sums: NDArray[np.float64],
    tokens: int,
    channels: int,
    first: int,
    end: int,
    /,
) -> None: ...
