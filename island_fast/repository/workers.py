"""Threads that work on parts of a stream, a bounded number of parts at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["in_order", "workers"]

T = TypeVar("T")


@contextmanager
def workers(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Hold a pool of `count` threads; at the end drop its queued jobs and wait for its running ones."""
    pool = ThreadPoolExecutor(count, thread_name_prefix=f"island-{name}")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_order(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], T]], limit: int) -> Iterator[T]:
    """Run `jobs` in the threads of `pool`, and yield their results in the order of `jobs`.

    At most `limit` jobs are submitted whose results the caller has not used. So a job can use again what the
    job `limit` places before it used, such as a buffer. The first exception of a job, in this order, is
    raised here; the pool drops or ends the other jobs.
    """
    waiting: deque[Future[T]] = deque()
    for job in jobs:
        if len(waiting) == limit:
            yield waiting.popleft().result()
        waiting.append(pool.submit(job))
    while waiting:
        yield waiting.popleft().result()
