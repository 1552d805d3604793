"""`sweep`: plan what one lineage no longer needs, and remove or rewrite it step by step.

The plan is made from the catalog and a listing; no manifest is read. Doubt removes nothing. A listing only
ever adds candidates, and these must be unknown to the catalog, belong to no registered snapshot, be left by a
snapshot that this host can account for, and be older than the grace, as the store says of each by name. What
else a listing shows is reported and stays, unless the caller wants it removed. Rules: docs/format.md, "Delete
and sweep".

Repacked packs are durable before the record that switches their names, and the record is durable before the
first object is deleted. A sweep that was interrupted anywhere is simply run again. The lineage's lock is held
only while planning and while appending the record, so snapshots continue meanwhile; sweeps run one at a time,
under a lock of their own. docs/reliability.md says what a crash leaves at each step.

Where room is short, packs that find none are repacked after everything else was deleted. If even the record
finds none, what the sweep has just written, and garbage, go first: no record names them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from island_fast.arrays import Int64s
from island_fast.dirtymap import merge_intervals
from island_fast.errors import UNREADABLE, ConflictError, IslandError, ObjectMissingError, StoreFullError
from island_fast.formats.catalog import ObjectsSwept, Packs, SnapshotRow
from island_fast.formats.names import manifest_name, parse_snapshot
from island_fast.formats.pack import ABSENT, Index, open_pack, seal_pack
from island_fast.progress import Progress
from island_fast.repository.lineage import Lineage
from island_fast.repository.liveness import rebase_rewritten
from island_fast.repository.snapshot_writer import named_ids, remove_used_registrations
from island_fast.results import SweepStep, Swept
from island_fast.stores.base import ObjectInfo
from island_fast.stores.checked_read import get_checked

__all__ = ["GARBAGE_AGE", "SweepPlan", "Waiting", "plan_sweep", "sweep"]

GARBAGE_AGE = 24 * 3600.0
"""Seconds: an object that no record names is only removed at this age, on any store."""

_MOST = 1 << 17
"""How many objects that no record names one sweep removes, and how many others it lists: a store can claim
any number, and each takes memory. The next sweep goes on."""

_UNKNOWN = "no record names it, and this host did not store it"
_YOUNG = "no snapshot needs it, but it is younger than the grace"
_ASKED_AGAIN = 60.0  # seconds after which a sweep that still deletes looks again whether its epoch is over
_LOG = logging.getLogger(__name__)


def sweep(
    lineage: Lineage, grace: float, dry_run: bool, unknown: bool, progress: Progress
) -> tuple[Swept, list[IslandError]]:
    """Sweep `lineage`, just refreshed, as its owner; return what was done, or with `dry_run` would be.

    With `unknown`, objects that this host cannot account for are removed, too. Progress counts bytes
    rewritten and deleted. ConflictError, with nothing deleted, if another host adopted the lineage meanwhile,
    or a listing shows records that cannot be read; DamagedObjectError if the store does not hold the newest
    record that this host knows. A pack that cannot be read is not repacked, with a warning. Return also the
    error if some could not be repacked for want of room.
    """
    done: list[SweepPlan] = []
    kept = 0
    errors: list[IslandError] = []
    with lineage.files.lock_sweeps():
        if not dry_run:
            lineage.files.remove_leftovers()
        with lineage.hold_lock(just_read=True):
            lineage.require_owner()
            lineage.require_standing()
            lineage.require_end_of_listing()
            remove_used_registrations(lineage)
            given_up = lineage.files.registrations.find_abandoned(max(grace, GARBAGE_AGE))
            registered = {one.snapshot for one, _ in lineage.files.registrations.all()}
            accounted = lineage.files.accounted.all() | named_ids(lineage) | registered
            if not dry_run:
                lineage.files.accounted.add(accounted)
                for snapshot in given_up:
                    lineage.files.registrations.remove(snapshot)
            running = registered.difference(given_up)
            plan = plan_sweep(lineage, grace, accounted, running, unknown)
        while not dry_run and plan.objects:
            run = _SweepRun(lineage, plan, progress)
            plan = run.run()
            done.append(plan)
            kept += run.kept
            if run.lacking is not None and plan.objects:  # what was deleted has made room
                with lineage.hold_lock():
                    plan = plan_sweep(lineage, grace, accounted, running, unknown)
            else:
                errors += [run.lacking] if run.lacking is not None else []
                break
    done = done or [plan]
    removed, rewritten = sum(one.removed for one in done), sum(one.rewritten for one in done)
    waiting = done[-1].waiting
    answer = Swept(
        volume=lineage.name,
        objects_removed=sum(one.objects for one in done),
        packs_repacked=sum(len(one.repacked) for one in done),
        bytes_removed=removed,
        bytes_rewritten=rewritten,
        bytes_kept=kept,
        bytes_freed=max(0, removed - rewritten - kept),
        objects_unknown=done[-1].unknown_objects,
        bytes_unknown=done[-1].unknown_bytes,
        objects_waiting=len(waiting),
        bytes_waiting=sum(one.freed for one in waiting),
        steps=(
            *(step for one in done for step in _list_steps(lineage, one)),
            *(SweepStep("keep", one.name, one.size, _YOUNG) for one in waiting),
            *(SweepStep("keep", one.name, one.size, _UNKNOWN) for one in done[-1].unknown),
        ),
    )
    return answer, errors


@dataclass(frozen=True, slots=True)
class Waiting:
    """An object that a sweep will remove or rewrite when it is old enough.

    `size` is what it takes now, and `freed` what the sweep will free of that.
    """

    name: str
    size: int
    freed: int


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What a sweep of one lineage will do.

    `gone` and `repacked` are rows of `state.packs`; `manifests` are deleted snapshots; `garbage` are objects
    that no record names. `unknown` are those that stay, because this host cannot account for them either: the
    first ones listed, of `unknown_objects`. `waiting` are those that stay only because they are younger than
    the grace. Sizes are in bytes.
    """

    gone: Packs
    repacked: Packs
    manifests: tuple[SnapshotRow, ...]
    garbage: tuple[ObjectInfo, ...]
    unknown: tuple[ObjectInfo, ...] = ()
    unknown_objects: int = 0
    unknown_bytes: int = 0
    waiting: tuple[Waiting, ...] = ()

    @property
    def removed(self) -> int:
        """The size of the objects that will be deleted."""
        listed = sum(row.manifest_size for row in self.manifests)
        listed += sum(info.size for info in self.garbage)
        return listed + int(self.gone.size.sum() + self.repacked.size.sum())

    @property
    def rewritten(self) -> int:
        """The size of the packs that will be written again."""
        return int((self.repacked.size - self.repacked.dead).sum())

    @property
    def objects(self) -> int:
        """The number of objects that will be deleted."""
        return len(self.gone) + len(self.repacked) + len(self.manifests) + len(self.garbage)


