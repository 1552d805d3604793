"""The two streams of blocks: from an image into packs, and from packs into an image.

Both are bounded: a fixed number of buffers, batches and packs are in flight, whatever the volume's size.
Sending: workers read, hash and compress batches, the calling thread fills packs in volume order, workers
upload these. Restoring: each worker takes a pack, checks and decodes it, and writes its blocks to their
place. The first error ends the stream and is raised in the calling thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from island_fast import _diff
from island_fast.arrays import Buffer, Bytes2D, Int64s
from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.errors import DamagedObjectError
from island_fast.formats.catalog import pack_name
from island_fast.formats.pack import (
    MAX_SLOTS,
    PACK_SIZE,
    Index,
    PackHeader,
    compress_blocks,
    digest_blocks,
    plain_blocks,
    seal_pack,
    unpack_blocks,
)
from island_fast.formats.runs import Runs
from island_fast.progress import Progress
from island_fast.repository.pack_reader import KnownDigests, PackReader
from island_fast.stores.base import Store

__all__ = [
    "BATCH",
    "Batch",
    "Known",
    "PackRow",
    "PackSink",
    "Sent",
    "Unpacked",
    "by_pack",
    "expand",
    "receive",
    "send",
    "unpacked",
    "workers",
]


BATCH = 32  # blocks read, hashed and compressed at a time: 2 MiB
_READING = 6  # batches that are not yet in a pack


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


@dataclass(frozen=True, slots=True)
class Known:
    """Digests of the parent's blocks, and of those that earlier attempts at the snapshot stored."""

    parent: KnownDigests
    kept: KnownDigests


@dataclass(frozen=True, slots=True)
class Sent:
    """What sending gave.

    `packs` were written; `runs` tell where their blocks are (`pack` is a pack number); `same` are blocks
    found to be what the parent has, `kept` those that earlier attempts have stored.
    """

    packs: list[PackRow]
    runs: Runs
    same: DirtyMap
    kept: DirtyMap


def send(
    read: Callable[[Int64s, Bytes2D], None],
    data: DirtyMap,
    known: Known,
    sink: PackSink,
    progress: Progress,
    *,
    compress: bool,
) -> Sent:
    """Read the blocks in `data`, and send those that are neither zero nor known to `sink`.

    `read(blocks, rows)` fills uint8[n, BLOCK_SIZE], in several threads at once. Returns when every pack is
    durable. Progress is told in the calling thread, of what is durable or need not be sent.
    """
    same, kept = DirtyMap(data.blocks), DirtyMap(data.blocks)
    total, unsent = data.count(), 0
    waiting: deque[Future[Batch]] = deque()
    buffers = deque(np.empty((BATCH, BLOCK_SIZE), np.uint8) for _ in range(_READING))

    def tell() -> None:
        progress("send", (unsent + sink.durable) * BLOCK_SIZE, total * BLOCK_SIZE)

    def take() -> None:
        nonlocal unsent
        batch = waiting.popleft().result()
        same.set_indices(batch.same)
        kept.set_indices(batch.kept)
        sink.add(batch)
        unsent += batch.read - batch.blocks.size
        tell()

    sink.told = tell
    with workers(min(sink.readers, _READING), "read") as pool, sink:
        for blocks in data.batches(BATCH):
            if len(waiting) == _READING:
                take()
            rows = buffers[0][: blocks.size]  # of the batch that was taken just now
            buffers.rotate(-1)
            waiting.append(pool.submit(_read, read, blocks, rows, known, sink.seed, compress))
        while waiting:
            take()
    return Sent(sink.written, sink.runs(), same, kept)


def _read(
    read: Callable[[Int64s, Bytes2D], None],
    blocks: Int64s,
    rows: Bytes2D,
    known: Known,
    seed: int,
    compress: bool,
) -> Batch:
    """Read a batch and hash it; what is neither known nor zero is made ready to be stored."""
    read(blocks, rows)
    digests = digest_blocks(rows, seed)
    same = known.parent.same(blocks, digests)
    kept = known.kept.same(blocks, digests) & ~same
    zero = np.empty(blocks.size, np.uint8)
    _diff.zero_blocks(rows.reshape(-1), BLOCK_SIZE, zero)
    fresh = np.flatnonzero(~same & ~kept & (zero == 0))
    parts, lengths, codecs = (compress_blocks if compress else plain_blocks)(rows, fresh)
    return Batch(
        blocks.size, blocks[same], blocks[kept], blocks[fresh], parts, lengths, codecs, digests[fresh]
    )


