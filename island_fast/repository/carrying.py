"""The third stream of blocks: out of packs of one repository into packs of another.

Blocks travel as they are stored. Each is decoded and checked on the way, and none is compressed again. Each
pack is fetched once, by a fixed number of workers; packs on the other side are filled as a snapshot's are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np

from island_fast.arrays import Bools, Int64s
from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.errors import DamagedObjectError
from island_fast.formats.pack import Index
from island_fast.formats.runs import Runs
from island_fast.progress import Progress
from island_fast.repository.pack_reader import PackReader
from island_fast.repository.streams import Batch, Known, PackSink, Sent, by_pack, expand, unpacked, workers

__all__ = ["carry"]

_NONE = np.zeros(0, np.int64)
_FETCHING = 2  # packs that are being fetched, or have been and wait: each is in memory


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
        blocks, slots = expand(runs)
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
