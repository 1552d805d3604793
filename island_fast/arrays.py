"""Types of arrays and buffers, by the names that every room uses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bools", "Buffer", "Bytes2D", "Int64s"]

Bools = NDArray[np.bool_]
"""bool[n]."""

Bytes2D = NDArray[np.uint8]
"""uint8[rows, bytes of a row]."""

Int64s = NDArray[np.int64]
"""int64[n], or int64[n, 2] for intervals."""

Buffer = bytes | bytearray | memoryview
"""What holds bytes, readable without a copy."""
