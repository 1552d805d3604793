"""Taking one snapshot out of the catalog. What that frees is planned in `reclaim.py`."""

from __future__ import annotations

import time

from island_fast.catalog import SnapshotRow
from island_fast.errors import NotFoundError, RefusedError
from island_fast.lineage import Lineage
from island_fast.packreader import PackReader
from island_fast.reclaim import Deletion, plan_delete

__all__ = ["delete", "planned"]


def planned(lineage: Lineage, row: SnapshotRow) -> Deletion:
    """What deleting the live snapshot `row` would do."""
    return plan_delete(lineage, row, PackReader(lineage), time.time_ns())


def delete(lineage: Lineage, writer: str, snapshot: str) -> Deletion:
    """Delete `snapshot`. Under the lineage's lock.

    ConflictError if `writer` is not the owner, NotFoundError if the snapshot is gone, RefusedError while
    another is being taken on its base.
    """
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
