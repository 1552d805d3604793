"""Reading an object until it is intact: damaged bytes are read again before the damage is reported.

A bit can flip on the way, or rot in one of several replicas. Swift serves ranges of a rotten replica for
ever, but detects the damage when it sends the whole object, and then uses another replica. So every repeated
read is of the whole object.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from island_fast.errors import UNREADABLE
from island_fast.stores.base import MAX_OBJECT, Store

__all__ = ["READS", "get_checked"]

T = TypeVar("T")

READS = 6
"""Whole reads of an object before damage is reported. With one rotten replica of three, two suffice."""

_READ_AGAIN = (
    "object %s came damaged from %s (%d times) before it came whole; if this happens often, have the store's "
    "disks and the network to it checked"
)
_LOG = logging.getLogger(__name__)


def get_checked(
    store: Store,
    name: str,
    check: Callable[[memoryview], T],
    *,
    limit: int = MAX_OBJECT,
    newest: bool = False,
    failed_reads: int = 0,
) -> T:
    """Read object `name` and return what `check` makes of its bytes; repeat while `check` finds damage.

    The object is read at most READS times. If a later read is intact, a warning is logged that counts the
    damaged reads, `failed_reads` earlier ones of the caller included. If none is, the last exception of
    `check` is raised: DamagedObjectError, or UnsupportedObjectError, because a flipped bit can look like a
    newer version. ObjectMissingError, MemoryBudgetError and StoreError as in `Store.get`, and so is
    `limit`: an object that is larger counts as damaged.
    """
    for reads_left in range(READS - 1, -1, -1):
        try:
            found = check(store.get(name, newest=newest, limit=limit))
        except UNREADABLE:
            if not reads_left:
                raise
            failed_reads += 1
        else:
            if failed_reads:
                _LOG.warning(_READ_AGAIN, name, store.location, failed_reads)
            return found
    raise AssertionError
