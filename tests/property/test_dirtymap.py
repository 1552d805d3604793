"""`DirtyMap` equals a Python set under any operations; the interval algebra equals sets of points."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from island_fast.dirtymap import (
    DirtyMap,
    clip_rows,
    intersect_intervals,
    merge_intervals,
    subtract_intervals,
    total,
)

SIZES = st.sampled_from([0, 1, 2, 63, 64, 65, 127, 128, 129, 300])


def column(rows) -> np.ndarray:
    return np.array([tuple(row) for row in rows], np.int64).reshape(-1, 2)


def points(iv) -> set[int]:
    return {p for start, stop in np.asarray(iv).tolist() for p in range(start, stop)}


def runs_of(members: set[int]) -> list[list[int]]:
    """Maximal runs of a set of integers, in order."""
    runs: list[list[int]] = []
    for member in sorted(members):
        if runs and runs[-1][1] == member:
            runs[-1][1] += 1
        else:
            runs.append([member, member + 1])
    return runs


def subset(draw, blocks: int) -> set[int]:
    """A set of blocks: scattered ones and stretches."""
    if not blocks:
        return set()
    block = st.integers(0, blocks - 1)
    scattered = draw(st.sets(block, max_size=8))
    for start, stop in draw(st.lists(st.tuples(block, block), max_size=3)):
        scattered |= set(range(start, stop + 1))
    return scattered


@st.composite
def model(draw) -> tuple[int, set[int]]:
    blocks = draw(SIZES)
    return blocks, subset(draw, blocks)


def map_of(blocks: int, members: set[int]) -> DirtyMap:
    return DirtyMap.from_indices(blocks, np.array(sorted(members), np.int64))


class AgainstSets(RuleBasedStateMachine):
    """A map and a Python set that go through the same operations."""

    blocks = 0

    @initialize(blocks=SIZES, full=st.booleans())
    def begin(self, blocks, full):
        self.blocks = blocks
        self.map = DirtyMap.full(blocks) if full else DirtyMap(blocks)
        self.members = set(range(blocks)) if full else set()

    @rule(data=st.data(), wanted=st.booleans())
    def change_range(self, data, wanted):
        start = data.draw(st.integers(0, self.blocks))
        stop = data.draw(st.integers(start, self.blocks))
        if wanted:
            self.map.set_range(start, stop)
            self.members |= set(range(start, stop))
        else:
            self.map.clear_range(start, stop)
            self.members -= set(range(start, stop))

    @rule(data=st.data(), name=st.sampled_from(["or", "and", "sub", "xor"]), in_place=st.booleans())
    def combine(self, data, name, in_place):
        other = subset(data.draw, self.blocks)
        other_map = map_of(self.blocks, other)
        untouched = self.map
        before = untouched.copy()
        self.map = getattr(self.map, f"__{'i' if in_place else ''}{name}__")(other_map)
        self.members = getattr(self.members, f"__{name}__")(other)
        assert (self.map is untouched) == in_place
        assert in_place or untouched == before
        assert points(other_map.runs()) == other

    @rule()
    def go_on_with_a_copy(self):
        old = self.map
        self.map = old.copy()
        assert self.map == old
        old.set_range(0, self.blocks)

    @rule(max_rows=st.integers(1, 4))
    def read_runs(self, max_rows):
        windows = list(self.map.iter_runs(max_rows))
        assert all(1 <= len(window) <= max_rows for window in windows)
        assert [row for window in windows for row in window.tolist()] == runs_of(self.members)

    @rule(max_blocks=st.integers(1, 70))
    def read_batches(self, max_blocks):
        batches = list(self.map.batches(max_blocks))
        assert all(1 <= len(batch) <= max_blocks for batch in batches)
        assert [block for batch in batches for block in batch.tolist()] == sorted(self.members)

    @rule(data=st.data())
    def read_part(self, data):
        start = data.draw(st.integers(0, self.blocks))
        stop = data.draw(st.integers(start, self.blocks))
        wanted = sorted(m for m in self.members if start <= m < stop)
        assert self.map.indices(start, stop).tolist() == wanted

    @rule(data=st.data())
    def ask_for_many(self, data):
        asked = data.draw(st.lists(st.integers(0, self.blocks - 1), max_size=9)) if self.blocks else []
        held = self.map.holds(np.array(asked, np.int64))
        assert held.tolist() == [block in self.members for block in asked]

    @invariant()
    def same(self):
        if not self.blocks:
            return
        assert self.map.runs().tolist() == runs_of(self.members)
        assert self.map.indices().tolist() == sorted(self.members)
        assert self.map.count() == len(self.members)
        assert bool(self.map) == bool(self.members)
        assert [b for b in range(-1, self.blocks + 1) if b in self.map] == sorted(self.members)
        assert self.map == map_of(self.blocks, self.members)
        assert int(self.map.words[-1]) >> ((self.blocks - 1) % 64 + 1) == 0


TestAgainstSets = AgainstSets.TestCase
TestAgainstSets.settings = settings(deadline=None)


@settings(deadline=None)
@given(model())
def test_from_runs_and_from_indices(blocks_and_members):
    blocks, members = blocks_and_members
    runs = column(runs_of(members))
    doubled = np.concatenate([runs[::-1], runs, np.zeros((1, 2), np.int64)])
    assert DirtyMap.from_runs(blocks, runs) == DirtyMap.from_runs(blocks, doubled)
    assert DirtyMap.from_runs(blocks, runs).indices().tolist() == sorted(members)
    scrambled = np.array(sorted(members, key=lambda m: m * 7919 % 101) * 2, np.int64)
    assert DirtyMap.from_indices(blocks, scrambled).indices().tolist() == sorted(members)


@settings(deadline=None)
@given(model())
def test_windows_of_runs_are_the_callers_own(blocks_and_members):
    """Later ones do not change those given before."""
    blocks, members = blocks_and_members
    windows = list(map_of(blocks, members).iter_runs(1))
    assert [window.tolist()[0] for window in windows] == runs_of(members)


def test_maps_of_different_size_do_not_combine():
    small, large = DirtyMap(64), DirtyMap(65)
    assert small != large
    assert small != DirtyMap(63)
    operators = ["__or__", "__and__", "__sub__", "__xor__", "__ior__", "__iand__", "__isub__", "__ixor__"]
    for name in operators:
        with pytest.raises(ValueError, match="64 and 65 blocks"):
            getattr(small, name)(large)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, 11), (11, 11)])
def test_ranges_outside_are_refused(start, stop):
    dirty = DirtyMap(10)
    for call in (dirty.set_range, dirty.clear_range, dirty.indices):
        with pytest.raises(ValueError, match="not within a map of 10 blocks"):
            call(start, stop)
    assert not dirty


@pytest.mark.parametrize("rows", [[[0, 11]], [[-1, 2]], [[3, 4], [10, 11]]])
def test_runs_outside_are_refused(rows):
    with pytest.raises(ValueError, match="not within a map of 10 blocks"):
        DirtyMap.from_runs(10, column(rows))


@pytest.mark.parametrize("indices", [[-1], [10], [0, 64]])
def test_indices_outside_are_refused(indices):
    with pytest.raises(ValueError, match="not within a map of 10 blocks"):
        DirtyMap.from_indices(10, np.array(indices))


def test_senseless_numbers_are_refused():
    with pytest.raises(ValueError, match="-1 blocks"):
        DirtyMap(-1)
    with pytest.raises(ValueError, match="batch of 0"):
        next(DirtyMap.full(3).batches(0))
    with pytest.raises(ValueError):
        next(DirtyMap.full(3).iter_runs(0))


def test_a_map_is_not_hashable_and_equals_no_set():
    with pytest.raises(TypeError):
        hash(DirtyMap(3))
    assert DirtyMap(3) != set()
    assert repr(DirtyMap.from_indices(9, np.array([2, 3]))) == "DirtyMap(2 of 9 blocks)"


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_untouched_pages_cost_nothing():
    before = resident()
    dirty = DirtyMap(1 << 32)
    dirty.set_range(1 << 31, (1 << 31) + 10)
    assert (1 << 31) + 9 in dirty
    assert dirty.words.nbytes == 1 << 29
    assert resident() - before < 1 << 26


def test_batches_of_one_long_run_stay_small():
    dirty = DirtyMap.full(1 << 24)
    tracemalloc.start()
    try:
        batches = dirty.batches(1000)
        assert next(batches).tolist() == list(range(1000))
        assert next(batches).tolist() == list(range(1000, 2000))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def intervals(low: int = -20, high: int = 60):
    """Any rows: out of order, overlapping, empty, even with stop < start."""
    number = st.integers(low, high)
    return st.lists(st.tuples(number, number), max_size=12).map(column)


@settings(deadline=None)
@given(intervals())
def test_merge(iv):
    before = iv.copy()
    assert merge_intervals(iv).tolist() == runs_of(points(iv))
    assert iv.tolist() == before.tolist()
    assert merge_intervals(column(sorted(iv.tolist()))).tolist() == runs_of(points(iv))


@settings(deadline=None)
@given(intervals(), intervals())
def test_subtract_and_intersect(a, b):
    assert subtract_intervals(a, b).tolist() == runs_of(points(a) - points(b))
    assert intersect_intervals(a, b).tolist() == runs_of(points(a) & points(b))


@settings(deadline=None)
@given(intervals(), intervals())
def test_algebra_far_from_zero(a, b):
    """Slot keys go up to 2**63: the same results there, and no wrapping."""
    far = (1 << 63) - 1000
    assert (subtract_intervals(a + far, b + far) - far).tolist() == subtract_intervals(a, b).tolist()
    assert (intersect_intervals(a + far, b + far) - far).tolist() == intersect_intervals(a, b).tolist()


@settings(deadline=None)
@given(intervals())
def test_total_of_merged_is_the_number_of_points(iv):
    assert total(merge_intervals(iv)) == len(points(iv))


@st.composite
def rows(draw) -> list[tuple[int, int]]:
    """Sorted, disjoint rows (start, length); some touch, some are empty."""
    at, out = 0, []
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=10)):
        out.append((at + gap, length))
        at += gap + length
    return out


@settings(deadline=None)
@given(rows(), intervals(0, 80), st.booleans())
def test_clip_rows(rows, keep, cut):
    keep = merge_intervals(keep)
    if cut:
        # Disjoint is enough: intervals that touch stay apart.
        keep = column(
            [part for a, b in keep.tolist() for part in ([a, a + 1], [a + 1, b]) if part[0] < part[1]]
        )
    expected = []
    for i, (start, length) in enumerate(rows):
        for a, b in keep.tolist():
            low, high = max(a, start), min(b, start + length)
            if low < high:
                expected.append((i, low - start, high - low))
    starts = np.array([row[0] for row in rows], np.int64)
    lengths = np.array([row[1] for row in rows], np.int64)
    pieces = clip_rows(starts, lengths, keep)
    assert [tuple(piece) for piece in np.stack(pieces, axis=1).tolist()] == expected
    assert all(piece.dtype == np.int64 for piece in pieces)


@pytest.mark.parametrize("call", [subtract_intervals, intersect_intervals])
def test_nothing_with_nothing(call):
    none = np.zeros((0, 2), np.int64)
    assert call(none, none).shape == (0, 2)
    assert call(none, none).dtype == np.int64
    assert merge_intervals(none).shape == (0, 2)
    assert total(none) == 0
