"""Filling packs with blocks, and sending them, several at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from island_fast.arrays import Buffer, Bytes2D, Int64s
from island_fast.formats.names import pack_name
from island_fast.formats.pack import MAX_SLOTS, PACK_SIZE, PackHeader, seal_pack
from island_fast.formats.runs import Runs
from island_fast.stores.base import Store

__all__ = ["Batch", "PackRow", "PackSink"]


@dataclass(frozen=True, slots=True)
class PackRow:
    """A pack that was written: its number, attempt, full name, object size in bytes, and slots."""

    number: int
    attempt: int
    name: str
    size: int
    slots: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks that were read: how many, those found `same` and `kept`, and what is to be stored.

    Of that: block numbers, the bytes in order (which may be views of the buffer that the blocks were read
    into), and index columns.
    """

    read: int
    same: Int64s
    kept: Int64s
    blocks: Int64s
    parts: list[Buffer]
    lengths: Int64s
    codecs: NDArray[np.uint8]
    digests: Bytes2D


@dataclass(slots=True)
class _Open:
    """The pack that is being filled; `data` is one of the sink's buffers, filled up to `size`."""

    data: NDArray[np.uint8]
    blocks: list[Int64s] = field(default_factory=list)
    lengths: list[Int64s] = field(default_factory=list)
    codecs: list[NDArray[np.uint8]] = field(default_factory=list)
    digests: list[Bytes2D] = field(default_factory=list)
    size: int = 0
    slots: int = 0


class PackSink:
    """Fills packs in the order of `add` and uploads them, at most `store.uploads` or `at_once` at a time.

    A context manager: leaving it normally seals the last pack and waits until all are durable; leaving it
    by an exception drops what is not sent. `written` is complete only afterwards. `stored(row, blocks,
    front)` is called from workers as soon as a pack is durable, `told()` by `add` and at the end when
    `durable` counts its blocks. Packs are numbered from `header.number` on.
    """

    def __init__(
        self,
        store: Store,
        header: PackHeader,
        attempt: int,
        stored: Callable[[PackRow, Int64s, bytes], None],
        at_once: int | None = None,
    ) -> None:
        self.seed = header.seed
        self.readers = store.readers
        self.written: list[PackRow] = []
        self.told: Callable[[], None] = lambda: None
        self.durable = 0
        self._store = store
        self._header = header
        self._attempt = attempt
        self._stored = stored
        self._buffers: SimpleQueue[NDArray[np.uint8]] = SimpleQueue()
        self._at_once = min(store.uploads, at_once or store.uploads)
        for _ in range(self._at_once + 1):  # kept and reused: what threads allocate and free stays fragmented
            self._buffers.put(np.empty(PACK_SIZE, np.uint8))
        self._open = _Open(self._buffers.get())
        self._runs: list[Runs] = []  # of each pack; not its blocks, which would grow with the volume
        self._uploads: deque[Future[PackRow]] = deque()
        self._pool = ThreadPoolExecutor(self._at_once, thread_name_prefix="island-upload")

    def __enter__(self) -> PackSink:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._seal()
                self._wait(0)
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, batch: Batch) -> None:
        """Put the blocks of `batch` into the pack that is being filled; may wait for an upload.

        They may come in any order: slots ascend as their blocks do within each pack.
        """
        self._wait(self._store.uploads)
        if not batch.blocks.size:
            return
        pack, size = self._open, int(batch.lengths.sum())
        if pack.size + size > PACK_SIZE or pack.slots + batch.blocks.size > MAX_SLOTS:
            self._seal()
            pack = self._open
        at = pack.size
        for part in batch.parts:  # the only copy on the way to the store
            pack.data[at : at + len(part)] = np.frombuffer(part, np.uint8)
            at += len(part)
        pack.blocks.append(batch.blocks)
        pack.lengths.append(batch.lengths)
        pack.codecs.append(batch.codecs)
        pack.digests.append(batch.digests)
        pack.size = at
        pack.slots += batch.blocks.size

    def runs(self) -> Runs:
        """Where each block went: runs over blocks, slots and pack numbers."""
        return Runs.together(self._runs)

    def _seal(self) -> None:
        """Send the open pack on its way, when it holds anything, and open the next."""
        pack = self._open
        if not pack.slots:
            return
        number = self._header.number + len(self._runs)
        blocks = np.concatenate(pack.blocks)
        order = np.argsort(blocks, kind="stable")
        blocks = blocks[order]
        self._runs.append(_in_pack(number, blocks))
        self._wait(self._at_once - 1)
        self._uploads.append(self._pool.submit(self._upload, number, pack, blocks, order))
        self._open = _Open(self._buffers.get())

    def _wait(self, most: int) -> None:
        while len(self._uploads) > most or (self._uploads and self._uploads[0].done()):
            self.written.append(self._uploads.popleft().result())
            self.durable += self.written[-1].slots
            self.told()

    def _upload(self, number: int, pack: _Open, blocks: Int64s, order: Int64s) -> PackRow:
        header = PackHeader(self._header.lineage, self._header.snapshot, number, self._header.seed)
        name = pack_name(header.lineage, header.snapshot, number, self._attempt)
        try:
            parts, size = seal_pack(
                name,
                header,
                _ordered(pack, order),
                np.concatenate(pack.lengths)[order],
                np.concatenate(pack.codecs)[order],
                np.concatenate(pack.digests)[order],
            )
            self._store.put(name, parts)
        finally:
            self._buffers.put(pack.data)
        row = PackRow(number, self._attempt, name, size, pack.slots)
        self._stored(row, blocks, b"".join(parts[:-1]))
        return row


def _in_pack(number: int, blocks: Int64s) -> Runs:
    """Runs of a pack that holds `blocks`, ascending, in its slots from 0 on."""
    slot = np.flatnonzero(np.append(True, np.diff(blocks) != 1))
    length = np.diff(np.append(slot, blocks.size))
    return Runs.narrow(blocks[slot], length, np.full(slot.size, number, np.int32), slot)


def _ordered(pack: _Open, order: Int64s) -> list[memoryview]:
    """The pack's stored blocks in this order: pieces of its buffer, as few as there can be."""
    lengths = np.concatenate(pack.lengths)
    ends = np.cumsum(lengths)
    first = np.flatnonzero(np.append(True, np.diff(order) != 1))
    last = np.append(first[1:], order.size) - 1
    spans = zip((ends - lengths)[order[first]].tolist(), ends[order[last]].tolist(), strict=True)
    return [pack.data[a:b].data for a, b in spans]
