"""All that is measured, one module for each group; each has `WORKS`."""

from __future__ import annotations

from island_fast.bench.case import Work
from island_fast.bench.cases import attached, depth, full, increments, kernels, maps, memory, sizes, upload

__all__ = ["ALL"]

ALL: tuple[Work, ...] = (
    *increments.WORKS,
    *full.WORKS,
    *depth.WORKS,
    *maps.WORKS,
    *kernels.WORKS,
    *sizes.WORKS,
    *memory.WORKS,
    *upload.WORKS,
    *attached.WORKS,
)
