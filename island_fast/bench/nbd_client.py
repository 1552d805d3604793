"""A client of qemu-nbd, with which a volume is read and written through qemu, as a guest would do it.

It implements only the part of the protocol (doc/proto.md of the NBD project) that this needs. It imports
nothing slow, because one of the peers is a process that starts with it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

from island_fast.errors import IslandError, NotFoundError

__all__ = ["NbdClient", "serve_image"]

PIECE = 1 << 20
"""The most that one request reads or writes."""

_IN_FLIGHT = 16
_GREETING = b"NBDMAGICIHAVEOPT"
_FLAGS = 3  # fixed newstyle, no padding after the export's size
_OPT_EXPORT_NAME = 1
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_READ, _WRITE, _DISCONNECT = 0, 1, 2
_START_TIMEOUT = 60.0  # seconds until qemu-nbd has made its socket
_LISTEN_TIMEOUT = 5.0  # seconds until it listens


@contextlib.contextmanager
def serve_image(image: Path, socket_path: Path, *options: str) -> Iterator[None]:
    """Have qemu-nbd serve a qcow2 at a unix socket while the body runs, and wait until it has ended.

    The body must connect at least one `NbdClient` and disconnect all of them: then qemu-nbd closes the image
    and ends. If the body raises, qemu-nbd is killed. Raises NotFoundError if qemu-nbd is not installed, and
    IslandError if it fails.
    """
    command = ["qemu-nbd", "-f", "qcow2", "-k", str(socket_path), *options, str(image)]
    try:
        server = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    except FileNotFoundError as error:
        raise NotFoundError("qemu-nbd is not installed; install qemu-utils") from error
    with server:
        try:
            deadline = time.monotonic() + _START_TIMEOUT
            while not socket_path.exists() and server.poll() is None and time.monotonic() < deadline:
                time.sleep(0.001)
            yield
        except BaseException:
            server.kill()
            raise
        finally:
            errors = server.stderr.read() if server.stderr else b""
            code = server.wait()
            socket_path.unlink(missing_ok=True)
        if code:
            raise IslandError(f"qemu-nbd failed on {image}: {errors.decode(errors='replace').strip()}")


class NbdClient:
    """A connection to the default export of a qemu-nbd; a context manager. Threads must not share one."""

    def __init__(self, socket_path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect(str(socket_path))
            self._shake_hands()
        except BaseException:
            self._socket.close()
            raise

    def _connect(self, socket_path: str) -> None:
        """Connect, and retry while qemu-nbd does not listen yet: it makes the socket a moment earlier."""
        deadline = time.monotonic() + _LISTEN_TIMEOUT
        while True:
            try:
                return self._socket.connect(socket_path)
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _DISCONNECT, 0, 0, 0))
        self._socket.close()

    def _shake_hands(self) -> None:
        greeting = self._receive(18)
        if greeting[:16] != _GREETING:
            raise IslandError("qemu-nbd does not speak the newstyle NBD protocol; update it")
        self._socket.sendall(struct.pack(">I8sII", _FLAGS, b"IHAVEOPT", _OPT_EXPORT_NAME, 0))
        self._receive(10)

    def _receive(self, size: int) -> bytearray:
        data = bytearray(size)
        self._receive_into(memoryview(data))
        return data

    def _receive_into(self, view: memoryview) -> None:
        while view:
            got = self._socket.recv_into(view)
            if not got:
                raise IslandError("qemu-nbd closed the connection; its own message should say why")
            view = view[got:]

    def _send(self, kind: int, cookie: int, offset: int, length: int) -> None:
        self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, kind, cookie, offset, length))

    def _receive_reply(self) -> int:
        """Receive the header of one reply, and return its cookie."""
        magic, error, cookie = _REPLY.unpack(self._receive(_REPLY.size))
        if magic != _REPLY_MAGIC or error:
            raise IslandError(f"qemu-nbd refused a request ({os.strerror(error)})")
        return int(cookie)

    def read(self, ranges: Sequence[tuple[int, int]], receive: Callable[[int, memoryview], object]) -> None:
        """Read (offset, length) ranges; call `receive(offset, data)` for each piece, in any order.

        `data` is valid only until `receive` returns.
        """
        wanted = [
            (at, min(PIECE, offset + length - at))
            for offset, length in ranges
            for at in range(offset, offset + length, PIECE)
        ]
        buffer = memoryview(bytearray(PIECE))
        sent = 0
        for done in range(len(wanted)):
            while sent < min(len(wanted), done + _IN_FLIGHT):
                self._send(_READ, sent, *wanted[sent])
                sent += 1
            offset, length = wanted[self._receive_reply()]
            self._receive_into(buffer[:length])
            receive(offset, buffer[:length])

    def write(self, pieces: Iterator[tuple[int, bytes]]) -> None:
        """Write (offset, content) pieces of at most PIECE bytes each; return when qemu has answered all."""
        waiting = 0
        for offset, content in pieces:
            self._send(_WRITE, 0, offset, len(content))
            self._socket.sendall(content)
            waiting += 1
            if waiting == _IN_FLIGHT:
                self._receive_reply()
                waiting -= 1
        for _ in range(waiting):
            self._receive_reply()
