"""`keep`: mark snapshots that must not be deleted, or remove their marks.

A mark is a row's `keep` in the catalog. `delete` refuses a marked snapshot, and `retain` keeps it whatever
its rules say. While a lineage has one, its records carry a write feature, so that a writer which does not
know marks reads the lineage and does not append to it. A copy in another repository has no mark.
"""

from __future__ import annotations

from collections.abc import Sequence

from island_fast.errors import NotFoundError
from island_fast.formats.catalog import SnapshotsMarked
from island_fast.repository.open import FoundSnapshot
from island_fast.results import Marked

__all__ = ["keep"]


def keep(found: Sequence[FoundSnapshot], *, release: bool) -> list[Marked]:
    """Mark snapshots, or with `release` remove their marks; each volume's in one record.

    Those that are as wanted already are left as they are. ConflictError if another host owns a lineage.
    """
    lineages = {one.lineage.name: one.lineage for one in found}
    for name, lineage in lineages.items():
        asked = dict.fromkeys(one.row.id for one in found if one.lineage.name == name)
        with lineage.hold_lock():
            lineage.require_owner()
            for snapshot in asked:
                if snapshot not in lineage.state.live:
                    raise NotFoundError(f"snapshot {snapshot} was deleted meanwhile")
            changed = tuple(one for one in asked if lineage.state.live[one].keep == release)
            if changed:
                lineage.append(SnapshotsMarked((), changed) if release else SnapshotsMarked(changed, ()))
    return [Marked(one.row.id, one.lineage.name, not release) for one in found]
