"""What is in a repository, and taking snapshots out of its catalog."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from island_fast.errors import NotFoundError, RefusedError
from island_fast.formats.catalog import Packs, SnapshotRow, SnapshotsDeleted
from island_fast.repository.lineage import Lineage
from island_fast.repository.liveness import add_dead_slots, only_needed_by
from island_fast.repository.open import Found
from island_fast.repository.pack_reader import PackReader
from island_fast.results import Deleted

__all__ = ["Deletion", "delete", "delete_snapshot", "plan_delete", "plan_deletion"]

_LOG = logging.getLogger(__name__)


def delete(found: Sequence[Found], dry_run: bool) -> list[Deleted]:
    """Take snapshots out of the catalog, in the order given, or with `dry_run` tell what that would free.

    RefusedError if this host does not own a lineage, or a snapshot is being taken on the base of one of them.
    """
    answers: list[Deleted] = []
    rows = {one.row.id: one for one in found}
    lineages = {one.lineage.name: one.lineage for one in rows.values()}
    for snapshot, one in rows.items():
        lineage = lineages[one.lineage.name]
        if dry_run:
            deletion = plan_deletion(lineage, lineage.state.live[snapshot])
            lineage.state = lineage.state.after(deletion.event)
        else:
            with lineage.locked():
                deletion = delete_snapshot(lineage, snapshot)
        answers.append(Deleted(snapshot, lineage.name, deletion.unreferenced, deletion.freed))
    return answers


def delete_snapshot(lineage: Lineage, snapshot: str) -> Deletion:
    """Take one out of the catalog. Under the lineage's lock; see `delete` for what is refused."""
    lineage.require_owner()
    row = lineage.state.live.get(snapshot)
    if row is None:
        raise NotFoundError(f"snapshot {snapshot} was deleted meanwhile")
    for registration, alive in lineage.files.running():
        if alive and registration.parent == snapshot:
            raise RefusedError(
                f"a snapshot of volume {lineage.name} is being taken on the base of {snapshot}; "
                "delete it when that has ended"
            )
    deletion = plan_deletion(lineage, row)
    lineage.append(deletion.event)
    lineage.files.unregister(snapshot)  # a crash may have left it: that id is used up
    return deletion


def plan_deletion(lineage: Lineage, row: SnapshotRow) -> Deletion:
    """What deleting the live snapshot `row` would do."""
    return plan_delete(lineage, row, PackReader(lineage))


@dataclass(frozen=True, slots=True)
class Deletion:
    """What a delete frees: the event's slots and packs, and two figures in bytes.

    `unreferenced` are the stored bytes of slots that become dead and the manifest; `freed` is what the next
    sweep removes because of this delete, less what it rewrites.
    """

    event: SnapshotsDeleted
    unreferenced: int
    freed: int


def plan_delete(lineage: Lineage, row: SnapshotRow, packs: PackReader) -> Deletion:
    """What deleting the live snapshot `row` frees."""
    state, numbers = lineage.state, lineage.numbers
    free = only_needed_by(row, state, numbers, lambda one: lineage.manifest(one).slot_intervals(numbers))
    event = SnapshotsDeleted((row.id,), add_dead_slots(state.packs, free, packs.index), free)
    after = state.after(event)
    bytes_dead = int(event.packs.dead.sum()) - _dead_before(state.packs, event.packs)
    freed = after.reclaimable_bytes() - state.reclaimable_bytes()
    return Deletion(event, bytes_dead + row.manifest_size, freed)


def _dead_before(packs: Packs, touched: Packs) -> int:
    return int(packs.dead[packs.find(touched.key)].sum())
