"""What is in a repository, and taking snapshots out of its catalog."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict

from island_fast.errors import DamagedError, NotFoundError, RefusedError
from island_fast.formats.catalog import SnapshotRow
from island_fast.repository.lineage import Lineage
from island_fast.repository.liveness import Deletion, plan_delete
from island_fast.repository.open import Found
from island_fast.repository.pack_reader import PackReader
from island_fast.results import Deleted, Snapshot, SnapshotShown, timestamp

__all__ = ["delete", "delete_one", "describe", "planned", "show"]

_LOG = logging.getLogger(__name__)


def describe(lineage: Lineage, row: SnapshotRow) -> Snapshot:
    """A snapshot as `list` and `show` tell it."""
    return Snapshot(
        snapshot=row.id,
        lineage=lineage.name,
        parent=row.parent,
        volume=lineage.name,
        label=row.label,
        created=timestamp(row.created),
        volume_size=row.volume_size,
        bytes_stored=row.stored + row.manifest_size,
    )


def show(found: Found) -> SnapshotShown:
    """One snapshot, and what deleting it would free."""
    shown = asdict(describe(found.lineage, found.row))
    try:
        deletion = planned(found.lineage, found.row)
        manifest = found.lineage.manifest(found.row)
    except DamagedError as error:
        _LOG.warning("what deleting it would free cannot be told: %s", error)
        return SnapshotShown(**shown, bytes_unreferenced=None, bytes_freed=None)
    facts = manifest.properties
    return SnapshotShown(
        **shown,
        bytes_unreferenced=deletion.unreferenced,
        bytes_freed=deletion.freed,
        consistency=facts.get("consistency"),
        domain=facts.get("libvirt.domain"),
        disk=facts.get("libvirt.disk"),
        group=manifest.group,
    )


def delete(found: Sequence[Found], writer: str, dry_run: bool) -> list[Deleted]:
    """Take snapshots out of the catalog, in the order given, or with `dry_run` tell what that would free.

    RefusedError if `writer` does not own a lineage, or a snapshot is being taken on the base of one of them.
    """
    answers: list[Deleted] = []
    rows = {one.row.id: one for one in found}
    lineages = {one.lineage.name: one.lineage for one in rows.values()}
    for snapshot, one in rows.items():
        lineage = lineages[one.lineage.name]
        if dry_run:
            deletion = planned(lineage, lineage.state.live[snapshot])
            lineage.state = lineage.state.after(deletion.record)
        else:
            with lineage.locked():
                deletion = delete_one(lineage, snapshot, writer)
        answers.append(Deleted(snapshot, lineage.name, deletion.unreferenced, deletion.freed))
    return answers


def delete_one(lineage: Lineage, snapshot: str, writer: str) -> Deletion:
    """Take one out of the catalog. Under the lineage's lock; see `delete` for what is refused."""
    lineage.require_owner(writer)
    row = lineage.state.live.get(snapshot)
    if row is None:
        raise NotFoundError(f"snapshot {snapshot} was deleted meanwhile")
    for registration, alive in lineage.files.running():
        if alive and registration.parent == snapshot:
            raise RefusedError(
                f"a snapshot of volume {lineage.name} is being taken on the base of {snapshot}; "
                "delete it when that has ended"
            )
    deletion = planned(lineage, row)
    lineage.append(deletion.record, writer)
    lineage.files.unregister(snapshot)  # a crash may have left it: that id is used up
    return deletion


def planned(lineage: Lineage, row: SnapshotRow) -> Deletion:
    """What deleting the live snapshot `row` would do."""
    return plan_delete(lineage, row, PackReader(lineage), time.time_ns())
