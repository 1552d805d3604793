"""Reading an object until it is whole: what comes damaged is asked for again before it is believed.

A bit can flip on the way, or rot in one of several replicas. Swift serves a rotten replica's ranges for
ever, but notices it when it sends it whole, and asks another one from then on: so repetitions are whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from island_fast.errors import UNREADABLE
from island_fast.stores.base import Store

__all__ = ["READS", "get_checked"]

T = TypeVar("T")

READS = 6
"""Whole reads of one object before damage is believed: with one rotten replica of three, two suffice."""

_MENDED = (
    "object %s came damaged from %s (%d times) before it came whole; if that happens often, have the store's "
    "disks and the way to it checked"
)
_LOG = logging.getLogger(__name__)


def get_checked(
    store: Store,
    name: str,
    check: Callable[[memoryview], T],
    *,
    newest: bool = False,
    damaged: int = 0,
) -> T:
    """What `check` makes of the bytes of object `name`, read at most READS times while it finds damage.

    Damage that another read mends is told to the user; `damaged` counts reads that found some before.
    The last DamagedObjectError is raised, or UnsupportedObjectError: a flipped bit may look like a newer
    version. ObjectMissingError and StoreError as in `Store.get`.
    """
    for reads_left in range(READS - 1, -1, -1):
        data = store.get(name, newest=newest)
        try:
            found = check(data)
        except UNREADABLE:
            if not reads_left:
                raise
            damaged += 1
        else:
            if damaged:
                _LOG.warning(_MENDED, name, store.location, damaged)
            return found
    raise AssertionError
