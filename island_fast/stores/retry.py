"""The one retry loop: jittered exponential pauses, and a total after which it gives up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Again", "Patience", "persist"]

T = TypeVar("T")


class Again(Exception):
    """An attempt failed, and the next one may not.

    `reason` says in a few words what was seen; `wait` is how many seconds the server asked to be
    left alone, 0.0 if it did not say. Never reaches a user: whoever calls `persist` translates it.
    """

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to go on, in seconds: altogether, the first pause, and the longest one.

    `allowance` (seconds) and `rate` (bytes a second) bound one body: of n bytes, it must have come, or gone,
    within allowance + n / rate, and may at no moment be later than that for the bytes so far. The rate is
    low: several bodies share a line, and only those are meant that would keep a verb for hours.
    """

    total: float = 300.0
    first: float = 0.5
    longest: float = 20.0
    allowance: float = 60.0
    rate: float = 16 << 10


def persist(
    attempt: Callable[[], T],
    patience: Patience,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call `attempt` until it returns, and return that.

    Only `Again` leads to another call; it is raised to the caller once the next pause would end
    after `patience.total` seconds. Each pause is between half and all of a step that doubles; a
    server may ask for more, up to `patience.longest`.
    """
    end = clock() + patience.total
    step = patience.first
    while True:
        try:
            return attempt()
        except Again as failure:
            jittered = random.uniform(step / 2, step)
            pause = max(jittered, min(failure.wait, patience.longest))
            if clock() + pause > end:
                raise
        sleep(pause)
        step = min(step * 2, patience.longest)