def plan_sweep(
    lineage: Lineage,
    grace: float,
    accounted: Collection[str] = (),
    running: Collection[str] = (),
    unknown: bool = False,
) -> SweepPlan:
    """Plan what a sweep would do now. Under the lineage's lock, after `refresh`.

    An object is removed only if the store says that it is older than `grace` seconds. Objects of the
    snapshots `running` are no garbage; those of other snapshots than the `accounted` ones, and what has no
    name of an object, only if `unknown` ones are to be removed.
    """
    ages = _Ages(lineage, grace)
    gone, repacked = lineage.state.packs_to_sweep()
    old_gone, old_repacked = (ages.mask(lineage.pack_names(packs)) for packs in (gone, repacked))
    dropped = lineage.state.dropped.values()
    old_manifests = {row.id for row in dropped if ages.is_old(lineage.manifest_name(row))}
    garbage: list[ObjectInfo] = []
    left: list[ObjectInfo] = []
    objects = size = 0
    age = max(grace, GARBAGE_AGE)
    for info, snapshot in _find_unnamed(lineage):
        if snapshot in running or info.age < age:
            continue
        if snapshot not in accounted and not unknown:
            objects, size = objects + 1, size + info.size
            if len(left) < _MOST:
                left.append(info)
        elif len(garbage) < _MOST and _is_confirmed(lineage, info, age):
            garbage.append(info)
    return SweepPlan(
        gone=gone.rows(old_gone),
        repacked=repacked.rows(old_repacked),
        manifests=tuple(row for row in dropped if row.id in old_manifests),
        garbage=tuple(sorted(garbage, key=lambda one: one.name)),
        unknown=tuple(sorted(left, key=lambda one: one.name)),
        unknown_objects=objects,
        unknown_bytes=size,
        waiting=(
            *_list_waiting(lineage, gone.rows(~old_gone), gone.size[~old_gone]),
            *_list_waiting(lineage, repacked.rows(~old_repacked), repacked.dead[~old_repacked]),
            *(
                Waiting(lineage.manifest_name(row), row.manifest_size, row.manifest_size)
                for row in dropped
                if row.id not in old_manifests
            ),
        ),
    )


