"""Plans for giving space back: which slots a delete frees, and what a sweep removes and rewrites.

A delete looks at the snapshot and its live neighbours only; a sweep reads no manifests. Rules:
docs/format.md, "Delete and sweep". Doubt removes nothing: a listing only ever adds candidates, which must
be unknown to the state, of no registered snapshot, and older than the grace. `repository.py` and
`sweeping.py` carry the plans out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from island_fast.arrays import Int64s
from island_fast.dirtymap import distinct, merge_intervals, subtract_intervals
from island_fast.errors import UNREADABLE, DamagedObjectError
from island_fast.formats.catalog import Packs, Record, SnapshotRow, State, manifest_name, pack_full_name
from island_fast.formats.keys import PACK_BITS, SLOT_BITS, SnapshotNumbers
from island_fast.formats.pack import Index
from island_fast.repository.lineage import Lineage
from island_fast.repository.pack_reader import PackReader
from island_fast.stores.base import ObjectInfo

__all__ = [
    "GARBAGE_AGE",
    "Deletion",
    "SweepPlan",
    "freeable",
    "live_slots",
    "needed_alone",
    "pack_names",
    "plan_delete",
    "plan_sweep",
    "row_manifest_name",
    "steps",
    "with_more_dead",
]

GARBAGE_AGE = 24 * 3600.0
"""Seconds: what no record names must be this old, on any store."""

_LOG = logging.getLogger(__name__)
_SLOT_MASK = (1 << SLOT_BITS) - 1


@dataclass(frozen=True, slots=True)
class Deletion:
    """What a delete frees: the record's slots and packs, and two figures in bytes.

    `unreferenced` are the stored bytes of slots that become dead and the manifest; `freed` is what the next
    sweep removes because of this delete, less what it rewrites.
    """

    record: Record
    unreferenced: int
    freed: int


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What a sweep of one lineage will do.

    `gone` and `repacked` are rows of `state.packs`; `manifests` are deleted snapshots; `garbage` are objects
    that no record names. Sizes are in bytes.
    """

    gone: Packs
    repacked: Packs
    manifests: tuple[SnapshotRow, ...]
    garbage: tuple[ObjectInfo, ...]

    @property
    def removed(self) -> int:
        """Bytes of the objects that will be deleted."""
        listed = sum(row.manifest_size for row in self.manifests)
        listed += sum(info.size for info in self.garbage)
        return listed + int(self.gone.size.sum() + self.repacked.size.sum())

    @property
    def rewritten(self) -> int:
        """Bytes of the packs that will be written anew."""
        return int((self.repacked.size - self.repacked.dead).sum())

    @property
    def freed(self) -> int:
        """Bytes removed less bytes rewritten."""
        return self.removed - self.rewritten

    @property
    def objects(self) -> int:
        """Number of objects that will be deleted."""
        return len(self.gone) + len(self.repacked) + len(self.manifests) + len(self.garbage)


def plan_delete(
    lineage: Lineage,
    row: SnapshotRow,
    packs: PackReader,
    time: int,
) -> Deletion:
    """What deleting the live snapshot `row` frees."""
    state, numbers = lineage.state, lineage.numbers
    free = needed_alone(state, numbers, row, lambda one: lineage.manifest(one).slot_intervals(numbers))
    record = Record(
        lineage=lineage.name, epoch=0, number=0, writer="", host="", previous=None, time=time,
        event="delete", seed=0, deleted=(row.id,), dead=free,
        packs=with_more_dead(state.packs, free, packs.index),
    )  # fmt: skip
    after = state.after(record)
    bytes_dead = int(record.packs.dead.sum()) - _dead_before(state.packs, record.packs)
    return Deletion(record, bytes_dead + row.manifest_size, freeable(after) - freeable(state))


