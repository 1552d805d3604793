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
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from island_fast import _diff
from island_fast.arrays import Bools, Bytes2D, Int64s
from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.errors import DamagedObjectError
from island_fast.formats.pack import (
    Index,
    compress_blocks,
    digest_blocks,
    plain_blocks,
)
from island_fast.formats.runs import Runs
from island_fast.images.source import View
from island_fast.progress import Progress
from island_fast.repository.lineage import Lineage
from island_fast.repository.pack_reader import BATCH, KnownDigests, PackReader, by_pack, unpacked
from island_fast.repository.pack_writer import Batch, PackRow, PackSink

__all__ = ["Expected", "Known", "Sent", "carry", "differences", "receive", "send", "workers"]

_NONE = np.zeros(0, np.int64)
_FETCHING = 2  # packs that are being fetched, or have been and wait: each is in memory


_READING = 6  # batches that are not yet in a pack


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
    blocks, slots = runs.expand()
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


class Expected:
    """What blocks should be, by the pack indexes; `runs` hold pack keys. Thread-safe.

    `index(key)` gives the index of a pack, None if it cannot be read; it is called by one thread at a time.
    """

    def __init__(self, runs: Runs, index: Callable[[int], Index | None]) -> None:
        self.runs = runs
        self._index = index
        self._lock = threading.Lock()

    def of(self, blocks: Int64s) -> tuple[Bytes2D, Bools, Bools]:
        """Digests of `blocks`, uint8[n, 16]; which have one; and which have one that cannot be read."""
        digests = np.zeros((blocks.size, 16), np.uint8)
        known, unknown = np.zeros(blocks.size, np.bool_), np.zeros(blocks.size, np.bool_)
        named, row, offset = self.runs.locate(blocks)
        keys, slots = self.runs.pack[row], self.runs.slot[row] + offset
        for key in np.unique(keys).tolist():
            mine = keys == key
            with self._lock:
                index = self._index(key)
            if index is None or int(slots[mine].max()) >= len(index.rows):
                unknown[named[mine]] = True
            else:
                digests[named[mine]] = index.rows["digest"][slots[mine]]
                known[named[mine]] = True
        return digests, known, unknown


def differences(
    view: View, looked_at: DirtyMap, expected: Expected, lineage: Lineage, progress: Progress
) -> tuple[DirtyMap, DirtyMap]:
    """Read the blocks in `looked_at`, and see which are not as they should be, and which cannot be compared.

    A block of which nothing is expected should be zero. They are read and hashed by several workers, in
    bounded memory; progress is told in the calling thread.
    """
    differing, unknown = DirtyMap(view.blocks), DirtyMap(view.blocks)
    waiting: deque[Future[tuple[Int64s, Int64s, int]]] = deque()
    buffers = deque(np.empty((BATCH, BLOCK_SIZE), np.uint8) for _ in range(_READING))
    done, total = 0, looked_at.count()

    def take() -> None:
        nonlocal done
        other, unread, read = waiting.popleft().result()
        differing.set_indices(other)
        unknown.set_indices(unread)
        done += read
        progress("compare", done * BLOCK_SIZE, total * BLOCK_SIZE)

    with workers(min(lineage.store.readers, _READING), "compare") as pool:
        for blocks in looked_at.batches(BATCH):
            if len(waiting) == _READING:
                take()
            rows = buffers[0][: blocks.size]  # of the batch that was taken just now
            buffers.rotate(-1)
            waiting.append(pool.submit(_compared, view, blocks, rows, expected, lineage.seed))
        while waiting:
            take()
    return differing, unknown


def _compared(
    view: View, blocks: Int64s, rows: Bytes2D, expected: Expected, seed: int
) -> tuple[Int64s, Int64s, int]:
    """Of some blocks, those that differ, those that cannot be compared, and how many were read."""
    view.read(blocks, rows)
    zero = np.empty(blocks.size, np.uint8)
    _diff.zero_blocks(rows.reshape(-1), BLOCK_SIZE, zero)
    digests, known, unread = expected.of(blocks)
    equal = (digest_blocks(rows, seed) == digests).all(axis=1)
    return blocks[np.where(known, ~equal, zero == 0) & ~unread], blocks[unread], blocks.size