def _list_waiting(lineage: Lineage, packs: Packs, freed: Int64s) -> Iterator[Waiting]:
    """Yield packs that are too young, each with what a sweep will free of it."""
    sizes = zip(packs.size.tolist(), freed.tolist(), strict=True)
    for name, (size, less) in zip(lineage.pack_names(packs), sizes, strict=True):
        yield Waiting(name, size, less)


def _list_steps(lineage: Lineage, plan: SweepPlan) -> Iterator[SweepStep]:
    """Yield the plan object by object."""
    for name, size in zip(lineage.pack_names(plan.gone), plan.gone.size.tolist(), strict=True):
        yield SweepStep("remove", name, size, "no snapshot needs it")
    sizes = zip(plan.repacked.size.tolist(), plan.repacked.dead.tolist(), strict=True)
    for name, (size, dead) in zip(lineage.pack_names(plan.repacked), sizes, strict=True):
        yield SweepStep("rewrite", name, size, f"no snapshot needs {100 * dead // size} % of it")
    for row in plan.manifests:
        yield SweepStep("remove", lineage.manifest_name(row), row.manifest_size, "its snapshot was deleted")
    for info in plan.garbage:
        yield SweepStep("remove", info.name, info.size, "no record names it")


@dataclass(frozen=True, slots=True)
class _Ages:
    """Whether objects are old enough to be removed. With a grace of 0 the store is not asked."""

    lineage: Lineage
    grace: float

    def is_old(self, name: str) -> bool:
        if self.grace <= 0:
            return True
        info = self.lineage.store.head(name)
        return info is None or info.age >= self.grace

    def mask(self, names: Iterable[str]) -> NDArray[np.bool_]:
        return np.array([self.is_old(name) for name in names], np.bool_)


def _find_unnamed(lineage: Lineage) -> Iterator[tuple[ObjectInfo, str | None]]:
    """Yield what a listing shows below packs/ and manifests/ and no record names, with its snapshot's id.

    The id is None if the name is not one of a pack or a manifest.
    """
    named = _list_named(lineage)
    for kind in ("packs", "manifests"):
        for info in lineage.store.list(f"{lineage.name}/{kind}/"):
            if info.name not in named:
                yield info, parse_snapshot(lineage.name, info.name)


def _list_named(lineage: Lineage) -> set[str]:
    """Return the names of all packs and manifests that the state names."""
    rows = [*lineage.state.live.values(), *lineage.state.dropped.values()]
    return {*lineage.pack_names(lineage.state.packs), *map(lineage.manifest_name, rows)}


def _is_confirmed(lineage: Lineage, listed: ObjectInfo, age: float) -> bool:
    """Return whether the store says by name, too, that there is such an object, of that size and so old."""
    info = lineage.store.head(listed.name)
    return info is not None and info.size == listed.size and info.age >= age


