"""An image in memory, with internal snapshots, as a source of snapshots: `take` runs without qemu.

A block is (serial, content): like an L2 entry, the serial is new with every write, so equal blocks hold equal
content and a rewrite of the same content differs. Contents are numbers of a small palette.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from island_fast.arrays import Bytes2D, Int64s
from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.errors import NotFoundError
from island_fast.images.source import END, TABLE_DIFF, Base, Change, Source, View
from island_fast.progress import Progress
from island_fast.qcow2.snapshots import InternalSnapshot, PinnedBase

HOLE, ZEROES = -1, 0
CONTENTS = 24
Block = tuple[int, int]
Content = tuple[int, ...]


def _palette() -> np.ndarray:
    """Blocks that compress to a few hundred or a few thousand bytes each; the first one is zero."""
    draw = random.Random(20)
    blocks = [bytes(BLOCK_SIZE)]
    for number in range(1, CONTENTS):
        noise = draw.randbytes(draw.choice([300, 900, 2500, 4000]))
        blocks.append(noise + bytes([number]) * (BLOCK_SIZE - len(noise)))
    return np.frombuffer(b"".join(blocks), np.uint8).reshape(CONTENTS, BLOCK_SIZE)


PALETTE = _palette()


class MemoryImage:
    """A volume of `len(blocks)` blocks and its internal snapshots. Owns nothing outside memory."""

    def __init__(self, content: Content, pin: PinnedBase | None = None) -> None:
        self._serial = 0
        self.blocks: list[Block] = []
        self.frozen: list[tuple[InternalSnapshot, tuple[Block, ...]]] = []
        self._made = 1
        self.write(dict(enumerate(content)), len(content))
        if pin:
            self.frozen.append((_internal(pin), tuple(self.blocks)))

    def write(self, contents: Mapping[int, int], blocks: int) -> None:
        """Make the volume `blocks` long and write those of `contents` that are within."""
        del self.blocks[blocks:]
        self.blocks += [(0, HOLE)] * (blocks - len(self.blocks))
        for block, content in contents.items():
            if block < blocks:
                self._serial += 1
                self.blocks[block] = (self._serial, content) if content != HOLE else (0, HOLE)

    @property
    def content(self) -> Content:
        """What a guest reads: holes are zeroes."""
        return tuple(max(content, ZEROES) for _, content in self.blocks)

    def kept(self) -> tuple[list[Block], list[tuple[InternalSnapshot, tuple[Block, ...]]]]:
        """What a crash leaves, for `put_back`."""
        return list(self.blocks), list(self.frozen)

    def put_back(self, kept: tuple[list[Block], list[tuple[InternalSnapshot, tuple[Block, ...]]]]) -> None:
        self.blocks, self.frozen = list(kept[0]), list(kept[1])

    def pin(self, name: str, now: float) -> InternalSnapshot:
        self._made += 1
        nanoseconds = int(now % 1 * 1e9)
        pin = PinnedBase(name, str(self._made), int(now), nanoseconds, len(self.blocks) * BLOCK_SIZE)
        self.frozen.append((_internal(pin), tuple(self.blocks)))
        return self.frozen[-1][0]


def _internal(pin: PinnedBase) -> InternalSnapshot:
    return InternalSnapshot(pin.id, pin.name, pin.seconds, pin.nanoseconds, pin.disk_size, 0, 0, 0)


class MemoryView(View):
    def __init__(self, blocks: tuple[Block, ...]) -> None:
        self.volume_size = len(blocks) * BLOCK_SIZE
        self.at = blocks
        self._read = 0

    @property
    def bytes_read(self) -> int:
        return self._read

    def read(self, blocks: Int64s, out: Bytes2D) -> None:
        for row, block in enumerate(blocks.tolist()):
            out[row] = PALETTE[max(self.at[block][1], ZEROES)]
        self._read += blocks.size * BLOCK_SIZE


class MemorySource(Source):
    """A MemoryImage held for one snapshot; `clock` gives the time of pins."""

    def __init__(self, path: Path, image: MemoryImage, clock: float) -> None:
        self.path = path
        self._image = image
        self._clock = clock
        self._stack = ExitStack()

    @property
    def facts(self) -> Mapping[str, str]:
        return {"format": "memory"}

    @property
    def internal_snapshots(self) -> tuple[InternalSnapshot, ...]:
        return tuple(internal for internal, _ in self._image.frozen)

    @property
    def reason_not_pinnable(self) -> str | None:
        return None

    def find_pinned(self, pin: PinnedBase) -> InternalSnapshot | None:
        return next((one for one in self.internal_snapshots if one.identity == pin), None)

    def find_named(self, name: str) -> InternalSnapshot:
        found = [one for one in self.internal_snapshots if one.name == name]
        if not found:
            raise NotFoundError(f"no internal snapshot {name}")
        return found[0]

    def pin(self, name: str) -> InternalSnapshot:
        return self._image.pin(name, self._clock)

    def unpin(self, internal: InternalSnapshot) -> None:
        self._image.frozen = [one for one in self._image.frozen if one[0] != internal]

    def discard_pin(self, name: str) -> None:
        self._image.frozen = [one for one in self._image.frozen if one[0].name != name]

    def reason_unsound(self, base: Base, facts: Mapping[str, str]) -> str | None:
        return None

    def require_unchanged(self, internals: Sequence[InternalSnapshot]) -> None:
        assert all(one in self.internal_snapshots for one in internals)

    def view(self, internal: InternalSnapshot | None) -> MemoryView:
        if internal is None:
            return MemoryView(tuple(self._image.blocks))
        return MemoryView(next(blocks for one, blocks in self._image.frozen if one == internal))

    def find_change(self, view: View, base: Base | None, why_not: str, progress: Progress) -> Change:
        assert isinstance(view, MemoryView)
        data = DirtyMap.from_indices(
            view.blocks, np.array([i for i, b in enumerate(view.at) if b[1] != HOLE], np.int64)
        )
        if base is None:
            return Change.full_scan(data, why_not)
        old = self.view(base.internal).at
        smaller = min(len(old), view.blocks)
        differ = [i for i in range(view.blocks) if i >= smaller or old[i] != view.at[i]]
        candidates = DirtyMap.from_indices(view.blocks, np.array(differ, np.int64))
        candidates |= DirtyMap.from_runs(view.blocks, np.minimum(base.extra, view.blocks))
        replaced = np.concatenate([candidates.runs(), [[view.blocks, END]]]).astype(np.int64)
        return Change(TABLE_DIFF, "compared with a pin", candidates, data & candidates, replaced)
