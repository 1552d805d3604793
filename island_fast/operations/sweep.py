"""Sweeping one lineage: what a plan of `reclaim.py` removes and rewrites, step by step.

Repacked packs are durable before the record that switches their names, and the record is durable before the
first object is deleted; cut off anywhere, a sweep is simply run again. The lineage's lock is held while
planning and while appending the record only, so that snapshots go on meanwhile; sweeps come one after
another under a lock of their own. What crashes leave at each step: docs/reliability.md.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from island_fast.dirtymap import merge_intervals
from island_fast.errors import UNREADABLE, ConflictError, ObjectMissingError
from island_fast.formats.catalog import ObjectsSwept, Packs, SnapshotRow
from island_fast.formats.names import manifest_name
from island_fast.formats.pack import ABSENT, Index, open_pack, seal_pack
from island_fast.progress import Progress
from island_fast.repository.lineage import Lineage
from island_fast.repository.liveness import rebase_rewritten
from island_fast.repository.snapshot_writer import forget_used
from island_fast.results import SweepStep, Swept
from island_fast.stores.base import ObjectInfo
from island_fast.stores.checked_read import get_checked

__all__ = ["GARBAGE_AGE", "SweepPlan", "plan_sweep", "steps", "sweep"]

GARBAGE_AGE = 24 * 3600.0
"""Seconds: what no record names must be this old, on any store."""

_LOG = logging.getLogger(__name__)


def sweep(lineage: Lineage, grace: float, dry_run: bool, progress: Progress) -> Swept:
    """Sweep `lineage` as its owner; what was done, or with `dry_run` would be.

    Progress counts bytes rewritten and deleted. ConflictError, with nothing deleted, if the lineage changed
    hands meanwhile. A pack that is to be repacked and cannot be read is told, and left as it is.
    """
    with lineage.files.sweeping():
        if not dry_run:
            lineage.files.tidy()
        with lineage.locked():
            lineage.require_owner()
            forget_used(lineage)
            given_up = lineage.files.abandoned(max(grace, GARBAGE_AGE))
            if not dry_run:
                for snapshot in given_up:
                    lineage.files.unregister(snapshot)
            plan = plan_sweep(lineage, grace, given_up)
        if not dry_run and plan.objects:
            plan = _Sweep(lineage, plan, progress).run()
        return _told(lineage, plan)


def _told(lineage: Lineage, plan: SweepPlan) -> Swept:
    return Swept(
        volume=lineage.name,
        objects_removed=plan.objects,
        packs_repacked=len(plan.repacked),
        bytes_removed=plan.removed,
        bytes_rewritten=plan.rewritten,
        bytes_freed=plan.freed,
        steps=tuple(SweepStep(*step) for step in steps(lineage, plan)),
    )


class _Sweep:
    """A plan being carried out."""

    def __init__(self, lineage: Lineage, plan: SweepPlan, progress: Progress) -> None:
        self._lineage = lineage
        self._plan = plan
        self._progress = progress
        self._done, self._total = 0, plan.removed + plan.rewritten

    def run(self) -> SweepPlan:
        """Rewrite, record, delete; returns the plan less the packs that could not be rewritten."""
        epoch = self._lineage.epoch
        readable, renamed = self._repack()
        self._plan = replace(self._plan, repacked=readable)
        doomed = list(self._doomed())
        with self._lineage.locked():
            if self._lineage.epoch != epoch:
                raise ConflictError(
                    f"volume {self._lineage.name} changed hands during the sweep, so nothing was deleted; "
                    "run it again"
                )
            self._record(renamed)
        retired = self._lineage.files.retired()
        kept = {manifest_name(self._lineage.name, one.snapshot, one.attempt) for one in retired}
        for name, size in doomed:
            self._lineage.store.delete(name)
            self._told(size)
            if name not in kept:  # the base of a table diff may need it
                self._lineage.files.uncache(name)
        return self._plan

    def _told(self, size: int) -> None:
        self._done += size
        self._progress("sweep", self._done, self._total)

    def _doomed(self) -> Iterator[tuple[str, int]]:
        """Names and sizes of the objects that go, the manifests last."""
        plan, lineage = self._plan, self._lineage
        for packs in (plan.gone, plan.repacked):
            yield from zip(lineage.pack_names(packs), packs.size.tolist(), strict=True)
        yield from ((info.name, info.size) for info in plan.garbage)
        yield from ((lineage.manifest_name(row), row.manifest_size) for row in plan.manifests)

    def _record(self, renamed: Packs) -> None:
        """Append the sweep's record, if it has anything to say."""
        lineage, plan = self._lineage, self._plan
        renamed = rebase_rewritten(lineage, plan.repacked, renamed)
        if len(renamed) or plan.gone.key.size or plan.manifests:
            swept = tuple(row.id for row in plan.manifests)
            lineage.append(ObjectsSwept(swept, renamed, plan.gone.key))

    def _repack(self) -> tuple[Packs, Packs]:
        """Write packs anew without their dead slots; the rows of those that could be read, old and new."""
        packs = self._plan.repacked
        sizes, suffixes = packs.size.copy(), packs.suffix.copy()
        readable = np.ones(len(packs), np.bool_)
        for row, name in enumerate(self._lineage.pack_names(packs)):
            suffixes[row] = (int.from_bytes(os.urandom(8)) >> 2) + 1
            target = self._lineage.pack_name(replace(packs, suffix=suffixes), row)
            try:
                index, data = get_checked(self._lineage.store, name, _opener(name))
            except (ObjectMissingError, *UNREADABLE) as error:
                _LOG.warning("%s; it is not repacked", error)
                readable[row] = False
                continue
            keep = self._lineage.state.live_slots(int(packs.key[row]), len(index.rows))
            sizes[row] = self._write_kept(target, index, data, keep)
            self._told(int(packs.size[row] - packs.dead[row]))
        return packs.rows(readable), replace(packs, suffix=suffixes, size=sizes).rows(readable)

    def _write_kept(self, target: str, index: Index, data: memoryview, keep: NDArray[np.bool_]) -> int:
        """Write a pack of the slots to keep, each under its old number; returns the object's size."""
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


