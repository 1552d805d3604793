"""What two manifests say of a change equals what two dicts of blocks say."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from island_fast.formats.keys import SnapshotNumbers, pack_keys
from island_fast.formats.manifest import Manifest, build_pack_table
from island_fast.formats.runs import Runs, merge
from island_fast.operations.diff import diff_snapshots
from island_fast.qcow2.snapshots import PinnedBase

BLOCK = 65536
PACKS = 3
BLOCKS = 40
Blocks = dict[int, tuple[int, int]]  # block -> pack, slot


@st.composite
def blocks(draw: st.DrawFn, size: int, base: Blocks) -> Blocks:
    """Blocks of a volume of `size` bytes: those of `base`, some given other slots, some zeroed."""
    found = dict(base)
    for _ in range(draw(st.integers(0, 6))):
        start, length = draw(st.integers(0, BLOCKS - 1)), draw(st.integers(1, 12))
        pack, slot, step = draw(st.integers(-1, PACKS - 1)), draw(st.integers(0, 30)), draw(st.integers(1, 2))
        for at in range(length):
            found[start + at] = (pack, slot + at * step)
    return {block: place for block, place in found.items() if place[0] >= 0 and block * BLOCK < size}


SIZES = st.integers(0, BLOCKS * BLOCK).map(lambda size: size // 512 * 512)


def manifest(found: Blocks, size: int, snapshot: str, numbers: SnapshotNumbers) -> Manifest:
    """A manifest of runs as long as they can be; packs are numbered in it as they come."""
    rows = sorted((block, *place) for block, place in found.items())
    block, pack, slot = np.array(rows, np.int64).reshape(-1, 3).T.copy()
    keys = pack_keys(numbers.numbers(["a" * 32, "b" * 32, "c" * 32])[pack], pack)
    none = np.zeros((0, 2), np.int64)
    table, runs = build_pack_table(
        merge(Runs.empty(), none, Runs(block, np.ones_like(block), keys, slot)), "vol", numbers
    )
    return Manifest(
        lineage="vol", snapshot=snapshot, attempt=0, parent=None, volume_size=size, created=0, label="",
        rule="", reason="", seed=0, pin=PinnedBase("p", "1", 0, 0, size), packs=table, runs=runs,
    )  # fmt: skip


@given(st.data(), SIZES, SIZES)
def test_it_is_what_dicts_of_blocks_say(data: st.DataObject, before_size: int, size: int) -> None:
    before = data.draw(blocks(before_size, {}))
    after = data.draw(blocks(size, before))
    numbers = SnapshotNumbers()
    found = diff_snapshots(
        manifest(before, before_size, "1" * 32, numbers), manifest(after, size, "2" * 32, numbers), numbers
    )
    told = {}
    end = None
    for start, length, kind in found.extents():
        assert length > 0
        assert (start, kind) != end, "two extents that are one"
        end = (start + length, kind)
        assert start % BLOCK == 0
        assert (start + length) % BLOCK == 0 or start + length == size
        for block in range(start // BLOCK, -(-(start + length) // BLOCK)):
            told[block] = kind
    wanted = {
        block: "data" if block in after else "zero"
        for block in range(-(-size // BLOCK))
        if before.get(block) != after.get(block)
    }
    assert told == wanted
    assert (
        found.bytes_changed
        == found.bytes_data + found.bytes_zero
        == sum(min(BLOCK, size - block * BLOCK) for block in wanted)
    )
    assert (found.since_size, found.volume_size) == (before_size, size)
