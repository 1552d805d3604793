"""Sending packs to a real Swift on this machine, against a client that does the least possible."""

from __future__ import annotations

import itertools
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Self

import numpy as np

from island_fast.bench.case import GIB, MIB, Case, Context
from island_fast.bench.report import Counter, Row
from island_fast.bench.swift import Account, run_swift, use_account
from island_fast.bench.timing import make_row, run_pairs
from island_fast.errors import IslandError
from island_fast.stores.swift import SwiftStore

__all__ = ["CASES"]

_PACK = 16 * MIB
_PAIRS, _QUICK_PAIRS = 40, 5
_CONTAINER = "bench"
_FRONT = 8 << 10  # a pack is sent as two parts, its front and its blocks


class _BareClient:
    """A socket that sends requests and checks only the status of the responses; a context manager."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._socket = socket.create_connection(("127.0.0.1", account.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answers = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.close()
        self._socket.close()

    def request(self, method: str, name: str, data: bytes = b"") -> None:
        """Make one request for an object. Raises IslandError if it does not succeed."""
        head = (
            f"{method} {self._account.path}/{_CONTAINER}/{name} HTTP/1.1\r\nHost: bench\r\n"
            f"X-Auth-Token: {self._account.token}\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        self._socket.sendall(head.encode())
        self._socket.sendall(data)
        status, length = self._answers.readline(), 0
        while (line := self._answers.readline()) not in (b"\r\n", b""):
            key, _, value = line.partition(b":")
            length = int(value) if key.lower() == b"content-length" else length
        self._answers.read(length)
        if b" 20" not in status:
            raise IslandError(f"the bench's Swift answered {status!r}; report this fault")


def _measure_sending(context: Context) -> Iterator[Row | Counter]:
    data = np.random.default_rng(context.seed).bytes(_PACK)
    parts = [memoryview(data)[:_FRONT], memoryview(data)[_FRONT:]]
    count = _QUICK_PAIRS if context.quick else _PAIRS
    processor: list[float] = []
    with (
        run_swift(_CONTAINER) as account,
        use_account(account),
        SwiftStore.open(_CONTAINER) as store,
        _BareClient(account) as bare,
    ):
        numbers = itertools.count()

        def measure_rate(send: Callable[[str], object]) -> float:
            """Send one object, remove it, and return the rate in MiB/s."""
            name = f"pack-{next(numbers)}"
            began = time.perf_counter()
            send(name)
            rate = _PACK / MIB / (time.perf_counter() - began)
            bare.request("DELETE", name)
            return rate

        def send_as_island(name: str) -> None:
            used = time.process_time()
            store.put(name, parts)
            processor.append(time.process_time() - used)

        context.show_progress("sending packs")
        found = run_pairs(
            count,
            lambda: measure_rate(send_as_island),
            lambda: measure_rate(lambda name: bare.request("PUT", name, data)),
        )
    reach = context.target_unless_quick(0.95)
    yield make_row("sending packs of 16 MiB to Swift", "a bare socket", found, unit="MiB/s", reach=reach)
    used = statistics.median(processor) * GIB / _PACK
    yield Counter("processor time of sending, without compression", used, "s per GiB", reach=0.5, noise=0.5)


CASES = (Case("sending to Swift", _measure_sending, swift=True),)
