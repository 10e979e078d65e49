"""The arrays that solvers work on, and the number for what is not allowed."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
Flags = NDArray[np.bool_]

INF = float("inf")