def carry(
    runs: Runs,
    packs: PackReader,
    gap: int,
    known: Known,
    sink: PackSink,
    blocks: int,
    progress: Progress,
) -> Sent:
    """Fetch every block that `runs` (with pack keys of `packs`) name, check it, and put it into `sink`.

    Of a pack little of which is wanted, ranges are fetched, merged over gaps of at most `gap` bytes. Blocks
    that are `known` on the other side are not fetched; both have digests of one seed. The volume has `blocks`
    blocks.
    Returns when every pack is durable; DamagedObjectError names a pack that is not whole. Progress is told in
    the calling thread, of what is durable or need not be sent.
    """
    same, kept = DirtyMap(blocks), DirtyMap(blocks)
    total, unsent = runs.blocks, 0
    waiting: deque[Future[list[Batch]]] = deque()
    fetch = _Fetch(packs, gap, known, sink.seed)

    def tell() -> None:
        progress("copy", (unsent + sink.durable) * BLOCK_SIZE, total * BLOCK_SIZE)

    def take() -> None:
        nonlocal unsent
        for batch in waiting.popleft().result():
            same.set_indices(batch.same)
            kept.set_indices(batch.kept)
            sink.add(batch)
            unsent += batch.read - batch.blocks.size
        tell()

    sink.told = tell
    with workers(min(packs.store.downloads, _FETCHING), "copy") as pool, sink:
        for key, named in by_pack(runs):
            if len(waiting) == _FETCHING:
                take()
            waiting.append(pool.submit(fetch, key, named))
        while waiting:
            take()
    return Sent(sink.written, sink.runs(), same, kept)


class _Fetch:
    """Fetches what is wanted of a pack; called from workers."""

    def __init__(self, packs: PackReader, gap: int, known: Known, seed: int) -> None:
        self._packs = packs
        self._gap = gap
        self._known = known
        self._seed = seed

    def __call__(self, key: int, runs: Runs) -> list[Batch]:
        blocks, slots = runs.expand()
        same, kept = self._not_wanted(key, blocks, slots)
        wanted = ~(same | kept)
        found = _nothing_to_send(blocks, same, kept)
        return [found, *self._batches(key, blocks[wanted], slots[wanted])]

    def _not_wanted(self, key: int, blocks: Int64s, slots: Int64s) -> tuple[Bools, Bools]:
        """Which blocks the other side's parent has, and which an earlier attempt has sent."""
        none = np.zeros(blocks.size, np.bool_)
        if not (self._known.parent.names(blocks) or self._known.kept.names(blocks)):
            return none, none
        index = self._packs.index(key)
        if int(slots.max()) >= len(index.rows):
            return none, none  # damage, which fetching it will name
        digests = index.digests[slots]
        same = self._known.parent.same(blocks, digests)
        return same, self._known.kept.same(blocks, digests) & ~same

    def _batches(self, key: int, blocks: Int64s, slots: Int64s) -> Iterator[Batch]:
        """The blocks as they are stored, each decoded and checked, in the order of their slots."""
        for batch in unpacked(self._packs, key, slots, self._gap):
            self._check_seed(batch.index)
            columns = batch.index.rows[slots[batch.part]]
            yield Batch(
                read=len(batch.rows), same=_NONE, kept=_NONE, blocks=blocks[batch.part],
                parts=list(batch.stored), lengths=columns["length"].astype(np.int64),
                codecs=columns["codec"], digests=np.ascontiguousarray(columns["digest"]),
            )  # fmt: skip

    def _check_seed(self, index: Index) -> None:
        if index.header.seed != self._seed:
            raise DamagedObjectError(f"pack {index.name} has digests of another seed than its volume's")


def _nothing_to_send(blocks: Int64s, same: Bools, kept: Bools) -> Batch:
    """A batch that tells only which blocks need not be sent."""
    return Batch(
        read=int((same | kept).sum()), same=blocks[same], kept=blocks[kept], blocks=_NONE, parts=[],
        lengths=_NONE, codecs=np.zeros(0, np.uint8), digests=np.zeros((0, 16), np.uint8),
    )  # fmt: skip