@contextmanager
def workers(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool whose queued work is dropped, and whose running work is waited for, at the end."""
    pool = ThreadPoolExecutor(count, thread_name_prefix=f"island-{name}")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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


def receive(
    runs: Runs,
    packs: PackReader,
    write: Callable[[Int64s, Bytes2D], None],
    gap: int,
    progress: Progress,
    wanted: DirtyMap | None = None,
) -> None:
    """Fetch every block that `runs` (with pack keys) name, check it, and `write(blocks, rows)` it.

    With `wanted`, only these of them. Each pack is fetched once: whole when next to all of its slots are
    wanted, else by ranges merged over gaps of at most `gap` bytes. Blocks come in no particular order, from
    several threads.
    """
    lock, done = threading.Lock(), 0
    total = (runs.blocks if wanted is None else wanted.count()) * BLOCK_SIZE
    at_once = packs.store.downloads

    def told(blocks: int) -> None:
        nonlocal done
        with lock:
            done += blocks * BLOCK_SIZE
            progress("restore", done, total)

    buffers: SimpleQueue[Bytes2D] = SimpleQueue()  # kept: new memory costs a page fault for every page
    for _ in range(at_once):
        buffers.put(np.empty((BATCH, BLOCK_SIZE), np.uint8))
    with workers(at_once, "restore") as pool:
        waiting: deque[Future[None]] = deque()
        for key, rows in by_pack(runs):
            if len(waiting) == 2 * at_once:
                waiting.popleft().result()
            waiting.append(pool.submit(_unpack, packs, key, rows, write, gap, told, buffers, wanted))
        while waiting:
            waiting.popleft().result()


def by_pack(runs: Runs) -> Iterator[tuple[int, Runs]]:
    """Each pack that `runs` name, once, with its runs; in the volume's order, which disks like."""
    order = np.argsort(runs.pack, kind="stable")
    packs = runs.pack[order]
    first = np.flatnonzero(np.append(packs.size > 0, packs[1:] != packs[:-1]))
    keys = packs[first]
    bounds = np.append(first, len(runs))
    for at in np.argsort(runs.start[order[first]], kind="stable").tolist():
        rows = order[bounds[at] : bounds[at + 1]]
        yield int(keys[at]), Runs(runs.start[rows], runs.length[rows], runs.pack[rows], runs.slot[rows])


def _unpack(
    packs: PackReader,
    key: int,
    runs: Runs,
    write: Callable[[Int64s, Bytes2D], None],
    gap: int,
    told: Callable[[int], None],
    buffers: SimpleQueue[Bytes2D],
    wanted: DirtyMap | None,
) -> None:
    """Fetch, check and write the blocks that one pack holds, through one of `buffers`."""
    blocks, slots = expand(runs)
    if wanted is not None:
        mine = wanted.holds(blocks)
        blocks, slots = blocks[mine], slots[mine]
    buffer = buffers.get()
    try:
        for batch in unpacked(packs, key, slots, gap, buffer):
            write(blocks[batch.part], batch.rows)
            told(len(batch.rows))
    finally:
        buffers.put(buffer)


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Blocks of one pack: which of the slots asked for, as they are stored, and decoded.

    `rows` (uint8[n, BLOCK_SIZE]) are proved by the digests in `index`, and change when the next batch comes.
    """

    index: Index
    part: slice
    stored: list[memoryview]
    rows: Bytes2D


def unpacked(
    packs: PackReader, key: int, slots: Int64s, gap: int, buffer: Bytes2D | None = None
) -> Iterator[Unpacked]:
    """The blocks in `slots` (ascending) of a pack, in batches that `buffer` holds, or one made for it."""
    if not slots.size:
        return
    index, stored = packs.stored(key, slots, gap)
    out = np.empty((BATCH, BLOCK_SIZE), np.uint8) if buffer is None else buffer
    for at in range(0, slots.size, BATCH):
        part = slice(at, at + BATCH)
        rows = out[: slots[part].size]
        try:
            unpack_blocks(index, slots[part], stored[part], rows)
        except DamagedObjectError:
            index, stored = packs.proved(key, slots, damaged=1)
            unpack_blocks(index, slots[part], stored[part], rows)
        yield Unpacked(index, part, stored[part], rows)
    packs.tell_damage(key)


def expand(runs: Runs) -> tuple[Int64s, Int64s]:
    """Block numbers and slots of one pack's runs, one row a block, slots ascending."""
    if runs.blocks > MAX_SLOTS:
        raise DamagedObjectError("a manifest names more slots of a pack than a pack can have")
    within = np.arange(runs.blocks) - np.repeat(np.cumsum(runs.length) - runs.length, runs.length)
    blocks, slots = np.repeat(runs.start, runs.length) + within, np.repeat(runs.slot, runs.length) + within
    order = np.argsort(slots, kind="stable")
    return blocks[order], slots[order]
