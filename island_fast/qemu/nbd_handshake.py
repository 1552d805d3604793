"""The beginning of an NBD connection: fixed newstyle negotiation by a client, up to the transmission phase.

The protocol is described in the NBD project's doc/proto.md. Numbers are big-endian. This module imports the
standard library alone, because root runs it: `cinder/attach/nbd_root.py` uses it, and so does `qemu_nbd.py`.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

__all__ = ["Client", "shake_hands"]

_HELLO, _OPTION, _REPLY = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
_NEWSTYLE, _NO_ZEROES = 1, 2  # both sides' handshake flags
_OPT_GO, _ACK, _INFO, _ERROR = 7, 1, 3, 1 << 31
_INFO_EXPORT = 0
_MAX_REPLY = 64 << 10  # bytes of the reply to an option


class Client(NamedTuple):
    """A connection to an NBD server that is ready for requests, and what the server says of the export."""

    socket: socket.socket
    size: int  # bytes
    flags: int  # NBD_FLAG_*, as the kernel wants them


def shake_hands(connection: socket.socket, export: str) -> Client:
    """Negotiate the use of an export; ConnectionError, or another OSError, if the server does not offer it.

    `connection` is a connected stream socket, which the result refers to; the caller still owns it.
    """
    if _receive(connection, 16) != _HELLO + _OPTION:
        raise ConnectionError("the server does not speak the newstyle NBD protocol")
    (flags,) = struct.unpack(">H", _receive(connection, 2))
    if not flags & _NEWSTYLE:
        raise ConnectionError("the server does not speak the newstyle NBD protocol")
    name = export.encode()
    data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    hello = struct.pack(">I", _NEWSTYLE | (flags & _NO_ZEROES))
    connection.sendall(hello + _OPTION + struct.pack(">II", _OPT_GO, len(data)) + data)
    found: Client | None = None
    while True:
        magic, option, kind, length = struct.unpack(">QIII", _receive(connection, 20))
        if magic != _REPLY or option != _OPT_GO or length > _MAX_REPLY:
            raise ConnectionError("the NBD server's reply is invalid")
        reply = _receive(connection, length)
        if kind & _ERROR:
            raise ConnectionError(f"the NBD server refuses: {reply.decode(errors='backslashreplace')[:200]}")
        if kind == _INFO and reply[:2] == struct.pack(">H", _INFO_EXPORT):
            size, flags = struct.unpack_from(">QH", reply, 2)
            found = Client(connection, size, flags)
        elif kind == _ACK:
            if found is None:
                raise ConnectionError("the NBD server does not state the size of its export")
            return found


def _receive(connection: socket.socket, length: int) -> bytes:
    parts = []
    while length:
        part = connection.recv(length)
        if not part:
            raise ConnectionError("the NBD server closed the connection")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
