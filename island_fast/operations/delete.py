"""`delete`: take snapshots out of the catalog, and compute what that frees.

A delete looks only at the snapshot and its live neighbours: the slots that none of them needs become dead.
The space is freed by the next sweep. Rules: docs/format.md, "Delete and sweep".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from island_fast.errors import NotFoundError, RefusedError
from island_fast.formats.catalog import SnapshotRow, SnapshotsDeleted
from island_fast.repository.lineage import Lineage
from island_fast.repository.liveness import add_dead_slots, only_needed_by
from island_fast.repository.open import FoundSnapshot
from island_fast.repository.pack_reader import PackReader
from island_fast.results import Deleted

__all__ = ["Deletion", "delete", "delete_snapshot", "plan_deletion", "refuse_kept"]


def delete(found: Sequence[FoundSnapshot], dry_run: bool) -> list[Deleted]:
    """Delete snapshots from the catalog, in the order given; with `dry_run` change nothing.

    Those of one volume share its lineage, as `find_all` returns them. ConflictError if this host does not own
    a lineage; RefusedError if a snapshot in progress is based on one of them.
    """
    answers: list[Deleted] = []
    lineages = {one.row.id: one.lineage for one in found}  # a snapshot can be named twice
    for snapshot, lineage in lineages.items():
        if dry_run:
            refuse_kept(lineage, lineage.state.live[snapshot])
            deletion = plan_deletion(lineage, lineage.state.live[snapshot])
            lineage.state = lineage.state.after(deletion.event)
        else:
            with lineage.hold_lock():
                deletion = delete_snapshot(lineage, snapshot)
        answers.append(Deleted(snapshot, lineage.name, deletion.unreferenced, deletion.freed))
    return answers


def delete_snapshot(lineage: Lineage, snapshot: str) -> Deletion:
    """Delete one snapshot from the catalog. Under the lineage's lock; errors as in `delete`."""
    lineage.require_owner()
    row = lineage.state.live.get(snapshot)
    if row is None:
        raise NotFoundError(f"snapshot {snapshot} was deleted meanwhile")
    refuse_kept(lineage, row)
    for registration, alive in lineage.files.registrations.all():
        if alive and registration.parent == snapshot:
            raise RefusedError(
                f"a snapshot of volume {lineage.name} that is in progress is based on {snapshot}; delete "
                f"{snapshot} when it has finished"
            )
    deletion = plan_deletion(lineage, row)
    lineage.append(deletion.event)
    lineage.files.registrations.remove(snapshot)  # a crash may have left it: that id is used up
    return deletion


def refuse_kept(lineage: Lineage, row: SnapshotRow) -> None:
    """Raise a RefusedError if the snapshot is marked to be kept."""
    if row.keep:
        raise RefusedError(
            f"snapshot {row.id} of volume {lineage.name} is marked to be kept; if it may go, run "
            f"'island keep --release {lineage.name}@{row.id}' first"
        )


@dataclass(frozen=True, slots=True)
class Deletion:
    """What deleting a snapshot does: the event for the catalog, and two figures in bytes.

    `unreferenced` is the size of the manifest and of the stored blocks whose slots become dead; `freed` is
    what the next sweep removes because of this delete, less what it rewrites.
    """

    event: SnapshotsDeleted
    unreferenced: int
    freed: int


def plan_deletion(lineage: Lineage, row: SnapshotRow) -> Deletion:
    """Compute what deleting the live snapshot `row` does. Changes nothing."""
    state, numbers = lineage.state, lineage.numbers
    free = only_needed_by(row, state, numbers, lambda one: lineage.manifest(one).slot_intervals(numbers))
    packs = add_dead_slots(state.packs, free, PackReader(lineage).read_index)
    event = SnapshotsDeleted((row.id,), packs, free)
    after = state.after(event)
    dead_before = int(state.packs.dead[state.packs.find(packs.key)].sum())
    bytes_dead = int(packs.dead.sum()) - dead_before
    freed = after.reclaimable_bytes() - state.reclaimable_bytes()
    return Deletion(event, bytes_dead + row.manifest_size, freed)