def needed_alone(
    state: State, numbers: SnapshotNumbers, row: SnapshotRow, slots: Callable[[SnapshotRow], Int64s]
) -> Int64s:
    """Slot keys that no live snapshot but `row` needs, int64[n, 2], merged, by its live neighbours.

    `slots(row)` gives what a snapshot needs. Siblings are asked for only when the snapshot holds, outside its
    parent, a slot in a pack that it did not write itself (design: only then can a sibling share one that the
    parent lacks).
    """
    free = slots(row)
    parent = state.live.get(row.parent or "")
    neighbours = state.children(row.id) + ([parent] if parent else [])
    for neighbour in neighbours:
        free = subtract_intervals(free, slots(neighbour))
    if (free[:, 0] >> (SLOT_BITS + PACK_BITS) != numbers.number(row.id)).any():
        for sibling in state.children(row.parent):
            if sibling.id != row.id:
                free = subtract_intervals(free, slots(sibling))
    return merge_intervals(free)


def freeable(state: State) -> int:
    """Bytes that a sweep without grace would free of what the catalog names: removed less rewritten."""
    gone, repacked = _packs_to_sweep(state)
    manifests = sum(row.manifest_size for row in state.dropped.values())
    return int(gone.size.sum() + repacked.dead.sum()) + manifests


def _dead_before(packs: Packs, touched: Packs) -> int:
    return int(packs.dead[packs.find(touched.key)].sum())


def with_more_dead(packs: Packs, free: Int64s, index: Callable[[int], Index]) -> Packs:
    """The rows of packs that lose slots, with the stored bytes of those slots added to their dead.

    `free` are slot keys, int64[n, 2], merged; `index(key)` gives a pack's index. Of a pack that cannot be
    read, bytes are estimated by slots: they decide only when it is swept. DamagedObjectError for a pack that
    `packs` lacks, or a slot that its pack does.
    """
    keys = distinct(free[:, 0] >> SLOT_BITS)
    at = packs.find(keys)
    if (at < 0).any():
        raise DamagedObjectError("a manifest names a pack that the catalog does not; nothing was deleted")
    rows = packs.rows(at)
    dead = rows.dead.copy()
    bounds = np.append(np.searchsorted(free[:, 0], keys << SLOT_BITS), len(free))
    for row in range(len(rows)):
        mine = free[bounds[row] : bounds[row + 1]]
        first = mine[:, 0] & _SLOT_MASK
        stop = first + mine[:, 1] - mine[:, 0]
        if int(stop.max()) > int(rows.slots[row]):
            raise DamagedObjectError("a manifest names a slot that its pack lacks; nothing was deleted")
        ends = _ends(rows, row, index)
        dead[row] += int((ends[stop] - ends[first]).sum())
    return replace(rows, dead=np.minimum(dead, rows.size))


def _ends(packs: Packs, row: int, index: Callable[[int], Index]) -> Int64s:
    """Stored bytes before each slot of a pack, and in all; estimated if the pack cannot be read."""
    slots, size = int(packs.slots[row]), int(packs.size[row])
    try:
        lengths = index(int(packs.key[row])).lengths
        if lengths.size != slots:
            raise DamagedObjectError("a pack has other slots than the catalog says")
    except UNREADABLE as error:
        _LOG.warning("%s; the bytes that are freed are an estimate", error)
        return np.arange(slots + 1) * size // max(slots, 1)
    return np.append(0, np.cumsum(lengths))


def _packs_to_sweep(state: State) -> tuple[Packs, Packs]:
    """Packs without a live slot, and packs that are more than half dead."""
    packs = state.packs
    dead_slots = np.zeros(len(packs), np.int64)
    rows = packs.find(state.dead[:, 0] >> SLOT_BITS)
    if (rows < 0).any():
        raise DamagedObjectError(
            "the catalog counts dead slots of a pack that it does not name; nothing was removed"
        )
    np.add.at(dead_slots, rows, state.dead[:, 1] - state.dead[:, 0])
    gone = dead_slots >= packs.slots
    return packs.rows(gone), packs.rows(~gone & (2 * packs.dead > packs.size))


