"""The retry loop: exponential pauses with jitter, until a total time is over."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeVar

__all__ = ["RetryPolicy", "RetryableError", "parse_retry_after", "retry"]

T = TypeVar("T")


class RetryableError(Exception):
    """An attempt failed in a way that the next one may not.

    `reason` says in a few words what was seen. `wait` is the pause in seconds that the server asked for, 0.0
    if it did not. `unsent`: the server has certainly not got the request. It never reaches a user: the caller
    of `retry` translates it.
    """

    def __init__(self, reason: str, wait: float = 0.0, *, unsent: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait
        self.unsent = unsent


def parse_retry_after(value: str) -> float:
    """Return the seconds that a Retry-After header asks for, as a number or a date (RFC 9110); else 0.0."""
    if value.isascii() and value.isdecimal():
        return float(value) if len(value) < 10 else 0.0
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to retry: the time for all attempts, the first pause and the longest pause, in seconds.

    `allowance` (seconds) and `rate` (bytes per second) limit one body: after t seconds at least (t -
    allowance) * rate of its bytes must have been transferred, so n bytes never take longer than allowance + n
    / rate. The rate is low, because several bodies share a line: the limit is there for transfers that would
    otherwise keep a command for hours.
    """

    total: float = 300.0
    first: float = 0.5
    longest: float = 20.0
    allowance: float = 60.0
    rate: float = 16 << 10


def retry(
    attempt: Callable[[], T],
    policy: RetryPolicy,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call `attempt` until it returns, and return its result.

    Only `RetryableError` leads to another call. It is raised once the next pause would end more than
    `policy.total` seconds after the start. Each pause is between half and all of a step that doubles; a
    server can ask for a longer one, up to `policy.longest`. One that twice in a row asks for a pause longer
    than `policy.total` is not asked again.
    """
    end = clock() + policy.total
    step = policy.first
    sent_away = False
    while True:
        try:
            return attempt()
        except RetryableError as error:
            if sent_away and error.wait > policy.total:
                raise
            sent_away = error.wait > policy.total
            jittered = random.uniform(step / 2, step)
            pause = max(jittered, min(error.wait, policy.longest))
            if clock() + pause > end:
                raise
        sleep(pause)
        step = min(step * 2, policy.longest)
