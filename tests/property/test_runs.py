"""Runs against plain dictionaries, with windows so small that every edge of one is met."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from island_fast.formats import runs as module
from island_fast.formats.runs import Runs, merge

BLOCKS = 40
Entries = dict[int, tuple[int, int]]

entries = st.dictionaries(
    st.integers(0, BLOCKS - 1), st.tuples(st.integers(0, 1), st.integers(0, 60)), max_size=BLOCKS
)


def runs_of(named: Entries) -> Runs:
    """One run for each block: neighbours are not joined."""
    rows = [(block, 1, pack, slot) for block, (pack, slot) in sorted(named.items())]
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    return Runs.narrow(*columns)


def entries_of(runs: Runs) -> Entries:
    columns = (getattr(runs, name).tolist() for name in ("start", "length", "pack", "slot"))
    return {
        start + n: (pack, slot + n)
        for start, length, pack, slot in zip(*columns, strict=True)
        for n in range(length)
    }


def joined(runs: Runs) -> bool:
    """Whether no run goes on with the one before it."""
    rows = list(zip(runs.start, runs.length, runs.pack, runs.slot, strict=True))
    return not any(
        (a[0] + a[1], a[2], a[3] + a[1]) == (b[0], b[2], b[3]) for a, b in itertools.pairwise(rows)
    )


@pytest.fixture(params=[1, 2, 3, 1 << 16], scope="module", autouse=True)
def window(request: pytest.FixtureRequest) -> object:
    before, module._WINDOW = module._WINDOW, request.param
    yield request.param
    module._WINDOW = before


@given(entries, st.lists(st.integers(0, BLOCKS - 1), unique=True), st.data())
def test_merge_is_that_of_dictionaries(parent: Entries, replaced: list[int], data: st.DataObject) -> None:
    fresh = data.draw(entries.map(lambda made: {b: e for b, e in made.items() if b in replaced}))
    none = np.zeros((0, 2), np.int64)
    old = merge(Runs.empty(), none, runs_of(parent))
    assert entries_of(old) == parent
    new = merge(
        old, np.array([[b, b + 1] for b in sorted(replaced)], np.int64).reshape(-1, 2), runs_of(fresh)
    )
    assert entries_of(new) == {b: e for b, e in parent.items() if b not in replaced} | fresh
    assert joined(old)
    assert joined(new)
    assert entries_of(old) == parent, "what was merged has changed"


@given(entries, st.integers(0, BLOCKS), st.integers(0, BLOCKS))
def test_windows_and_what_lies_around(named: Entries, low: int, high: int) -> None:
    runs = merge(Runs.empty(), np.zeros((0, 2), np.int64), runs_of(named))
    found: Entries = {}
    for part in runs.windows():
        assert 0 < len(part) <= module._WINDOW
        found |= entries_of(part)
    assert found == named
    near = entries_of(runs.around(low, high))
    assert {b: e for b, e in named.items() if low <= b < high}.items() <= near.items()
