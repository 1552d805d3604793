"""Giving space back: which slots a delete frees, and what a sweep removes and rewrites.

A delete looks at the snapshot and its live neighbours only; a sweep reads no manifests. Everything is
planned first; carrying a plan out can be cut off anywhere and done again. Rules: docs/format.md, "Delete
and sweep". Doubt removes nothing: a listing only ever adds candidates, which must be unknown to the state,
of no registered snapshot, and older than the grace.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from island_fast.catalog import Packs, Record, SnapshotRow, State, manifest_name, pack_full_name
from island_fast.dirtymap import merge_intervals, subtract_intervals
from island_fast.errors import DamagedObjectError
from island_fast.lineage import Lineage
from island_fast.pack import ABSENT, Index, open_pack, seal_pack
from island_fast.packreader import PackReader
from island_fast.progress import Progress, silent
from island_fast.slots import PACK_BITS, SLOT_BITS
from island_fast.stores.base import ObjectInfo

__all__ = ["Deletion", "SweepPlan", "execute_sweep", "plan_delete", "plan_sweep"]

Int64s = NDArray[np.int64]
GARBAGE_AGE = 24 * 3600.0  # what no record names must be this old, on any store

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
    def objects(self) -> int:
        """Number of objects that will be deleted."""
        return len(self.gone) + len(self.repacked) + len(self.manifests) + len(self.garbage)


def plan_delete(
    lineage: Lineage,
    row: SnapshotRow,
    packs: PackReader,
    time: int,
) -> Deletion:
    """What deleting the live snapshot `row` frees, by its live neighbours' manifests.

    Siblings are read only when the snapshot holds, outside its parent, a slot in a pack that it did not
    write itself (design: only then can a sibling share one that the parent lacks).
    """
    state, numbers = lineage.state, lineage.numbers
    free = lineage.manifest(row).slot_intervals(numbers)
    parent = state.live.get(row.parent or "")
    neighbours = state.children(row.id) + ([parent] if parent else [])
    for neighbour in neighbours:
        free = subtract_intervals(free, lineage.manifest(neighbour).slot_intervals(numbers))
    if (free[:, 0] >> (SLOT_BITS + PACK_BITS) != numbers.number(row.id)).any():
        for sibling in state.children(row.parent):
            if sibling.id != row.id:
                free = subtract_intervals(free, lineage.manifest(sibling).slot_intervals(numbers))
    free = merge_intervals(free)
    record = Record(
        lineage=lineage.name, epoch=0, number=0, writer="", host="", previous=None, time=time,
        event="delete", seed=0, deleted=(row.id,), dead=free,
        packs=_with_more_dead(state.packs, free, packs),
    )  # fmt: skip
    after = state.after(record)
    bytes_dead = int(record.packs.dead.sum()) - _dead_before(state.packs, record.packs)
    before_plan, after_plan = _packs_to_sweep(state), _packs_to_sweep(after)
    freed = _saved(after_plan) - _saved(before_plan) + row.manifest_size
    return Deletion(record, bytes_dead + row.manifest_size, freed)


def _saved(plan: tuple[Packs, Packs]) -> int:
    gone, repacked = plan
    return int(gone.size.sum() + repacked.dead.sum())


def _dead_before(packs: Packs, touched: Packs) -> int:
    return int(packs.dead[packs.find(touched.key)].sum())


def _with_more_dead(packs: Packs, free: Int64s, reader: PackReader) -> Packs:
    """The rows of packs that lose slots, with the stored bytes of those slots added to their dead."""
    keys = np.unique(free[:, 0] >> SLOT_BITS)
    at = packs.find(keys)
    if (at < 0).any():
        raise DamagedObjectError("a manifest names a pack that the catalog does not; nothing was deleted")
    rows = packs.rows(at)
    dead = rows.dead.copy()
    for row, key in enumerate(keys.tolist()):
        lengths = np.append(0, np.cumsum(reader.index(key).lengths))
        mine = free[free[:, 0] >> SLOT_BITS == key]
        first = mine[:, 0] & _SLOT_MASK
        stop = first + mine[:, 1] - mine[:, 0]
        if int(stop.max()) >= lengths.size:
            raise DamagedObjectError("a manifest names a slot that its pack lacks; nothing was deleted")
        dead[row] += int((lengths[stop] - lengths[first]).sum())
    return replace(rows, dead=dead)


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


def plan_sweep(lineage: Lineage, grace: float) -> SweepPlan:
    """What a sweep would do now. Under the lineage's lock, after `refresh`.

    An object is taken only if the store says that it is older than `grace` seconds.
    """
    old = _Ages(lineage, grace)
    gone, repacked = _packs_to_sweep(lineage.state)
    manifests = lineage.state.dropped.values()
    return SweepPlan(
        gone=gone.rows(old.mask(_pack_names(lineage, gone))),
        repacked=repacked.rows(old.mask(_pack_names(lineage, repacked))),
        manifests=tuple(row for row in manifests if old.there(_manifest_of(lineage, row))),
        garbage=tuple(_garbage(lineage, max(grace, GARBAGE_AGE))),
    )


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


def _pack_names(lineage: Lineage, packs: Packs) -> list[str]:
    return [pack_full_name(lineage.name, packs, row, lineage.numbers) for row in range(len(packs))]


def _manifest_of(lineage: Lineage, row: SnapshotRow) -> str:
    return manifest_name(lineage.name, row.id, row.attempt)


def _garbage(lineage: Lineage, age: float) -> Iterable[ObjectInfo]:
    """Packs and manifests that a listing shows and no record or registration accounts for."""
    state = lineage.state
    named = set(_pack_names(lineage, state.packs))
    for row in [*state.live.values(), *state.dropped.values()]:
        named.add(_manifest_of(lineage, row))
    running = {registration.snapshot for registration, _ in lineage.files.running()}
    for kind in ("packs", "manifests"):
        for info in lineage.store.list(f"{lineage.name}/{kind}/"):
            snapshot = info.name.split("/")[2].partition("-")[0]
            if info.name not in named and snapshot not in running and info.age >= age:
                yield info


def execute_sweep(
    lineage: Lineage, plan: SweepPlan, writer: str, time: int, progress: Progress = silent
) -> None:
    """Carry `plan` out. Under the lineage's lock, as its owner. Progress counts bytes rewritten and deleted.

    Repacked packs are durable before the record that switches their names; the record is durable before the
    first object is deleted.
    """
    lineage.require_owner(writer)
    old_names = _pack_names(lineage, plan.repacked)
    done, total = 0, plan.removed + plan.rewritten

    def told(size: int) -> None:
        nonlocal done
        done += size
        progress("sweep", done, total)

    renamed = _repack(lineage, plan.repacked, old_names, told)
    gone_names = _pack_names(lineage, plan.gone)
    record = Record(
        lineage=lineage.name, epoch=0, number=0, writer=writer, host="", previous=None, time=time,
        event="sweep", seed=0, packs=renamed, gone=plan.gone.key,
        swept=tuple(row.id for row in plan.manifests),
    )  # fmt: skip
    if len(renamed) or plan.gone.key.size or plan.manifests:
        lineage.append(record, writer)
    doomed = [*zip(gone_names, plan.gone.size.tolist(), strict=True)]
    doomed += zip(old_names, plan.repacked.size.tolist(), strict=True)
    doomed += [(info.name, info.size) for info in plan.garbage]
    doomed += [(_manifest_of(lineage, row), row.manifest_size) for row in plan.manifests]
    retired = {one.snapshot for one in lineage.files.retired()}
    for name, size in doomed:
        lineage.store.delete(name)
        told(size)
        if name.split("/")[2].partition("-")[0] not in retired:
            lineage.files.uncache(name)


def _repack(lineage: Lineage, packs: Packs, names: list[str], told: Callable[[int], None]) -> Packs:
    """Write each of `packs` anew without its dead slots; returns their new rows. `told` gets bytes kept."""
    sizes, suffixes = packs.size.copy(), packs.suffix.copy()
    for row, name in enumerate(names):
        suffixes[row] = secrets.randbits(62) + 1
        renamed = replace(packs, suffix=suffixes)
        target = pack_full_name(lineage.name, renamed, row, lineage.numbers)
        index, data = open_pack(name, lineage.store.get(name))
        keep = _live_slots(lineage.state, int(packs.key[row]), len(index.rows))
        sizes[row] = _write_kept(lineage, target, index, data, keep)
        told(int(packs.size[row] - packs.dead[row]))
    return replace(packs, suffix=suffixes, size=sizes, dead=np.zeros_like(sizes))


def _live_slots(state: State, key: int, slots: int) -> NDArray[np.bool_]:
    """Which of a pack's slots are not dead."""
    keep = np.ones(slots, np.bool_)
    mine = state.dead[state.dead[:, 0] >> SLOT_BITS == key]
    for first, stop in (mine - (key << SLOT_BITS)).tolist():
        keep[first:stop] = False
    return keep


def _write_kept(
    lineage: Lineage, target: str, index: Index, data: memoryview, keep: NDArray[np.bool_]
) -> int:
    """Write a pack of the slots to keep, each under its old number; returns the object's size."""
    rows = index.rows
    lengths = np.where(keep, rows["length"].astype(np.int64), 0)
    starts = rows["offset"].astype(np.int64) + index.data_start
    spans = merge_intervals(np.stack([starts, starts + lengths], axis=1)[lengths > 0])
    codecs = np.where(keep, rows["codec"], ABSENT).astype(np.uint8)
    parts, size = seal_pack(
        target, index.header, [data[a:b] for a, b in spans.tolist()], lengths, codecs, index.digests
    )
    lineage.store.put(target, parts)
    return size
