"""The least speed at which bodies must come and go.

A socket's timeout is for one call: a server that sends a byte now and then would keep a reader waiting for
ever. So each answer, header and body, is read against a clock, whatever library reads it. The limit is at the
socket, below requests and urllib3, where it needs no copy of the data. `PacedAdapter` installs it there.
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
from island_fast.stores.retry import RetryableError, RetryPolicy

__all__ = ["Pace", "PacedAdapter", "PacedBody", "TooSlow"]

_SENT_AT_ONCE = 256 << 10  # bytes; each piece must be sent within the socket's timeout

Arg = Any
"""An argument that is only passed on to a library."""


class TooSlow(TimeoutError):
    """Bytes come, but too slowly for a `RetryPolicy`."""


class Pace:
    """The clock of one body. The caller adds to `bytes` what was transferred.

    After t seconds at least (t - `policy.allowance`) * `policy.rate` bytes must have been counted, so n bytes
    never take longer than allowance + n / rate.
    """

    def __init__(self, policy: RetryPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self.bytes = 0
        self._policy = policy
        self._clock = clock
        self._began = clock()

    def seconds_left(self) -> float:
        """Return the seconds until the body is too slow; 0 or less if it is."""
        policy = self._policy
        return self._began + policy.allowance + self.bytes / policy.rate - self._clock()


class PacedBody:
    """Buffers as a file for requests to read from. Nothing is copied.

    `read` raises RetryableError, in the middle of the request, if the server takes the bytes too slowly.
    """

    def __init__(self, content: Views, policy: RetryPolicy) -> None:
        self._pieces = (
            view[i : i + _SENT_AT_ONCE] for view in content for i in range(0, view.nbytes, _SENT_AT_ONCE)
        )
        self._policy = policy
        self._pace: Pace | None = None

    def read(self, size: int = -1) -> Buffer:
        """Return the next piece, whatever `size` is; b'' at the end."""
        if self._pace is None:
            self._pace = Pace(self._policy)  # not earlier: connecting has a time limit of its own
        if self._pace.seconds_left() <= 0:
            raise RetryableError("a body that was sent too slowly")
        piece: Buffer = next(self._pieces, b"")
        self._pace.bytes += len(piece)
        return piece


class _PacedReader(io.RawIOBase):
    """The bytes of one answer. Owns `raw`, which reads from `sock`. The socket's own timeout remains."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, pace: Pace) -> None:
        self._raw = raw
        self._sock = sock
        self._pace = pace

    def readable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the socket's file descriptor."""
        return self._raw.fileno()

    def readinto(self, buffer: Arg) -> int | None:
        """Read what has come, at least one byte except at the end; TooSlow if its time is over."""
        left, usual = self._pace.seconds_left(), self._sock.gettimeout()
        if left <= 0:
            raise TooSlow
        if usual is not None and usual <= left:
            count: int | None = self._raw.readinto(buffer)
        else:
            count = self._read_within(buffer, left, usual)
        self._pace.bytes += count or 0
        return count

    def _read_within(self, buffer: Arg, left: float, usual: float | None) -> int | None:
        """Read for at most `left` seconds; an ordinary TimeoutError if nothing has come at all."""
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
        """Close the file, and release the socket as http.client expects."""
        super().close()
        self._raw.close()


class _PacedResponse(HTTPResponse):
    """http.client's response, read at the least pace of `policy`."""

    def __init__(self, policy: RetryPolicy, sock: socket.socket, *args: Arg, **options: Arg) -> None:
        super().__init__(sock, *args, **options)
        raw = self.fp.detach()
        self.fp = io.BufferedReader(_PacedReader(raw, sock, Pace(policy)))


class PacedAdapter(requests.adapters.HTTPAdapter):
    """A transport adapter of a requests session: every answer must come at the pace of `policy`.

    A SOCKS proxy has connections of another class: through one, only a silent socket ends a call.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        super().__init__()
        self._make_pools = _make_pools(policy)
        self.poolmanager.pool_classes_by_scheme = self._make_pools

    def proxy_manager_for(self, proxy: str, **options: Arg) -> PoolManager:
        """See HTTPAdapter."""
        manager: PoolManager = super().proxy_manager_for(proxy, **options)
        if type(manager) is ProxyManager:
            manager.pool_classes_by_scheme = self._make_pools
        return manager


def _make_pools(policy: RetryPolicy) -> dict[str, type[HTTPConnectionPool]]:
    """Make urllib3 pool classes by scheme, whose connections' responses are paced."""

    def answer(sock: socket.socket, *args: Arg, **options: Arg) -> _PacedResponse:
        return _PacedResponse(policy, sock, *args, **options)

    def paced(pool: type[HTTPConnectionPool]) -> type[HTTPConnectionPool]:
        connection = type("Paced", (pool.ConnectionCls,), {"response_class": staticmethod(answer)})
        return type(pool.__name__, (pool,), {"ConnectionCls": connection})

    return {"http": paced(HTTPConnectionPool), "https": paced(HTTPSConnectionPool)}
