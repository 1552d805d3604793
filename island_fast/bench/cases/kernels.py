"""The kernels that read L2 tables, against numpy's sum, its fastest pass over as much memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from island_fast import _diff
from island_fast.bench.case import MIB, Case, Context
from island_fast.bench.report import Counter, Row
from island_fast.bench.synthetic_image import scatter_clusters
from island_fast.bench.timing import make_row, run_pairs, time_call
from island_fast.errors import DamagedError

__all__ = ["CASES"]

_TABLE = 128 * MIB
_PAIRS, _QUICK_PAIRS = 31, 5
_AGAINST = "numpy's sum"

_Words = NDArray[np.uint64]


def _measure_kernels(context: Context) -> Iterator[Row | Counter]:
    size = (_TABLE if not context.quick else _TABLE // 8) // 8
    count = _PAIRS if not context.quick else _QUICK_PAIRS
    draw = np.random.default_rng(context.seed)
    words = np.zeros(size // 64, np.uint64)
    full = ((np.arange(size, dtype=np.uint64) + np.uint64(5)) << np.uint64(16)).byteswap()
    runs = np.zeros(size, np.uint64)
    used = scatter_clusters(draw, size, size // 20, max(1, size * 50_000 >> 24))
    runs[used] = full[used]
    moved = np.where(draw.random(size) < 0.01, full ^ np.uint64(1 << 50), full)

    def scan(table: _Words) -> Callable[[], int]:
        return lambda: _diff.mark_allocated(table, 0, 16, words, size)

    def diff(one: _Words, other: _Words) -> Callable[[], int]:
        return lambda: _diff.mark_changed(one, other, 0, 16, words, size)

    def add_up(tables: tuple[_Words, ...]) -> Callable[[], object]:
        return lambda: [table.sum() for table in tables]

    for title, work, tables, reach in (
        ("scan of full L2 tables", scan(full), (full,), 0.5),
        ("scan of L2 tables with 50 000 runs in a TiB", scan(runs), (runs,), 0.5),
        ("diff of equal L2 tables", diff(full, full.copy()), (full, moved), 0.5),
        ("diff of L2 tables, 1 % changed", diff(full, moved), (full, moved), 0.4),
    ):
        context.show_progress(title)
        found = run_pairs(count, _make_rate(work, tables), _make_rate(add_up(tables), tables))
        yield make_row(
            f"{title}, {size // MIB * 8} MiB each",
            _AGAINST,
            found,
            unit="GB/s",
            reach=context.target_unless_quick(reach),
        )
    if scan(full)() != size or diff(full, moved)() != int(np.count_nonzero(full != moved)):
        raise DamagedError("a kernel returned a wrong count; report this fault")


def _make_rate(work: Callable[[], object], tables: tuple[_Words, ...]) -> Callable[[], float]:
    """Return a function that calls `work` and returns how fast it read the tables, in 10^9 bytes a second."""
    return lambda: sum(table.nbytes for table in tables) / time_call(work) / 1e9


CASES = (Case("kernels", _measure_kernels),)
