"""The four streams of blocks, each in bounded memory whatever the size of the volume.

- `send_blocks`, from an image into packs: workers read, hash and compress batches, the calling thread fills
  packs in the order of the volume, and workers upload these. In memory: `_BATCHES` batches, and the packs of
  the `PackWriter`.
- `restore_blocks`, from packs to where a volume is restored: each worker fetches a pack, or the ranges of it
  that are wanted, and decodes, checks and writes its blocks batch by batch. In memory: for each worker, one
  pack and one batch.
- `copy_blocks`, from packs of one repository into packs of another: blocks stay as they are stored. Workers
  fetch each pack once, and decode and check its blocks; nothing is compressed again. In memory:
  `_PACKS_FETCHED` packs on this side, with one batch for each worker, and the packs of the `PackWriter`.
- `compare_blocks`, from an image to nowhere: workers read and hash batches. In memory: `_BATCHES` batches.

A batch is `pack_reader.BATCH` blocks. The first error ends a stream and is raised in the calling thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle
from queue import SimpleQueue

import numpy as np

from island_fast import _diff
from island_fast.arrays import Bools, Bytes2D, Int64s
from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.errors import DamagedObjectError
from island_fast.formats.pack import compress_blocks, digest_blocks, plain_blocks
from island_fast.formats.runs import Runs
from island_fast.progress import Progress
from island_fast.repository import pack_reader
from island_fast.repository.digests import ExpectedDigests, KnownBlocks
from island_fast.repository.lineage import Lineage
from island_fast.repository.pack_reader import PackReader, group_by_pack, unpack_slots
from island_fast.repository.pack_writer import BlockBatch, PackWriter, WrittenPack
from island_fast.repository.workers import in_order, workers

__all__ = [
    "SendResult",
    "compare_blocks",
    "copy_blocks",
    "find_differing",
    "restore_blocks",
    "send_blocks",
]

_BATCHES = 6  # that are read, or have been and wait: each is in memory
_PACKS_FETCHED = 2  # that are fetched, or have been and wait: each is in memory

_NO_BLOCKS = np.zeros(0, np.int64)

Read = Callable[[Int64s, Bytes2D], None]
"""`read(blocks, rows)` fills `rows`, uint8[n, BLOCK_SIZE]; several threads call it at once."""

Write = Callable[[Int64s, Bytes2D], None]
"""`write(blocks, rows)` stores `rows`, uint8[n, BLOCK_SIZE]; several threads call it at once."""


@dataclass(frozen=True, slots=True)
class SendResult:
    """The packs that were written, and where each block of a stream is.

    `runs` are the blocks in those packs, by pack number; `same` are blocks equal to the parent's, `kept`
    those that earlier attempts stored.
    """

    packs: list[WrittenPack]
    runs: Runs
    same: DirtyMap
    kept: DirtyMap


# From an image into packs.


def send_blocks(
    read: Read,
    data: DirtyMap,
    known: KnownBlocks,
    writer: PackWriter,
    progress: Progress,
    *,
    compress: bool,
) -> SendResult:
    """Read the blocks in `data`, and send those that are neither zero nor `known` to `writer`.

    Returns when every pack is durable. `progress` is called in this thread, with what is durable or need not
    be sent.
    """
    jobs = (
        partial(_read_batch, read, blocks, rows, known, writer.seed, compress)
        for blocks, rows in _with_buffers(data)
    )
    with workers(min(writer.readers, _BATCHES), "read") as pool:
        batches = in_order(pool, jobs, _BATCHES)
        report = partial(progress, "send")
        return _write_packs(batches, writer, data.blocks, data.count(), report)


def _with_buffers(data: DirtyMap) -> Iterator[tuple[Int64s, Bytes2D]]:
    """Yield the blocks in `data` in batches, each with rows to read it into.

    There are `_BATCHES` buffers: a batch gets the one that `_BATCHES` batches before had.
    """
    buffers = cycle([np.empty((pack_reader.BATCH, BLOCK_SIZE), np.uint8) for _ in range(_BATCHES)])
    for blocks in data.batches(pack_reader.BATCH):
        yield blocks, next(buffers)[: blocks.size]


def _read_batch(
    read: Read, blocks: Int64s, rows: Bytes2D, known: KnownBlocks, seed: int, compress: bool
) -> BlockBatch:
    """Read and hash a batch, and encode the blocks of it that are neither known nor zero."""
    read(blocks, rows)
    digests = digest_blocks(rows, seed)
    same = known.parent.matches(blocks, digests)
    kept = known.kept.matches(blocks, digests) & ~same
    fresh = np.flatnonzero(~same & ~kept & ~_find_zeros(rows))
    parts, lengths, codecs = (compress_blocks if compress else plain_blocks)(rows, fresh)
    return BlockBatch(
        blocks.size, blocks[same], blocks[kept], blocks[fresh], parts, lengths, codecs, digests[fresh]
    )


def _find_zeros(rows: Bytes2D) -> Bools:
    zero = np.empty(len(rows), np.uint8)
    _diff.zero_blocks(rows.reshape(-1), BLOCK_SIZE, zero)
    return np.asarray(zero != 0, np.bool_)


def _write_packs(
    batches: Iterable[BlockBatch],
    writer: PackWriter,
    blocks: int,
    total: int,
    report: Callable[[int, int], object],
) -> SendResult:
    """Write `batches`, `total` blocks of a volume of `blocks`; wait until all packs are durable."""
    same, kept = DirtyMap(blocks), DirtyMap(blocks)
    unsent = 0

    def report_durable() -> None:
        report((unsent + writer.durable_blocks) * BLOCK_SIZE, total * BLOCK_SIZE)

    writer.on_durable = report_durable
    with writer:
        for batch in batches:
            same.set_indices(batch.same)
            kept.set_indices(batch.kept)
            writer.add(batch)
            unsent += batch.read - batch.blocks.size
            report_durable()
            del batch  # its bytes go before more are waited for
    return SendResult(writer.written, writer.runs(), same, kept)


# From packs to where a volume is restored.


def restore_blocks(
    runs: Runs,
    packs: PackReader,
    write: Write,
    gap: int,
    progress: Progress,
    wanted: DirtyMap | None = None,
) -> None:
    """Fetch and check every block that `runs` (with pack keys) name, and `write` it.

    With `wanted`, only the blocks in it. Each pack is fetched once: whole if nearly all of its slots are
    wanted, else by ranges merged over gaps of at most `gap` bytes. Blocks come in no particular order, and
    `progress` is called in several threads, one at a time.
    """
    lock, done = threading.Lock(), 0
    total = (runs.blocks if wanted is None else wanted.count()) * BLOCK_SIZE
    at_once = packs.store.downloads
    buffers: SimpleQueue[Bytes2D] = SimpleQueue()  # kept: new memory costs a page fault for every page
    for _ in range(at_once):
        buffers.put(np.empty((pack_reader.BATCH, BLOCK_SIZE), np.uint8))

    def report(blocks: int) -> None:
        nonlocal done
        with lock:
            done += blocks * BLOCK_SIZE
            progress("restore", done, total)

    def restore_pack(key: int, named: Runs) -> None:
        blocks, slots = named.expand()
        if wanted is not None:
            mine = wanted.holds(blocks)
            blocks, slots = blocks[mine], slots[mine]
        buffer = buffers.get()
        try:
            for batch in unpack_slots(packs, key, slots, gap, buffer):
                write(blocks[batch.part], batch.rows)
                report(len(batch.rows))
        finally:
            buffers.put(buffer)

    with workers(at_once, "restore") as pool:
        jobs = (partial(restore_pack, key, named) for key, named in group_by_pack(runs))
        for _ in in_order(pool, jobs, 2 * at_once):
            pass


# From packs of one repository into packs of another.


def copy_blocks(
    runs: Runs,
    packs: PackReader,
    gap: int,
    known: KnownBlocks,
    writer: PackWriter,
    blocks: int,
    progress: Progress,
) -> SendResult:
    """Fetch and check every block that `runs` (with pack keys of `packs`) name, and add it to `writer`.

    Blocks that are `known` on the other side are not fetched; both sides have digests of one seed. If little
    of a pack is wanted, ranges of it are fetched, merged over gaps of at most `gap` bytes. The volume has
    `blocks` blocks. Returns when every pack is durable; DamagedObjectError names a pack that cannot be read.
    `progress` is called in this thread, with what is durable or need not be sent.
    """
    jobs = (
        partial(_fetch_pack, packs, key, named, gap, known, writer.seed) for key, named in group_by_pack(runs)
    )
    with workers(min(packs.store.downloads, _PACKS_FETCHED), "copy") as pool:
        batches = chain.from_iterable(in_order(pool, jobs, _PACKS_FETCHED))
        report = partial(progress, "copy")
        return _write_packs(batches, writer, blocks, runs.blocks, report)


def _fetch_pack(
    packs: PackReader, key: int, runs: Runs, gap: int, known: KnownBlocks, seed: int
) -> list[BlockBatch]:
    """Return the blocks that `runs` name in a pack as they are stored, each decoded and checked.

    They are in the order of their slots; the first batch is of those that need not be sent.
    """
    blocks, slots = runs.expand()
    same, kept = _find_known(packs, key, blocks, slots, known)
    unsent = same | kept
    batches = [
        BlockBatch(
            read=int(unsent.sum()), same=blocks[same], kept=blocks[kept], blocks=_NO_BLOCKS, parts=[],
            lengths=_NO_BLOCKS, codecs=np.zeros(0, np.uint8), digests=np.zeros((0, 16), np.uint8),
        )
    ]  # fmt: skip
    blocks, slots = blocks[~unsent], slots[~unsent]
    for batch in unpack_slots(packs, key, slots, gap):
        if batch.index.header.seed != seed:
            raise DamagedObjectError(f"pack {batch.index.name} has digests of another seed than its volume's")
        columns = batch.index.rows[slots[batch.part]]
        batches.append(
            BlockBatch(
                read=len(batch.rows), same=_NO_BLOCKS, kept=_NO_BLOCKS, blocks=blocks[batch.part],
                parts=list(batch.stored), lengths=columns["length"].astype(np.int64),
                codecs=columns["codec"], digests=np.ascontiguousarray(columns["digest"]),
            )
        )  # fmt: skip
    return batches


def _find_known(
    packs: PackReader, key: int, blocks: Int64s, slots: Int64s, known: KnownBlocks
) -> tuple[Bools, Bools]:
    """Return which blocks of a pack the parent on the other side has, and which an earlier attempt stored."""
    none = np.zeros(blocks.size, np.bool_)
    if not (known.parent.names(blocks) or known.kept.names(blocks)):
        return none, none
    index = packs.read_index(key)
    if int(slots.max()) >= len(index.rows):
        return none, none  # damage, which fetching the pack reports
    digests = index.digests[slots]
    same = known.parent.matches(blocks, digests)
    return same, known.kept.matches(blocks, digests) & ~same


# From an image to nowhere.


def compare_blocks(
    read: Read, data: DirtyMap, expected: ExpectedDigests, lineage: Lineage, progress: Progress
) -> tuple[DirtyMap, DirtyMap]:
    """Read the blocks in `data`; return which differ from `expected`, and which have no readable digest.

    A block of which nothing is expected should be zero. `progress` is called in this thread.
    """
    differing, unknown = DirtyMap(data.blocks), DirtyMap(data.blocks)
    done, total = 0, data.count()

    def compare_batch(blocks: Int64s, rows: Bytes2D) -> tuple[Int64s, Int64s, int]:
        return *find_differing(read, blocks, rows, expected, lineage.seed), blocks.size

    jobs = (partial(compare_batch, blocks, rows) for blocks, rows in _with_buffers(data))
    with workers(min(lineage.store.readers, _BATCHES), "compare") as pool:
        for other, unread, size in in_order(pool, jobs, _BATCHES):
            differing.set_indices(other)
            unknown.set_indices(unread)
            done += size
            progress("compare", done * BLOCK_SIZE, total * BLOCK_SIZE)
    return differing, unknown


def find_differing(
    read: Read, blocks: Int64s, rows: Bytes2D, expected: ExpectedDigests, seed: int
) -> tuple[Int64s, Int64s]:
    """Read `blocks` into `rows`; return those that differ from `expected`, and those without a known digest.

    A block of which nothing is expected should be zero.
    """
    read(blocks, rows)
    digests, known, unread = expected.digests_of(blocks)
    equal = (digest_blocks(rows, seed) == digests).all(axis=1)
    differs = np.where(known, ~equal, ~_find_zeros(rows)) & ~unread
    return blocks[differs], blocks[unread]
