"""`copy`: snapshots to the lineage of the same name in another repository, from near to far.

A copy has the id of its snapshot and holds the same volume, but the far lineage decides how it is stored. Its
parent is a snapshot that is there, and it inherits what both hold in the near lineage. So each far snapshot
is like one that was taken there, and the rules for deletes and sweeps apply, whichever snapshots are copied
and in whichever order (docs/format.md, "Copies").
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from island_fast.arrays import Int64s
from island_fast.dirtymap import BLOCK_SIZE, merge_intervals, subtract_intervals
from island_fast.errors import (
    UNREADABLE,
    ConflictError,
    DamagedError,
    IslandError,
    NotFoundError,
    RefusedError,
)
from island_fast.formats.catalog import SnapshotAdded, SnapshotRow, State
from island_fast.formats.keys import PACK_BITS
from island_fast.formats.manifest import Manifest, build_pack_table
from island_fast.formats.runs import Runs
from island_fast.images.source import END
from island_fast.progress import Progress
from island_fast.repository.digests import KnownDigests
from island_fast.repository.health import Health
from island_fast.repository.lineage import Lineage
from island_fast.repository.local_state import ImageFile, Registration
from island_fast.repository.pack_reader import PackReader, group_by_pack
from island_fast.repository.snapshot_writer import SnapshotWriter, find_interrupted, next_attempt
from island_fast.repository.streams import copy_blocks
from island_fast.results import Copied, timestamp

__all__ = ["copy"]

_WHOLE = np.array([[0, END]], np.int64)
_SENDING = 2  # packs at a time, because the packs that arrive are in memory, too
_RECENT = 2  # snapshots whose runs are kept: the parent of a snapshot is often the one before


def copy(
    near: Lineage, far: Lineage, wanted: Collection[str] | None, progress: Progress
) -> tuple[list[Copied], list[IslandError]]:
    """Copy live snapshots of `near`, which was refreshed, to `far`: parents first, otherwise in their order.

    `wanted` names them by id; None means all but those that the catalog of `far` says were deleted there.
    Snapshots that are in `far` already stay as they are. Return an answer for each, and the errors of
    snapshots that could not be copied, because they are damaged or were deleted meanwhile. RefusedError,
    before anything is sent, if `far` holds another volume or this host does not own it. Progress counts bytes
    of volumes, over all that are copied.
    """
    return _CopyRun(near, far, progress).run(wanted)


@dataclass(frozen=True, slots=True)
class _CopyPlan:
    """What is to be stored of a snapshot: `replaced` (int64[n, 2]) are the blocks that it does not inherit.

    `parent` are the far parent's runs, with pack keys. `compared` are those of them that a block is compared
    with by its digest, so that it is not sent if it is equal. `data` are the near runs of the blocks to read
    unless they are found equal.
    """

    parent: Runs
    replaced: Int64s
    compared: Runs
    data: Runs


class _CopyRun:
    """Copies between two lineages."""

    def __init__(self, near: Lineage, far: Lineage, progress: Progress) -> None:
        self._near = near
        self._far = far
        self._progress = progress
        self._packs = PackReader(near)
        self._far_packs = PackReader(far)
        self._order = {snapshot: place for place, snapshot in enumerate(near.state.live)}
        self._recent: OrderedDict[str, Runs] = OrderedDict()
        self._done = self._total = 0  # bytes

    def run(self, wanted: Collection[str] | None) -> tuple[list[Copied], list[IslandError]]:
        """Copy the snapshots `wanted`; see `copy`."""
        every = _sort_parents_first(self._near.state.live)
        rows = [row for row in every if wanted is None or row.id in wanted]
        with self._far.hold_lock():
            self._check_far()
            if self._far.exists:
                self._far.require_standing()  # what this host alone remembers is no second copy
            there, same = self._far.state, self._same()
            answers = [_report_present(self._far, row) for row in rows if row.id in same]
            rows = [row for row in rows if row.id not in same]
            if wanted is None:
                deleted = {*there.dropped, *there.swept}
                answers += [_report_deleted(self._far, row) for row in rows if row.id in deleted]
                rows = [row for row in rows if row.id not in deleted]
            sizes = dict(self._estimate_sizes(rows, same))
        self._total = sum(sizes.values())
        errors: list[IslandError] = []
        for row in rows:
            try:
                answers.append(self._copy(row))
            except (DamagedError, NotFoundError) as error:
                errors.append(error)
            self._done += sizes.get(row.id, 0)
        return sorted(answers, key=lambda one: self._order[one.snapshot]), errors

    def _same(self) -> set[str]:
        """Return the ids of the far snapshots that are copies of near ones; see `_is_copy`."""
        near, far = self._near.state.live, self._far.state.live
        return {one.id for one in far.values() if one.id in near and _is_copy(one, near[one.id])}

    def _estimate_sizes(self, rows: list[SnapshotRow], present: set[str]) -> Iterator[tuple[str, int]]:
        """Yield how many bytes there will be to read for each snapshot; not for one that cannot be read."""
        for row in rows:
            parent = self._find_relative(row, present)
            present.add(row.id)
            try:
                runs = self._runs(row)
                replaced = runs.differing(self._runs(self._near.state.live[parent])) if parent else _WHOLE
            except (DamagedError, NotFoundError):  # copying it will report that
                continue
            yield row.id, runs.within(replaced).blocks * BLOCK_SIZE

    # One snapshot.

    def _copy(self, row: SnapshotRow) -> Copied:
        """Store one snapshot in the far lineage, unless it is there already."""
        began, near, read = time.monotonic(), self._near, self._packs.fetched.bytes
        with ExitStack() as stack:
            stack.enter_context(near.deletion_explained(row, "copied"))
            writer, registration = self._register(stack, row, self._choose_parent(row))
            if writer is None:
                return _report_present(self._far, row)
            manifest = near.manifest(row)
            plan = self._plan_copy(row, registration.parent)
            sent = copy_blocks(
                plan.data, self._packs, near.store.range_gap, writer.known_blocks(plan.compared),
                writer.pack_writer(_SENDING), manifest.blocks, self._report,
            )  # fmt: skip
            stored = writer.locate_blocks(sent, plan.parent, plan.replaced)
            far_manifest = self._far_manifest(manifest, registration, stored.runs)
            copied = writer.commit(far_manifest, stored, self._checkpoint)
        return Copied(
            snapshot=copied.id,
            volume=near.name,
            parent=copied.parent,
            label=copied.label,
            volume_size=copied.volume_size,
            copied=True,
            blocks_sent=stored.fresh.blocks - sent.kept.count(),
            blocks_kept=sent.kept.count(),
            bytes_read=self._packs.fetched.bytes - read,
            bytes_stored=copied.stored + copied.manifest_size,
            objects_written=writer.objects,
            seconds=time.monotonic() - began,
        )

    def _report(self, phase: str, done: int, total: int) -> None:
        self._progress(phase, min(self._done + done, self._total), self._total)

    def _register(
        self, stack: ExitStack, row: SnapshotRow, parent: str | None
    ) -> tuple[SnapshotWriter | None, Registration]:
        """Create the far lineage if it is new, and register before the first object.

        Another parent is chosen if `parent` was deleted meanwhile. The writer is None if the snapshot is
        there already.
        """
        near, far = self._near, self._far
        with far.hold_lock():
            made = not far.exists
            if made:
                far.create(near.seed)
                nearby = f"{near.store.location}/{near.name}"
                far.files.set_image(ImageFile(nearby))  # so only its pins let images in
            self._check_far()
            far.require_standing()
            running = [one.snapshot for one, alive in far.files.registrations.all() if alive]
            if row.id in running:
                raise RefusedError(
                    f"another process is copying snapshot {row.id} to {far.store.location}; wait for it"
                )
            before = find_interrupted(far, copied=row.id)
            if before is None:
                far.files.registrations.remove(row.id)  # notes of an earlier epoch would have the same id
            # A copy of this id can have been here before and been deleted; names must be new nevertheless.
            attempt = next_attempt(far, before) if before else int.from_bytes(os.urandom(6))
            if parent not in far.state.live:
                parent = self._choose_parent(row)
            at = far.newest_number
            registration = Registration(row.id, attempt, parent, far.epoch, copied=True, record=at)
            if row.id in far.state.live:
                return None, registration
            if parent is not None:
                far.require_manifest(far.state.live[parent])
            stack.enter_context(far.files.registrations.register(registration))
        writer = SnapshotWriter(far, registration)
        writer.objects += made
        return writer, registration

    def _check_far(self) -> None:
        """Raise RefusedError if the far lineage holds another volume, or this host does not own it."""
        near, far = self._near, self._far
        if not far.exists:
            return
        elsewhere = f"copy to another repository, such as {far.store.location}/PREFIX"
        if far.seed != near.seed:
            raise RefusedError(
                f"volume {far.name} in {far.store.location} is not a copy of volume {near.name} in "
                f"{near.store.location}; {elsewhere}"
            )
        if not far.owned_here:
            raise ConflictError(
                f"volume {far.name} in {far.store.location} belongs to {far.owner_described}; "
                f"{elsewhere}, or if that is gone, run "
                f"'island adopt {far.name}' here"
            )
        far.require_owner()

    # The parent.

    def _choose_parent(self, row: SnapshotRow) -> str | None:
        """Choose the far parent of `row`: the one that leaves the fewest blocks to send; None without any.

        If the snapshot that `row` was compared with in the near lineage is there, it is that one. Else the
        candidates are the closest snapshot that both lineages have, the one that `row` was compared with, if
        only the far lineage still has it, and those between which `row` will stand. If the closest one is an
        ancestor, those that the near lineage has, too, are none: so the far lineage gets the near tree.
        """
        near, far, same = self._near.state.live, self._far.state.live, self._same()
        relative = self._find_relative(row, same)
        base = self._near.manifest(row).parent
        if relative is not None and relative == base:
            return relative
        rows = list(far.values())
        after = self._find_next(row)
        place = rows.index(after) if after else len(rows)
        around = [one.id for one in rows[max(place - 1, 0) : place + 1]]
        others = [one for one in [base, *around] if one is not None and one in far]
        if relative is not None and relative in _iterate_ancestry(near, row):
            others = [one for one in others if one not in same]
        candidates = list(dict.fromkeys([relative, *others] if relative else others))
        if len(candidates) <= 1:
            return candidates[0] if candidates else None
        return min(candidates, key=lambda parent: self._count_unsent(row, parent))

    def _count_unsent(self, row: SnapshotRow, parent: str) -> int:
        """Count the blocks to send of `row` if that is its far parent; END if either is found damaged."""
        try:
            plan = self._plan_copy(row, parent)
        except (DamagedError, NotFoundError):
            return END
        there = KnownDigests(plan.compared, self._far_packs.read_index)
        count = plan.data.blocks
        for key, named in group_by_pack(plan.data.within(plan.compared.intervals())):
            blocks, slots = named.expand()
            with suppress(*UNREADABLE, IndexError):  # damage, which copying it reports
                digests = self._packs.read_index(key).digests[slots]
                count -= int(there.matches(blocks, digests).sum())
        return count

    def _find_relative(self, row: SnapshotRow, present: Collection[str]) -> str | None:
        """Find which of the near snapshots that are `present` in the far lineage is closest to `row`.

        That is the nearest ancestor; else the next snapshot after `row`; else the last one before it; else
        None.
        """
        live, mine = self._near.state.live, self._order[row.id]
        for ancestor in _iterate_ancestry(live, row):
            if ancestor in present and ancestor != row.id:
                return ancestor
        places = {self._order[one]: one for one in live if one in self._order and one in present}
        after, before = ([p for p in places if p > mine], [p for p in places if p < mine])
        return places[min(after)] if after else places[max(before)] if before else None

    # What is stored.

    def _runs(self, row: SnapshotRow) -> Runs:
        """Return the runs of a near snapshot, with pack keys."""
        runs = self._recent.pop(row.id, None)
        if runs is None:
            runs = self._near.manifest(row).runs_by_key(self._near.numbers)
        self._recent[row.id] = runs
        if len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        return runs

    def _plan_copy(self, row: SnapshotRow, parent: str | None) -> _CopyPlan:
        """Plan what is to be stored of `row`, given its far parent, if any.

        The near manifests of `row` and of a snapshot that both lineages have say what differs, and the far
        manifests of that one and of the parent, if it is another one, what differs there; blocks that differ
        neither here nor there are the parent's. The others are compared with the parent's by their digests.
        Without such a snapshot all blocks are. What an earlier, deleted copy of `row` left in packs is not
        inherited: deletes rely on it that a snapshot shares packs of its own id only with its descendants.
        What the far lineage has lost is sent again.
        """
        near, far, runs = self._near, self._far, self._runs(row)
        held = self._far_runs(parent) if parent else Runs.empty()
        others = held.intervals()[held.pack >> PACK_BITS == far.numbers.number(row.id)]
        barred = merge_intervals(np.concatenate([others, held.among(Health(far).lost()).intervals()]))
        usable = held.within(subtract_intervals(held.intervals(), barred))
        same = self._same()
        both = parent if parent in same else self._find_relative(row, same)
        if parent is None or both is None:
            return _CopyPlan(usable, _WHOLE, usable, runs)
        try:
            near_held = self._runs(near.state.live[both])
            far_held = held if both == parent else self._far_runs(both)
            if not _same_blocks(near_held, far_held):
                raise DamagedError(
                    f"snapshot {both} in {far.store.location} does not hold what it holds in "
                    f"{near.store.location}; delete it in {far.store.location} and copy it again by its id"
                )
        except (DamagedError, NotFoundError):
            if both == parent:
                raise
            return _CopyPlan(usable, _WHOLE, usable, runs)
        differing = [runs.differing(near_held), held.differing(far_held), barred]
        replaced = merge_intervals(np.concatenate(differing))
        compared = Runs.empty() if both == parent else usable.within(replaced)
        return _CopyPlan(usable, replaced, compared, runs.within(replaced))

    def _far_runs(self, snapshot: str) -> Runs:
        """Return the runs of a far snapshot, with pack keys."""
        return self._far.manifest(self._far.state.live[snapshot]).runs_by_key(self._far.numbers)

    def _far_manifest(self, manifest: Manifest, registration: Registration, runs: Runs) -> Manifest:
        """Make the far manifest: what the near one says, and where the blocks are in the far lineage."""
        table, runs = build_pack_table(runs, self._far.name, self._far.numbers)
        return replace(
            manifest, attempt=registration.attempt, parent=registration.parent, packs=table, runs=runs
        )

    def _checkpoint(self, event: SnapshotAdded) -> State | None:
        """Return a checkpoint if the copy is not the newest snapshot, or was deleted here before; else None.

        VOLUME@latest must be the same snapshot on both sides if both have it.
        """
        row, state = event.snapshot, self._far.state
        later = self._find_next(row)
        if later is None and row.id not in state.dropped:
            return None
        dropped = {snapshot: one for snapshot, one in state.dropped.items() if snapshot != row.id}
        after = replace(state, dropped=dropped).after(event)
        live: dict[str, SnapshotRow] = {}
        for one in state.live.values():
            if one is later:
                live[row.id] = row
            live[one.id] = one
        live.setdefault(row.id, row)
        return replace(after, live=live)

    def _find_next(self, row: SnapshotRow) -> SnapshotRow | None:
        """Find the far snapshot before which `row` belongs; None if it is to be the newest.

        Snapshots that both lineages have are in the near order; the others are placed by their times.
        """
        rows, mine = list(self._far.state.live.values()), self._order[row.id]
        places = [self._order.get(one.id) for one in rows]
        first = 1 + max(
            (at for at, place in enumerate(places) if place is not None and place < mine), default=-1
        )
        for one, place in zip(rows[first:], places[first:], strict=True):
            if one.created > row.created if place is None else place > mine:
                return one
        return None


def _report_present(far: Lineage, row: SnapshotRow) -> Copied:
    """Report a snapshot that was in the far lineage already; DamagedError if it is not a copy of `row`."""
    copied = far.state.live[row.id]
    if not _is_copy(copied, row):
        raise DamagedError(
            f"snapshot {row.id} of volume {far.name} in {far.store.location} is not a copy, but another one "
            f"that has its id, taken at {timestamp(copied.created)} and not at {timestamp(row.created)}; "
            f"copy to another place, such as {far.store.location}/PREFIX, or delete that one there and copy "
            "this one by its id"
        )
    return Copied(
        snapshot=row.id, volume=far.name, parent=copied.parent, label=copied.label,
        volume_size=copied.volume_size, copied=False, blocks_sent=0, blocks_kept=0, bytes_read=0,
        bytes_stored=copied.stored + copied.manifest_size, objects_written=0, seconds=0.0,
    )  # fmt: skip


def _is_copy(far: SnapshotRow, near: SnapshotRow) -> bool:
    """Return whether two snapshots of one id are the same: a copy keeps time, size and pin.

    Local state that was put back has once used an id again for another content.
    """
    return (far.created, far.volume_size, far.pin) == (near.created, near.volume_size, near.pin)


def _report_deleted(far: Lineage, row: SnapshotRow) -> Copied:
    """Report a snapshot that was deleted in the far lineage, and therefore is not copied again."""
    return Copied(
        snapshot=row.id, volume=far.name, parent=None, label=row.label, volume_size=row.volume_size,
        copied=False, blocks_sent=0, blocks_kept=0, bytes_read=0, bytes_stored=0, objects_written=0,
        seconds=0.0, deleted=True,
    )  # fmt: skip


def _sort_parents_first(live: Mapping[str, SnapshotRow]) -> list[SnapshotRow]:
    """Return all rows in their order, except that each comes after its parent."""
    ordered: dict[str, SnapshotRow] = {}
    for row in live.values():
        line = list(takewhile(lambda snapshot: snapshot not in ordered, _iterate_ancestry(live, row)))
        ordered.update((snapshot, live[snapshot]) for snapshot in reversed(line))
    return list(ordered.values())


def _iterate_ancestry(live: Mapping[str, SnapshotRow], row: SnapshotRow) -> Iterator[str]:
    """Yield the snapshot, its parent, that one's parent and so on; stop if a damaged catalog makes a ring."""
    seen: set[str] = set()
    at: SnapshotRow | None = row
    while at is not None and at.id not in seen:
        seen.add(at.id)
        yield at.id
        at = live.get(at.parent or "")


def _same_blocks(one: Runs, other: Runs) -> bool:
    """Return whether the two name the same blocks."""
    a, b = one.intervals(), other.intervals()
    return not subtract_intervals(a, b).size and not subtract_intervals(b, a).size
