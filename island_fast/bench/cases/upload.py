"""Sending packs to a real Swift on this machine, against the least that a client can do."""

from __future__ import annotations

import itertools
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Self

import numpy as np

from island_fast.bench.case import GIB, MIB, Context, Work
from island_fast.bench.report import Counter, Row
from island_fast.bench.swift import Account, serving, signed_in
from island_fast.bench.timing import pairs, row
from island_fast.errors import IslandError
from island_fast.stores.swift import SwiftStore

__all__ = ["WORKS"]

_PACK = 16 * MIB
_PAIRS, _QUICK_PAIRS = 40, 5
_CONTAINER = "bench"
_FRONT = 8 << 10  # a pack comes as its front and its blocks


class _Bare:
    """A socket that sends requests and looks at nothing but the answers' status; a context manager."""

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

    def ask(self, method: str, name: str, data: bytes = b"") -> None:
        """Make one request for an object; IslandError unless the answer is a success."""
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
            raise IslandError(f"the bench's Swift answers {status!r}; report this fault")


def _sending(context: Context) -> Iterator[Row | Counter]:
    data = np.random.default_rng(context.seed).bytes(_PACK)
    parts = [memoryview(data)[:_FRONT], memoryview(data)[_FRONT:]]
    count = _QUICK_PAIRS if context.quick else _PAIRS
    processor: list[float] = []
    with (
        serving(_CONTAINER) as account,
        signed_in(account),
        SwiftStore.open(_CONTAINER) as store,
        _Bare(account) as bare,
    ):
        numbers = itertools.count()

        def sent(send: Callable[[str], object]) -> float:
            """The rate in MiB/s; the object is removed afterwards."""
            name = f"pack-{next(numbers)}"
            began = time.perf_counter()
            send(name)
            rate = _PACK / MIB / (time.perf_counter() - began)
            bare.ask("DELETE", name)
            return rate

        def ours(name: str) -> None:
            used = time.process_time()
            store.put(name, parts)
            processor.append(time.process_time() - used)

        context.tell("sending packs")
        found = pairs(count, lambda: sent(ours), lambda: sent(lambda name: bare.ask("PUT", name, data)))
    reach = None if context.quick else 0.95
    yield row("sending packs of 16 MiB to Swift", "a bare socket", found, unit="MiB/s", reach=reach)
    used = statistics.median(processor) * GIB / _PACK
    yield Counter("processor time of sending, without compression", used, "s per GiB", reach=0.5, noise=0.5)


WORKS = (Work("sending to Swift", _sending, swift=True),)
