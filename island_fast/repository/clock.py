"""The time that is written into objects, by this host's clock."""

from __future__ import annotations

import time

from island_fast.errors import RefusedError

__all__ = ["read_clock"]

_END = 1 << 32  # seconds; an internal snapshot of qcow2 cannot hold a later time


def read_clock() -> int:
    """Return the present time in nanoseconds since 1970 UTC.

    RefusedError if the clock is before 1970 or after February 2106: the pin of a snapshot could not hold such
    a time, and no other clock would ever catch up with it.
    """
    now = time.time_ns()
    if not 0 <= now < _END * 10**9:
        raise RefusedError(
            f"the clock of this host is wrong: it shows {now // 10**9} seconds since 1970, and snapshots can "
            "have times from 1970 to February 2106 only; set the clock, and run it again"
        )
    return now