def plan_sweep(lineage: Lineage, grace: float, given_up: Collection[str] = ()) -> SweepPlan:
    """What a sweep would do now. Under the lineage's lock, after `refresh`.

    An object is taken only if the store says that it is older than `grace` seconds. The registrations of the
    snapshots `given_up` account for nothing any more.
    """
    old = _Ages(lineage, grace)
    gone, repacked = _packs_to_sweep(lineage.state)
    manifests = lineage.state.dropped.values()
    return SweepPlan(
        gone=gone.rows(old.mask(pack_names(lineage, gone))),
        repacked=repacked.rows(old.mask(pack_names(lineage, repacked))),
        manifests=tuple(row for row in manifests if old.there(row_manifest_name(lineage, row))),
        garbage=tuple(_garbage(lineage, max(grace, GARBAGE_AGE), given_up)),
    )


def steps(lineage: Lineage, plan: SweepPlan) -> Iterator[tuple[str, str, int, str]]:
    """The plan object by object: "remove" or "rewrite", its name, its size in bytes, and why."""
    for name, size in zip(pack_names(lineage, plan.gone), plan.gone.size.tolist(), strict=True):
        yield "remove", name, size, "no snapshot needs it"
    sizes = zip(plan.repacked.size.tolist(), plan.repacked.dead.tolist(), strict=True)
    for name, (size, dead) in zip(pack_names(lineage, plan.repacked), sizes, strict=True):
        yield "rewrite", name, size, f"{100 * dead // size} % of it is needed no more"
    for row in plan.manifests:
        yield "remove", row_manifest_name(lineage, row), row.manifest_size, "its snapshot was deleted"
    for info in plan.garbage:
        yield "remove", info.name, info.size, "no record names it"


@dataclass(frozen=True, slots=True)
class _Ages:
    """Whether objects are old enough to go. A grace of 0 asks the store nothing."""

    lineage: Lineage
    grace: float

    def there(self, name: str) -> bool:
        if self.grace <= 0:
            return True
        info = self.lineage.store.head(name)
        return info is None or info.age >= self.grace

    def mask(self, names: Iterable[str]) -> NDArray[np.bool_]:
        return np.array([self.there(name) for name in names], np.bool_)


def pack_names(lineage: Lineage, packs: Packs) -> list[str]:
    """Full names of packs of the lineage."""
    return [pack_full_name(lineage.name, packs, row, lineage.numbers) for row in range(len(packs))]


def row_manifest_name(lineage: Lineage, row: SnapshotRow) -> str:
    """Name of the manifest of a snapshot, live or dropped."""
    return manifest_name(lineage.name, row.id, row.attempt)


def _garbage(lineage: Lineage, age: float, given_up: Collection[str]) -> Iterable[ObjectInfo]:
    """Packs and manifests that a listing shows and no record or registration accounts for."""
    state = lineage.state
    named = set(pack_names(lineage, state.packs))
    for row in [*state.live.values(), *state.dropped.values()]:
        named.add(row_manifest_name(lineage, row))
    running = {registration.snapshot for registration, _ in lineage.files.running()}.difference(given_up)
    for kind in ("packs", "manifests"):
        for info in lineage.store.list(f"{lineage.name}/{kind}/"):
            snapshot = info.name.split("/")[2].partition("-")[0]
            if info.name not in named and snapshot not in running and info.age >= age:
                yield info


def live_slots(state: State, key: int, slots: int) -> NDArray[np.bool_]:
    """Which of a pack's slots are not dead."""
    keep = np.ones(slots, np.bool_)
    at, end = np.searchsorted(state.dead[:, 0], [key << SLOT_BITS, (key + 1) << SLOT_BITS])
    for first, stop in (state.dead[at:end] - (key << SLOT_BITS)).tolist():
        keep[first:stop] = False
    return keep
