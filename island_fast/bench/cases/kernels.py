"""The kernels that look at L2 tables, against the fastest thing that numpy does with so much memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from island_fast import _diff
from island_fast.bench.case import MIB, Context, Work
from island_fast.bench.report import Counter, Row
from island_fast.bench.synthetic_image import scattered
from island_fast.bench.timing import pairs, row, timed
from island_fast.errors import DamagedError

__all__ = ["WORKS"]

_TABLE = 128 * MIB
_PAIRS, _QUICK_PAIRS = 31, 5
_AGAINST = "numpy's sum"

_Words = NDArray[np.uint64]


def _kernels(context: Context) -> Iterator[Row | Counter]:
    size = (_TABLE if not context.quick else _TABLE // 8) // 8
    count = _PAIRS if not context.quick else _QUICK_PAIRS
    draw = np.random.default_rng(context.seed)
    words = np.zeros(size // 64, np.uint64)
    full = ((np.arange(size, dtype=np.uint64) + np.uint64(5)) << np.uint64(16)).byteswap()
    runs = np.zeros(size, np.uint64)
    used = scattered(draw, size, size // 20, max(1, size * 50_000 >> 24))
    runs[used] = full[used]
    moved = np.where(draw.random(size) < 0.01, full ^ np.uint64(1 << 50), full)

    def scan(table: _Words) -> Callable[[], int]:
        return lambda: _diff.mark_allocated(table, 0, 16, words, size)

    def diff(one: _Words, other: _Words) -> Callable[[], int]:
        return lambda: _diff.mark_changed(one, other, 0, 16, words, size)

    for title, work, tables, reach in (
        ("scan of full L2 tables", scan(full), (full,), 0.5),
        ("scan of L2 tables with 50 000 runs in a TiB", scan(runs), (runs,), 0.5),
        ("diff of equal L2 tables", diff(full, full.copy()), (full, moved), 0.5),
        ("diff of L2 tables, 1 % changed", diff(full, moved), (full, moved), 0.4),
    ):
        context.tell(title)
        found = pairs(count, _rate(work, tables), _rate(_sum(tables), tables))
        yield row(
            f"{title}, {size // MIB * 8} MiB each",
            _AGAINST,
            found,
            unit="GB/s",
            reach=None if context.quick else reach,
        )
    if scan(full)() != size or diff(full, moved)() != int(np.count_nonzero(full != moved)):
        raise DamagedError("a kernel counts wrongly; report this fault")


def _rate(work: Callable[[], object], tables: tuple[_Words, ...]) -> Callable[[], float]:
    """Bytes of all tables that a call reads, in 10^9 a second."""
    return lambda: sum(table.nbytes for table in tables) / timed(work) / 1e9


def _sum(tables: tuple[_Words, ...]) -> Callable[[], object]:
    return lambda: [table.sum() for table in tables]


WORKS = (Work("kernels", _kernels),)
