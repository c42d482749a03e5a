import numpy as np
from numpy.typing import NDArray

def sum_pair(*arrays_and_numbers: NDArray[np.generic] | int | None) -> tuple[float, float, float, float, int]: ...
