"""Which snapshots a retention policy keeps: dates in, decisions out, no I/O.

The rules are those of restic's `forget`. A rule walks from the newest snapshot to the oldest and keeps the
newest one of each of the first N periods that it meets; a snapshot stays if any rule keeps it. A rule that
comes to the oldest snapshot before it has met N periods keeps that one too, so that history reaches as far
back as it can. Periods are those of UTC; weeks are ISO 8601's, which begin on Monday.

Newer means later in the catalog. So a clock that once jumped ahead, or back, makes no snapshot newer than
it is; where clocks only go forward it is the order of the dates.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime

from island_fast.errors import UsageError

__all__ = ["Keep"]

_PERIOD_OF: Mapping[str, Callable[[datetime], Hashable]] = {
    "hourly": lambda time: (time.date(), time.hour),
    "daily": lambda time: time.date(),
    "weekly": lambda time: time.isocalendar()[:2],
    "monthly": lambda time: (time.year, time.month),
    "yearly": lambda time: time.year,
}


@dataclass(frozen=True, slots=True)
class Keep:
    """A retention policy: how many snapshots each rule keeps; 0 is no such rule. False if there is none.

    One with any rule keeps the newest snapshot. UsageError for a negative number.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0

    def __post_init__(self) -> None:
        if any(getattr(self, rule.name) < 0 for rule in fields(self)):
            raise UsageError("a rule cannot keep less than no snapshot; give 0 or more")

    def __bool__(self) -> bool:
        return any(getattr(self, rule.name) for rule in fields(self))

    def decide(self, created: Sequence[int]) -> list[tuple[str, ...]]:
        """The rules that keep each snapshot, such as ("last", "daily", "oldest yearly"); () where none does.

        created: when each was made, in ns since 1970 UTC, the oldest snapshot first.
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
