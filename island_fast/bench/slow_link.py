"""A TCP proxy that adds delay, as a network does, and limits no rate: between a tool and its store.

    python -m island_fast.bench.slow_link PORT SECONDS

It listens on a free port, which it prints, and passes every connection on to PORT. Bytes arrive half of
SECONDS, the round trip, after they were sent, in both directions; the first ones a round trip later, for that
is what setting up a connection takes. It ends when the process that started it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from typing import cast

from island_fast.bench.island_command import make_child_environment
from island_fast.errors import IslandError

__all__ = ["slow_link"]

_IN_FLIGHT = 64 << 20
"""Bytes that a direction holds at most: more than any rate here brings in the time that they are held."""

_READ = 1 << 20


@contextlib.contextmanager
def slow_link(port: int, seconds: float) -> Iterator[int]:
    """Run the proxy in a process while the body runs; yield the port that leads to `port`."""
    command = [sys.executable, "-m", "island_fast.bench.slow_link", str(port), str(seconds)]
    variables = {**os.environ, **make_child_environment()}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=variables) as proxy:
        try:
            assert proxy.stdout is not None
            line = proxy.stdout.readline()
            if not line:
                raise IslandError("the proxy that delays did not start; report this fault of the bench")
            yield int(line)
        finally:
            proxy.kill()


class _Direction:
    """Copies one direction of a connection, each piece `delay` after it came and none before `ready`."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ready: float, delay: float
    ) -> None:
        self._reader, self._writer = reader, writer
        self._ready, self._delay = ready, delay
        self._held: deque[tuple[float, bytes]] = deque()
        self._size = 0
        self._changed = asyncio.Condition()

    async def copy(self) -> None:
        """Copy until the sender has ended; let the receiver know that."""
        receiving = asyncio.create_task(self._receive())
        try:
            await self._send()
        finally:
            receiving.cancel()

    async def _receive(self) -> None:
        """Hold what comes, with the time when it is due; an end is held as no bytes."""
        loop = asyncio.get_running_loop()
        data = b"?"
        while data:
            try:
                data = await self._reader.read(_READ)
            except ConnectionError:
                data = b""
            async with self._changed:
                await self._changed.wait_for(lambda: self._size < _IN_FLIGHT)
                self._held.append((max(loop.time(), self._ready) + self._delay, data))
                self._size += len(data)
                self._changed.notify_all()

    async def _send(self) -> None:
        """Send what is due, until the end or until the receiver has gone."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            while True:
                async with self._changed:
                    await self._changed.wait_for(lambda: bool(self._held))
                due, data = self._held[0]
                await asyncio.sleep(due - loop.time())
                if not data:
                    self._writer.write_eof()
                    return
                self._writer.write(data)
                await self._writer.drain()
                async with self._changed:
                    self._held.popleft()
                    self._size -= len(data)
                    self._changed.notify_all()


async def _connect(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, seconds: float
) -> None:
    """Serve one connection until both directions have ended; close it at once if nobody serves PORT."""
    ready = asyncio.get_running_loop().time() + seconds
    with contextlib.closing(writer), contextlib.suppress(ConnectionError):
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port, limit=_READ)
        with contextlib.closing(far_writer):
            await asyncio.gather(
                _Direction(reader, far_writer, ready, seconds / 2).copy(),
                _Direction(far_reader, writer, ready, seconds / 2).copy(),
            )


async def _serve(port: int, seconds: float) -> None:
    server = await asyncio.start_server(
        lambda reader, writer: _connect(reader, writer, port, seconds), "127.0.0.1", 0, limit=_READ
    )
    print(cast("tuple[str, int]", server.sockets[0].getsockname())[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Serve until this process is killed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2])))


if __name__ == "__main__":
    main()
