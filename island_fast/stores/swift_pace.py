"""How slowly bytes may come and go.

A socket's timeout is for one call: a server that sends a byte now and then would keep a reader for ever. So
each answer is read against a clock, header and body alike, whatever library asks for it: the limit sits on
the socket, below requests and urllib3, where nothing is copied for it. `PacedAdapter` brings it there.
"""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Callable
from http.client import HTTPResponse
from typing import Any

import requests.adapters
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager, ProxyManager

from island_fast.arrays import Buffer
from island_fast.stores.base import Views
from island_fast.stores.retry import Again, Patience

__all__ = ["Pace", "PacedAdapter", "PacedBody", "TooSlow"]

_SENT_AT_ONCE = 256 << 10  # bytes; each must go out within the timeout

Arg = Any
"""What only passes through, to a library."""


class TooSlow(TimeoutError):
    """Bytes come, and would not all have come in any bearable time."""


class Pace:
    """The clock of one stretch of bytes.

    After t seconds at least (t - `patience.allowance`) * `patience.rate` bytes must have been counted; so n
    bytes never take longer than allowance + n / rate.
    """

    def __init__(self, patience: Patience, clock: Callable[[], float] = time.monotonic) -> None:
        self.bytes = 0
        self._patience = patience
        self._clock = clock
        self._began = clock()

    def left(self) -> float:
        """Seconds until it is too slow; not positive when it is."""
        patience = self._patience
        return self._began + patience.allowance + self.bytes / patience.rate - self._clock()


class PacedBody:
    """Buffers as a file whose `read` gives out the next one whole: nothing is copied on the way.

    A server that takes them too slowly is left, by `Again` in the middle of the request.
    """

    def __init__(self, content: Views, patience: Patience) -> None:
        self._pieces = (
            view[i : i + _SENT_AT_ONCE] for view in content for i in range(0, view.nbytes, _SENT_AT_ONCE)
        )
        self._patience = patience
        self._pace: Pace | None = None

    def read(self, size: int = -1) -> Buffer:
        """The next bytes, however many were asked for; b'' at the end."""
        if self._pace is None:
            self._pace = Pace(self._patience)  # now: whoever connects has a time limit of his own
        if self._pace.left() <= 0:
            raise Again("a body that went too slowly")
        piece: Buffer = next(self._pieces, b"")
        self._pace.bytes += len(piece)
        return piece


class _Paced(io.RawIOBase):
    """The bytes of one answer. Owns `raw`, which reads from `sock`; the socket's own timeout stays valid."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, pace: Pace) -> None:
        self._raw = raw
        self._sock = sock
        self._pace = pace

    def readable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """The socket's."""
        return self._raw.fileno()

    def readinto(self, buffer: Arg) -> int | None:
        """What is there, at least one byte unless it is the end; TooSlow when its time is over."""
        left, usual = self._pace.left(), self._sock.gettimeout()
        if left <= 0:
            raise TooSlow
        if usual is not None and usual <= left:
            count: int | None = self._raw.readinto(buffer)
        else:
            count = self._hurried(buffer, left, usual)
        self._pace.bytes += count or 0
        return count

    def _hurried(self, buffer: Arg, left: float, usual: float | None) -> int | None:
        """Read with `left` seconds at most. Where nothing has come at all, it is an ordinary timeout."""
        self._sock.settimeout(left)
        try:
            return self._raw.readinto(buffer)
        except TimeoutError as error:
            if self._pace.bytes:
                raise TooSlow from error
            raise
        finally:
            self._sock.settimeout(usual)

    def close(self) -> None:
        """Let go of the socket, as http.client expects."""
        super().close()
        self._raw.close()


class _Answer(HTTPResponse):
    """http.client's answer, whose bytes are paced from here on."""

    def __init__(self, patience: Patience, sock: socket.socket, *args: Arg, **options: Arg) -> None:
        super().__init__(sock, *args, **options)
        raw = self.fp.detach()
        self.fp = io.BufferedReader(_Paced(raw, sock, Pace(patience)))


class PacedAdapter(requests.adapters.HTTPAdapter):
    """The way of a requests session to its servers, every answer paced by `patience`.

    A SOCKS proxy has connections of its own kind: behind one, only a silent socket ends a call.
    """

    def __init__(self, patience: Patience) -> None:
        super().__init__()
        self._pools = _pools(patience)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **options: Arg) -> PoolManager:
        """See HTTPAdapter."""
        manager: PoolManager = super().proxy_manager_for(proxy, **options)
        if type(manager) is ProxyManager:
            manager.pool_classes_by_scheme = self._pools
        return manager


def _pools(patience: Patience) -> dict[str, type[HTTPConnectionPool]]:
    """urllib3's pools, by scheme; each class names the class of its connections, and that of its answers."""

    def answer(sock: socket.socket, *args: Arg, **options: Arg) -> _Answer:
        return _Answer(patience, sock, *args, **options)

    def paced(pool: type[HTTPConnectionPool]) -> type[HTTPConnectionPool]:
        connection = type("Paced", (pool.ConnectionCls,), {"response_class": staticmethod(answer)})
        return type(pool.__name__, (pool,), {"ConnectionCls": connection})

    return {"http": paced(HTTPConnectionPool), "https": paced(HTTPSConnectionPool)}