class _SweepRun:
    """A plan being carried out.

    `lacking` is the error if a pack found no room, `kept` how many bytes the store keeps of what it removed.
    """

    def __init__(self, lineage: Lineage, plan: SweepPlan, progress: Progress) -> None:
        self._lineage = lineage
        self._plan = plan
        self._progress = progress
        self._done, self._total = 0, plan.removed + plan.rewritten
        self.lacking: StoreFullError | None = None
        self.kept = 0

    def run(self) -> SweepPlan:
        """Rewrite, record, delete; return the plan without the packs that could not be rewritten."""
        epoch = self._lineage.epoch
        readable, renamed = self._repack()
        self._plan = replace(self._plan, repacked=readable)
        try:
            self._record(epoch, renamed)
        except StoreFullError as error:  # so it is certain that no record names what was just written
            with self._lineage.files.lock():
                self._lineage.refresh()  # the record that was refused can be an earlier command's
            self._lineage.require_open()
            named = _list_named(self._lineage)
            unnamed = [*self._lineage.pack_names(renamed), *(info.name for info in self._plan.garbage)]
            unnamed = [name for name in unnamed if name not in named]
            if not unnamed:
                raise
            for name in unnamed:
                self._lineage.store.delete(name)
            self.lacking = error if len(renamed) else self.lacking
            self._plan = replace(self._plan, repacked=readable.rows(np.zeros(len(readable), np.bool_)))
            self._record(epoch, renamed.rows(np.zeros(len(renamed), np.bool_)))
        doomed = list(self._list_doomed())
        asked = time.monotonic()
        retired = self._lineage.files.deleted_snapshots()
        kept = {manifest_name(self._lineage.name, one.snapshot, one.attempt) for one in retired}
        store = self._lineage.store
        held = store.count_bytes() if doomed else None
        for name, size in doomed:
            if time.monotonic() - asked > _ASKED_AGAIN:
                self._lineage.require_open()
                asked = time.monotonic()
            self._lineage.store.delete(name)
            self._report(size)
            if name not in kept:  # the base of a table diff may need it
                self._lineage.files.cache.remove(name)
        left = store.count_bytes() if held is not None else None
        if store.keeps_deleted or (held is not None and left is not None and left >= held):
            self.kept = self._plan.removed
        return self._plan

    def _record(self, epoch: int, renamed: Packs) -> None:
        """Append the sweep's record, if the lineage is still in `epoch`; leave out of the plan what is named.

        Nothing is deleted before this, so it is the moment to look once more for the end of the epoch. The
        plan can be of a catalog that was not read to its end.
        """
        lineage = self._lineage
        with lineage.hold_lock(sure=True):
            if lineage.epoch != epoch:
                raise ConflictError(
                    f"volume {lineage.name} was adopted during the sweep, so nothing was deleted; "
                    "run it again"
                )
            named = _list_named(lineage)
            garbage = tuple(one for one in self._plan.garbage if one.name not in named)
            self._plan = replace(self._plan, garbage=garbage)
            if not self._append_record(renamed):
                lineage.require_owner()
                lineage.require_standing()
                lineage.require_open()

    def _report(self, size: int) -> None:
        self._done += size
        self._progress("sweep", self._done, self._total)

    def _list_doomed(self) -> Iterator[tuple[str, int]]:
        """Yield name and size of each object to delete, the manifests last."""
        plan, lineage = self._plan, self._lineage
        for packs in (plan.gone, plan.repacked):
            yield from zip(lineage.pack_names(packs), packs.size.tolist(), strict=True)
        yield from ((info.name, info.size) for info in plan.garbage)
        yield from ((lineage.manifest_name(row), row.manifest_size) for row in plan.manifests)

    def _append_record(self, renamed: Packs) -> bool:
        """Append the sweep's record, unless it would be empty; return whether it was appended."""
        lineage, plan = self._lineage, self._plan
        renamed = rebase_rewritten(lineage, plan.repacked, renamed)
        if not (len(renamed) or plan.gone.key.size or plan.manifests):
            return False
        swept = tuple(row.id for row in plan.manifests)
        lineage.append(ObjectsSwept(swept, renamed, plan.gone.key))
        return True

    def _repack(self) -> tuple[Packs, Packs]:
        """Write packs again without their dead slots.

        Return the rows of the packs that could be read, as they were and as they are now.
        """
        packs = self._plan.repacked
        sizes, suffixes = packs.size.copy(), packs.suffix.copy()
        readable = np.ones(len(packs), np.bool_)
        for row, name in enumerate(self._lineage.pack_names(packs)):
            suffixes[row] = (int.from_bytes(os.urandom(8)) >> 2) + 1
            target = self._lineage.pack_name(replace(packs, suffix=suffixes), row)
            try:
                limit = int(packs.size[row])
                index, data = get_checked(self._lineage.store, name, _make_opener(name), limit=limit)
            except (ObjectMissingError, *UNREADABLE) as error:
                _LOG.warning("%s; it is not repacked", error)
                readable[row] = False
                continue
            keep = self._lineage.state.live_slots(int(packs.key[row]), len(index.rows))
            try:
                sizes[row] = self._write_kept(target, index, data, keep)
            except StoreFullError as error:
                self.lacking = error
                readable[row:] = False
                break
            self._report(int(packs.size[row] - packs.dead[row]))
        return packs.rows(readable), replace(packs, suffix=suffixes, size=sizes).rows(readable)

    def _write_kept(self, target: str, index: Index, data: memoryview, keep: NDArray[np.bool_]) -> int:
        """Write a pack of the slots to keep, each under its old number; return the object's size."""
        rows = index.rows
        lengths = np.where(keep, rows["length"].astype(np.int64), 0)
        starts = rows["offset"].astype(np.int64) + index.data_start
        spans = merge_intervals(np.stack([starts, starts + lengths], axis=1)[lengths > 0])
        codecs = np.where(keep, rows["codec"], ABSENT).astype(np.uint8)
        parts, size = seal_pack(
            target, index.header, [data[a:b] for a, b in spans.tolist()], lengths, codecs, index.digests
        )
        self._lineage.store.put(target, parts)
        return size


def _make_opener(name: str) -> Callable[[memoryview], tuple[Index, memoryview]]:
    return lambda data: open_pack(name, data)
