"""Retention: which snapshots of a volume a policy keeps, and deleting the others.

The rules are those of restic's `forget`. A rule walks from the newest snapshot to the oldest and keeps the
newest one of each of the first N periods that it meets; a snapshot stays if any rule keeps it. A rule that
reaches the oldest snapshot before it has met N periods keeps that one, too, so that history reaches as far
back as it can. Periods are those of UTC; weeks are those of ISO 8601, which begin on Monday.

Newer means later in the catalog, so a clock that once jumped ahead or back does not make a snapshot newer
than it is. Where clocks only go forward, this is the order of the dates.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime

from island_fast.errors import ConflictError, DamagedError, IslandError, RefusedError, UsageError
from island_fast.formats.catalog import SnapshotRow
from island_fast.operations.delete import Deletion, delete_snapshot, plan_deletion
from island_fast.progress import Progress
from island_fast.repository.lineage import Lineage
from island_fast.results import Decided, Retained, timestamp

__all__ = ["Keep", "retain"]

_MARKED = "marked"
"""The reason of a snapshot that `island keep` marked."""

_PERIOD_OF: Mapping[str, Callable[[datetime], Hashable]] = {
    "hourly": lambda time: (time.date(), time.hour),
    "daily": lambda time: time.date(),
    "weekly": lambda time: time.isocalendar()[:2],
    "monthly": lambda time: (time.year, time.month),
    "yearly": lambda time: time.year,
}


def retain(
    lineage: Lineage, keep: Keep, dry_run: bool, progress: Progress
) -> tuple[Retained, list[IslandError]]:
    """Delete the snapshots that `keep` does not keep, oldest first; with `dry_run` change nothing.

    Return what was decided, and the errors of snapshots that could not be deleted, which count as kept.
    ConflictError if this host does not own the lineage. Progress counts the bytes that the deleted snapshots
    wrote.
    """
    lineage.require_owner()
    run = _Retention(lineage, keep, dry_run)
    reasons = run.decide()
    rows = [*lineage.state.live.values()]
    done, total = 0, sum(_written(row) for row in rows if not reasons[row.id])
    decided = []
    for row in rows:
        if reasons[row.id]:
            decided.append(_kept(row, reasons[row.id]))
            continue
        if (answer := run.delete(row)) is not None:
            decided.append(answer)
        done += _written(row)
        progress("retain", done, total)
    return _sum(lineage.name, decided), [*run.errors.values()]


class _Retention:
    """One lineage under a policy. `errors` are those of snapshots that could not be deleted, by message.

    So one cause that keeps several snapshots from being deleted is reported once.
    """

    def __init__(self, lineage: Lineage, keep: Keep, dry_run: bool) -> None:
        self.errors: dict[str, IslandError] = {}
        self._lineage = lineage
        self._keep = keep
        self._dry_run = dry_run

    def decide(self) -> dict[str, tuple[str, ...]]:
        """Return what keeps each live snapshot, by id: rules, and a mark."""
        rows = self._lineage.state.live.values()
        reasons = self._keep.decide([row.created for row in rows])
        return {
            row.id: ((_MARKED, *why) if row.keep else why) for row, why in zip(rows, reasons, strict=True)
        }

    def delete(self, row: SnapshotRow) -> Decided | None:
        """Delete a snapshot that no rule keeps; return None if another process deleted it meanwhile."""
        try:
            if self._dry_run:
                return _deleted(row, self._plan(row))
            with self._lineage.hold_lock(), self._lineage.store.use_reserve():
                reasons = self.decide().get(row.id)  # others may have been deleted since the first look
                if reasons is None:
                    return None
                if reasons:
                    return _kept(row, reasons)
                return _deleted(row, delete_snapshot(self._lineage, row.id))
        except ConflictError:
            raise
        except (DamagedError, RefusedError) as error:
            self.errors.setdefault(str(error), error)
            return _kept(row, ("could not be deleted",))

    def _plan(self, row: SnapshotRow) -> Deletion:
        """Return what deleting would free after those before it, and take that as done from here on."""
        deletion = plan_deletion(self._lineage, self._lineage.state.live[row.id])
        self._lineage.state = self._lineage.state.after(deletion.event)
        return deletion


def _written(row: SnapshotRow) -> int:
    return row.stored + row.manifest_size


def _kept(row: SnapshotRow, reasons: tuple[str, ...]) -> Decided:
    return Decided(row.id, timestamp(row.created), row.label, True, reasons, 0, 0)


def _deleted(row: SnapshotRow, what: Deletion) -> Decided:
    return Decided(row.id, timestamp(row.created), row.label, False, (), what.unreferenced, what.freed)


def _sum(volume: str, decided: Sequence[Decided]) -> Retained:
    return Retained(
        volume=volume,
        kept=sum(one.kept for one in decided),
        deleted=sum(not one.kept for one in decided),
        bytes_unreferenced=sum(one.bytes_unreferenced for one in decided),
        bytes_freed=sum(one.bytes_freed for one in decided),
        snapshots=tuple(decided),
    )


@dataclass(frozen=True, slots=True)
class Keep:
    """A retention policy: how many snapshots each rule keeps; 0 turns a rule off.

    A policy without any rule is False. One with a rule always keeps the newest snapshot. UsageError for a
    negative number.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0

    def __post_init__(self) -> None:
        if any(getattr(self, rule.name) < 0 for rule in fields(self)):
            raise UsageError("a rule cannot keep a negative number of snapshots; give 0 or more")

    def __bool__(self) -> bool:
        return any(getattr(self, rule.name) for rule in fields(self))

    def decide(self, created: Sequence[int]) -> list[tuple[str, ...]]:
        """Return for each snapshot the rules that keep it, such as ("last", "daily", "oldest yearly").

        It is () for a snapshot that no rule keeps. `created` are the times at which the snapshots were taken,
        in ns since 1970 UTC, the oldest snapshot first.
        """
        times = [datetime.fromtimestamp(time // 10**9, UTC) for time in created]
        reasons: list[tuple[str, ...]] = [()] * len(times)
        for rule in fields(self):
            met: set[Hashable] = set()
            for at in reversed(range(len(times))):
                if len(met) == getattr(self, rule.name):
                    break
                period = at if rule.name == "last" else _PERIOD_OF[rule.name](times[at])
                if period not in met:
                    met.add(period)
                    reasons[at] += (rule.name,)
                elif at == 0:
                    reasons[at] += (f"oldest {rule.name}",)
        return reasons
