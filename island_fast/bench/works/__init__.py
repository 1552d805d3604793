"""All that is measured, one module for each group; each has `WORKS`."""

from __future__ import annotations

from island_fast.bench.context import Work
from island_fast.bench.works import attached, depth, increments, kernels, maps, memory, sending, sizes, whole

__all__ = ["ALL"]

ALL: tuple[Work, ...] = (
    *increments.WORKS,
    *whole.WORKS,
    *depth.WORKS,
    *maps.WORKS,
    *kernels.WORKS,
    *sizes.WORKS,
    *memory.WORKS,
    *sending.WORKS,
    *attached.WORKS,
)