def _opener(name: str) -> Callable[[memoryview], tuple[Index, memoryview]]:
    return lambda data: open_pack(name, data)


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


def plan_sweep(lineage: Lineage, grace: float, given_up: Collection[str] = ()) -> SweepPlan:
    """What a sweep would do now. Under the lineage's lock, after `refresh`.

    An object is taken only if the store says that it is older than `grace` seconds. The registrations of the
    snapshots `given_up` account for nothing any more.
    """
    old = _Ages(lineage, grace)
    gone, repacked = lineage.state.packs_to_sweep()
    manifests = lineage.state.dropped.values()
    return SweepPlan(
        gone=gone.rows(old.mask(lineage.pack_names(gone))),
        repacked=repacked.rows(old.mask(lineage.pack_names(repacked))),
        manifests=tuple(row for row in manifests if old.there(lineage.manifest_name(row))),
        garbage=tuple(_garbage(lineage, max(grace, GARBAGE_AGE), given_up)),
    )


def steps(lineage: Lineage, plan: SweepPlan) -> Iterator[tuple[str, str, int, str]]:
    """The plan object by object: "remove" or "rewrite", its name, its size in bytes, and why."""
    for name, size in zip(lineage.pack_names(plan.gone), plan.gone.size.tolist(), strict=True):
        yield "remove", name, size, "no snapshot needs it"
    sizes = zip(plan.repacked.size.tolist(), plan.repacked.dead.tolist(), strict=True)
    for name, (size, dead) in zip(lineage.pack_names(plan.repacked), sizes, strict=True):
        yield "rewrite", name, size, f"{100 * dead // size} % of it is needed no more"
    for row in plan.manifests:
        yield "remove", lineage.manifest_name(row), row.manifest_size, "its snapshot was deleted"
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


def _garbage(lineage: Lineage, age: float, given_up: Collection[str]) -> Iterable[ObjectInfo]:
    """Packs and manifests that a listing shows and no record or registration accounts for."""
    state = lineage.state
    named = set(lineage.pack_names(state.packs))
    for row in [*state.live.values(), *state.dropped.values()]:
        named.add(lineage.manifest_name(row))
    running = {registration.snapshot for registration, _ in lineage.files.running()}.difference(given_up)
    for kind in ("packs", "manifests"):
        for info in lineage.store.list(f"{lineage.name}/{kind}/"):
            snapshot = info.name.split("/")[2].partition("-")[0]
            if info.name not in named and snapshot not in running and info.age >= age:
                yield info
