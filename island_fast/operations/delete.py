"""`delete`: take snapshots out of the catalog, and compute what that frees.

A delete looks only at the snapshot and its live neighbours: the slots that none of them needs become dead.
The space is freed by the next sweep. Rules: docs/format.md, "Delete and sweep".
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

from island_fast.errors import IslandError, NotFoundError, RefusedError, StoreFullError, StoreRefusedError
from island_fast.formats.catalog import SnapshotRow, SnapshotsDeleted
from island_fast.repository.lineage import Lineage
from island_fast.repository.liveness import add_dead_slots, only_needed_by
from island_fast.repository.local_state import StartedDelete
from island_fast.repository.open import Reference, RepositoryBase
from island_fast.repository.pack_reader import PackReader
from island_fast.results import Deleted

__all__ = ["Deletion", "delete", "delete_snapshot", "plan_deletion", "refuse_kept"]


def delete(repository: RepositoryBase, references: Sequence[str], dry_run: bool) -> list[Deleted]:
    """Delete snapshots from the catalog, in the order given; with `dry_run` change nothing.

    ConflictError if this host does not own a lineage; RefusedError if a snapshot in progress is based on one
    of them. A reference to a snapshot that a delete has taken out already which never reported that, means
    that one: so a command that is run again, because its outcome was unknown, deletes nothing else.
    """
    finished = {text: done for text in references if (done := _find_finished(repository, text))}
    found = repository.find_all([text for text in references if text not in finished])
    lineages = {one.row.id: one.lineage for one in found}  # a snapshot can be named twice
    newest = {one.row.id for one in found if one.row == one.lineage.state.newest()}  # as VOLUME@latest means
    answers = {one.snapshot: one for one in finished.values()}
    for one in () if dry_run else answers.values():
        with repository.lineage(one.volume).hold_lock():  # which settles it, if that is still to be done
            pass
    for snapshot, lineage in lineages.items():
        if dry_run:
            refuse_kept(lineage, lineage.state.live[snapshot])
            deletion = plan_deletion(lineage, lineage.state.live[snapshot])
            lineage.state = lineage.state.after(deletion.event)
            answers[snapshot] = Deleted(snapshot, lineage.name, deletion.unreferenced, deletion.freed)
        else:
            answers[snapshot] = _delete_noted(lineage, snapshot, snapshot in newest)
    for one in () if dry_run else answers.values():
        repository.lineage(one.volume).files.started_deletes.remove(one.snapshot)
    return list(answers.values())


def _find_finished(repository: RepositoryBase, text: str) -> Deleted | None:
    """Find the snapshot that a delete, which never reported it, took out; None unless `text` names one."""
    reference = Reference.parse(text)
    if not repository.exists:
        return None
    every = repository.state.lineage_names(repository.id)
    for name in [reference.volume] if reference.volume else every:
        started = repository.state.lineage(repository.id, name).started_deletes.all()
        meant = [one for one in started if _names(reference, one)]
        if meant:
            lineage = repository.refreshed_lineage(name)
            gone = [one for one in meant if one.snapshot not in lineage.state.live]
            if gone and (reference.wanted == "latest" or not reference.select(lineage)):
                return Deleted(gone[-1].snapshot, name, gone[-1].unreferenced, gone[-1].freed)
    return None


def _names(reference: Reference, started: StartedDelete) -> bool:
    if reference.at and reference.wanted == "latest":
        return started.newest
    return bool(reference.wanted) and started.snapshot.startswith(reference.wanted)


def _delete_noted(lineage: Lineage, snapshot: str, newest: bool) -> Deleted:
    """Delete a snapshot, and keep a note of that until it is reported.

    A delete that finds no room gives up what the store keeps for that, and says so: run again, it has room.
    """
    try:
        with lineage.hold_lock():
            if snapshot not in lineage.state.live:
                for one in lineage.files.started_deletes.all():  # settled just now
                    if one.snapshot == snapshot:
                        return Deleted(snapshot, lineage.name, one.unreferenced, one.freed)
            deletion = delete_snapshot(lineage, snapshot, note=True, newest=newest)
            return Deleted(snapshot, lineage.name, deletion.unreferenced, deletion.freed)
    except IslandError as error:
        if _lacks_room(error) and lineage.store.release_reserve():
            raise StoreFullError(
                f"no space was left for {lineage.store.location}; a reserve kept for this was just freed: "
                "run the command again at once"
            ) from error
        raise


def _lacks_room(error: IslandError) -> bool:
    """Return whether the store had no room, or local state, which can be on the same disk."""
    cause = error.__cause__
    local = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, StoreFullError) or local


def delete_snapshot(lineage: Lineage, snapshot: str, *, note: bool = False, newest: bool = False) -> Deletion:
    """Delete one snapshot from the catalog. Under the lineage's lock; errors as in `delete`.

    With `note`, local state says that it was begun, and of the `newest`, until somebody removes the note.
    """
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
    started = lineage.files.started_deletes
    if note:
        started.add(StartedDelete(snapshot, newest, deletion.unreferenced, deletion.freed))
    try:
        lineage.append(deletion.event)
    except StoreRefusedError:
        started.remove(snapshot)
        raise
    if not note:
        started.remove(snapshot)  # of a delete that did not get this far: it did not take the snapshot out
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
