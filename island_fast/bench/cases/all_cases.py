"""All cases, in the order in which they run."""

from __future__ import annotations

from island_fast.bench.case import Case
from island_fast.bench.cases import (
    archivers,
    attached,
    depth,
    full,
    increments,
    kernels,
    maps,
    memory,
    sizes,
    upload,
)

__all__ = ["ALL_CASES"]

ALL_CASES: tuple[Case, ...] = (
    *increments.CASES,
    *full.CASES,
    *archivers.CASES,
    *depth.CASES,
    *maps.CASES,
    *kernels.CASES,
    *sizes.CASES,
    *memory.CASES,
    *upload.CASES,
    *attached.CASES,
)
