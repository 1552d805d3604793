"""What is in a repository, and taking snapshots out of its catalog."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from island_fast.errors import NotFoundError, RefusedError
from island_fast.formats.catalog import Packs, Record, SnapshotRow
from island_fast.repository.lineage import Lineage
from island_fast.repository.liveness import freeable, needed_alone, with_more_dead
from island_fast.repository.open import Found
from island_fast.repository.pack_reader import PackReader
from island_fast.results import Deleted

__all__ = ["Deletion", "delete", "delete_one", "plan_delete", "planned"]

_LOG = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True)
class Deletion:
    """What a delete frees: the record's slots and packs, and two figures in bytes.

    `unreferenced` are the stored bytes of slots that become dead and the manifest; `freed` is what the next
    sweep removes because of this delete, less what it rewrites.
    """

    record: Record
    unreferenced: int
    freed: int


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
        packs=with_more_dead(state.packs, free, packs.read_index),
    )  # fmt: skip
    after = state.after(record)
    bytes_dead = int(record.packs.dead.sum()) - _dead_before(state.packs, record.packs)
    return Deletion(record, bytes_dead + row.manifest_size, freeable(after) - freeable(state))


def _dead_before(packs: Packs, touched: Packs) -> int:
    return int(packs.dead[packs.find(touched.key)].sum())
