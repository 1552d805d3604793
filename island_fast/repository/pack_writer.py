"""Filling packs with blocks and uploading them, several at a time.

In memory: one pack that is filled, and one for each upload.
"""

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

__all__ = ["BlockBatch", "PackWriter", "WrittenPack"]


@dataclass(frozen=True, slots=True)
class BlockBatch:
    """Blocks that were read, and what of them is to be stored.

    `read` is their number; `same` are those equal to the parent's, `kept` those that earlier attempts stored.
    The other fields are of the blocks to be stored: their numbers, their bytes in order (which can be views
    of the buffer that the blocks were read into), and their columns of the pack's index.
    """

    read: int
    same: Int64s
    kept: Int64s
    blocks: Int64s
    parts: list[Buffer]
    lengths: Int64s
    codecs: NDArray[np.uint8]
    digests: Bytes2D


@dataclass(frozen=True, slots=True)
class WrittenPack:
    """A pack in the store: its number, attempt and full name, the object's size in bytes, and its slots."""

    number: int
    attempt: int
    name: str
    size: int
    slots: int


@dataclass(slots=True)
class _OpenPack:
    """The pack that is being filled: `data` is one of the writer's buffers, filled up to `size`."""

    data: NDArray[np.uint8]
    blocks: list[Int64s] = field(default_factory=list)
    lengths: list[Int64s] = field(default_factory=list)
    codecs: list[NDArray[np.uint8]] = field(default_factory=list)
    digests: list[Bytes2D] = field(default_factory=list)
    size: int = 0
    slots: int = 0


class PackWriter:
    """Fills packs in the order of `add`, and uploads at most `store.uploads` or `at_once` at a time.

    A context manager: leaving it normally closes the last pack and waits until all packs are durable; leaving
    it by an exception drops what was not sent. Packs are numbered from `header.number` on, and `written` is
    complete only at the end. `on_stored(pack, blocks, front)` is called in a worker as soon as a pack is
    durable, with its blocks in the order of their slots and its bytes before the stored blocks.
    `on_durable()` is called in the thread of the caller when `durable_blocks` has grown.
    """

    def __init__(
        self,
        store: Store,
        header: PackHeader,
        attempt: int,
        on_stored: Callable[[WrittenPack, Int64s, bytes], None],
        at_once: int | None = None,
    ) -> None:
        self.seed = header.seed
        self.readers = store.readers
        self.written: list[WrittenPack] = []
        self.durable_blocks = 0
        self.on_durable: Callable[[], None] = lambda: None
        self._store = store
        self._header = header
        self._attempt = attempt
        self._on_stored = on_stored
        self._at_once = min(store.uploads, at_once or store.uploads)
        self._buffers: SimpleQueue[NDArray[np.uint8]] = SimpleQueue()
        for _ in range(self._at_once + 1):  # kept and reused: what threads allocate and free stays fragmented
            self._buffers.put(np.empty(PACK_SIZE, np.uint8))
        self._open = _OpenPack(self._buffers.get())
        self._runs: list[Runs] = []  # of each pack; not its blocks, which would grow with the volume
        self._uploads: deque[Future[WrittenPack]] = deque()
        self._pool = ThreadPoolExecutor(self._at_once, thread_name_prefix="island-upload")

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._close_pack()
                self._await_uploads(0)
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, batch: BlockBatch) -> None:
        """Put the blocks of `batch` into the open pack; this can wait for an upload.

        Blocks come in any order: within each pack, slots are in the order of block numbers.
        """
        self._await_uploads(self._store.uploads)
        if not batch.blocks.size:
            return
        pack, size = self._open, int(batch.lengths.sum())
        if pack.size + size > PACK_SIZE or pack.slots + batch.blocks.size > MAX_SLOTS:
            self._close_pack()
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
        """Return where each block went, by pack number."""
        return Runs.join(self._runs)

    def _close_pack(self) -> None:
        """Start the upload of the open pack, unless it is empty, and open the next."""
        pack = self._open
        if not pack.slots:
            return
        number = self._header.number + len(self._runs)
        blocks = np.concatenate(pack.blocks)
        order = np.argsort(blocks, kind="stable")
        blocks = blocks[order]
        self._runs.append(_runs_of_pack(number, blocks))
        self._await_uploads(self._at_once - 1)
        self._uploads.append(self._pool.submit(self._upload, number, pack, blocks, order))
        self._open = _OpenPack(self._buffers.get())

    def _await_uploads(self, most: int) -> None:
        """Wait until at most `most` uploads run, and take up those that have ended."""
        while len(self._uploads) > most or (self._uploads and self._uploads[0].done()):
            self.written.append(self._uploads.popleft().result())
            self.durable_blocks += self.written[-1].slots
            self.on_durable()

    def _upload(self, number: int, pack: _OpenPack, blocks: Int64s, order: Int64s) -> WrittenPack:
        header = PackHeader(self._header.lineage, self._header.snapshot, number, self._header.seed)
        name = pack_name(header.lineage, header.snapshot, number, self._attempt)
        try:
            pieces = _pieces_in_order(pack, order)
            parts, size = seal_pack(
                name,
                header,
                pieces,
                np.concatenate(pack.lengths)[order],
                np.concatenate(pack.codecs)[order],
                np.concatenate(pack.digests)[order],
            )
            self._store.put(name, parts)
        finally:
            self._buffers.put(pack.data)
        written = WrittenPack(number, self._attempt, name, size, pack.slots)
        self._on_stored(written, blocks, b"".join(parts[: len(parts) - len(pieces)]))
        return written


def _runs_of_pack(number: int, blocks: Int64s) -> Runs:
    """Return the runs of a pack that holds `blocks`, ascending, in its slots from 0 on."""
    slot = np.flatnonzero(np.append(True, np.diff(blocks) != 1))
    length = np.diff(np.append(slot, blocks.size))
    return Runs.narrow(blocks[slot], length, np.full(slot.size, number, np.int32), slot)


def _pieces_in_order(pack: _OpenPack, order: Int64s) -> list[memoryview]:
    """Return the stored blocks of a pack in this order, as the fewest possible pieces of its buffer."""
    lengths = np.concatenate(pack.lengths)
    ends = np.cumsum(lengths)
    first = np.flatnonzero(np.append(True, np.diff(order) != 1))
    last = np.append(first[1:], order.size) - 1
    spans = zip((ends - lengths)[order[first]].tolist(), ends[order[last]].tolist(), strict=True)
    return [pack.data[a:b].data for a, b in spans]
