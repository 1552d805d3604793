"""Names for the types of arrays and buffers. A docstring says what the shape and the unit are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bools", "Buffer", "Bytes2D", "Int64s", "Uint8s", "Uint64s"]

Bools = NDArray[np.bool_]
"""bool[n]."""

Bytes2D = NDArray[np.uint8]
"""uint8[rows, bytes of a row]."""

Int64s = NDArray[np.int64]
"""int64[n], or int64[n, 2] for intervals."""

Uint8s = NDArray[np.uint8]
"""uint8[n]."""

Uint64s = NDArray[np.uint64]
"""uint64[n]: words of a bitmap, or entries of a qcow2 table."""

Buffer = bytes | bytearray | memoryview
"""An object that holds bytes and can be read without a copy."""
