"""Which faults a command may meet, as strategies."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from tests.faults.machine.process import (
    AGED,
    CRASH_AFTER,
    CRASH_BEFORE,
    CUT,
    DENIED,
    DUPLICATE,
    EXPIRED,
    FAILED,
    INTRUSION,
    LATE,
    LATE_OUTAGE,
    LISTING,
    LOST,
    LOST_OUTAGE,
    OUTAGE,
    RACE,
    REFUSED,
    STALE,
    SWAPPED,
    Fault,
)

LATEST = {"a delete of the newest": -1, "a delete of the one before": -2}
COMMITTING = (
    *LATEST,
    "a sweep a day later",
    "a delete",
    "lost registrations",
    "an adoption",
    "there and back",
)
ADOPTING = ("the owner goes on", "the owner deletes", "an adoption at the same moment")
READING = ("a delete and a sweep", "a sweep a day later")

_SKIPS = (0, 0, 1, 1, 2, 3, 4, 5)
_INTO = ("record", "change", "change", "any", "get")
_MILD = [
    (LOST, "change"), (LOST, "record"), (FAILED, "any"), (FAILED, "change"), (EXPIRED, "any"),
    (LATE, "put"), (LATE, "put"), (LATE, "record"), (DUPLICATE, "put"), (DUPLICATE, "put"),
    (STALE, "plain"), (STALE, "plain"), (CUT, "get"), (LISTING, "list"), (REFUSED, "record"),
    (DENIED, "head"), (DENIED, "head"), (SWAPPED, "list"), (AGED, "list"),
]  # fmt: skip
_FATAL = [
    (CRASH_BEFORE, "any"), (CRASH_BEFORE, "change"), (CRASH_BEFORE, "record"), (CRASH_AFTER, "change"),
    (CRASH_AFTER, "any"), (CRASH_AFTER, "record"), (CRASH_BEFORE, "delete"), (CRASH_AFTER, "delete"),
    (OUTAGE, "any"), (OUTAGE, "change"), (OUTAGE, "record"), (LOST_OUTAGE, "change"),
    (LOST_OUTAGE, "record"), (LATE_OUTAGE, "put"), (LATE_OUTAGE, "record"),
]  # fmt: skip


def troubles(intrusions: tuple[str, ...]) -> st.SearchStrategy[tuple[Fault, ...]]:
    """Often none; else one or two faults, or another process and perhaps a fault.

    Drawn evenly from one number: Hypothesis itself would repeat a few of them for most of a life.
    """
    return st.integers(0, (1 << 30) - 1).map(lambda number: _drawn(random.Random(number), intrusions))


def _drawn(draw: random.Random, intrusions: tuple[str, ...]) -> tuple[Fault, ...]:
    def mild() -> Fault:
        return _fault(*draw.choice(_MILD), draw.choice(_SKIPS), draw.choice((1, 2)))

    def fatal() -> Fault:
        return _fault(*draw.choice(_FATAL), draw.choice(_SKIPS), 1)

    def intruder() -> Fault:
        return _intrusion(draw.choice(intrusions), draw.choice(_INTO), draw.choice(_SKIPS))

    kinds = (
        (),
        (),
        (),
        (mild,),
        (mild, mild),
        (fatal,),
        (mild, fatal),
        (intruder,),
        (intruder,),
        (intruder, fatal),
    )
    return tuple(kind() for kind in draw.choice(kinds))


def _fault(kind: str, where: str, skip: int, times: int) -> Fault:
    return Fault(kind, where, _placed(where, skip), times)


def _intrusion(what: str, where: str, skip: int) -> Fault:
    if what == "an adoption at the same moment":
        return Fault(RACE, "record", skip % 2, what=what)
    return Fault(INTRUSION, where, _placed(where, skip), what=what)


def _placed(where: str, skip: int) -> int:
    """Few commands write more than one record; most make twenty requests."""
    return max(0, skip - 3) if where == "record" else 4 * skip if where == "any" else skip


__all__ = ["ADOPTING", "COMMITTING", "LATEST", "READING", "troubles"]
