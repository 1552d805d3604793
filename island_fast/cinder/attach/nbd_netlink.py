"""How the kernel's NBD driver is told what to do: generic netlink, by root, and the NBD handshake before it.

Standard library alone, and nothing of the rest: root runs this. Sources: linux/genetlink.h,
linux/nbd-netlink.h, and the NBD protocol's doc/proto.md (fixed newstyle negotiation). The numbers of netlink
are in the machine's own byte order, those of NBD are big-endian.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from typing import Self

from island_fast.qemu.nbd_handshake import Client

__all__ = ["Link"]


# --- netlink ---
_DRIVER = b"nbd"
_NETLINK_GENERIC = 16  # which the socket module does not name
_REQUEST, _WANT_ACK, _MSG_ERROR = 0x1, 0x4, 0x2
_CONTROL, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 0x10, 3, 1, 2
_CONNECT, _DISCONNECT, _RECONFIGURE = 1, 2, 3
_INDEX, _SIZE, _BLOCK_SIZE, _TIMEOUT, _SERVER_FLAGS, _CLIENT_FLAGS, _SOCKETS, _PATIENCE = range(1, 9)
_BACKING = 10
_SOCKET_ITEM, _SOCKET_FD = 1, 1
_NESTED = 0x8000
_DISCONNECT_ON_CLOSE = 2
_SECTOR = 512  # bytes
_MAX_PACKET = 64 << 10  # bytes; what the kernel answers here is far shorter
_HEADER, _GENERIC, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BBH"), struct.Struct("=HH")


class Link:
    """A netlink socket to the kernel's NBD driver. A context manager. Errors are OSError, the kernel's own.

    `name` is that by which the kernel keeps the device behind an index; it refuses another.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)
        try:
            self._socket.bind((0, 0))
            self._family = self._find_driver()
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def connect(self, client: Client, name: str, timeout: int) -> int:
        """Put a device, which the kernel picks, in front of the client; its index.

        `timeout` is how many seconds the server has for a request. A connection that broke is not waited for.
        """
        wanted = [
            *_described(client.size),
            _attribute(_SERVER_FLAGS, _u64(client.flags)),
            _attribute(_TIMEOUT, _u64(timeout)),
            _attribute(_BACKING, name.encode() + b"\0"),
            _sockets(client),
        ]
        answer = self._ask(self._family, _CONNECT, b"".join(wanted))
        (index,) = struct.unpack("=I", answer[_INDEX][:4])
        return int(index)

    def disconnect(self, index: int) -> None:
        """Take the connection away, whoever has the device open: they get errors."""
        self._ask(self._family, _DISCONNECT, _attribute(_INDEX, _u32(index)))

    def goes_when_closed(self, index: int, name: str, goes: bool) -> None:
        """Let the device be disconnected when its last user closes it, or let it stay."""
        flags = _attribute(_CLIENT_FLAGS, _u64(_DISCONNECT_ON_CLOSE if goes else 0))
        self._configure(index, name, flags)

    def set_times(self, index: int, name: str, timeout: int, patience: int) -> None:
        """Give the server `timeout` seconds for a request, and us `patience` to mend the connection."""
        times = _attribute(_TIMEOUT, _u64(timeout)) + _attribute(_PATIENCE, _u64(patience))
        self._configure(index, name, times)

    def reconnect(self, index: int, name: str, client: Client) -> None:
        """Give the device a new connection in the place of a broken one, and the size of the export.

        If the old one is not broken the kernel keeps that, and says nothing.
        """
        self._configure(index, name, b"".join([*_described(client.size), _sockets(client)]))

    def _find_driver(self) -> int:
        """The number by which netlink knows the driver; it knows it in the first network namespace alone."""
        try:
            answer = self._ask(_CONTROL, _GET_FAMILY, _attribute(_FAMILY_NAME, _DRIVER + b"\0"))
        except FileNotFoundError as error:
            raise OSError(
                error.errno, "the module nbd is not loaded, or this is not the host's network namespace"
            ) from error
        (number,) = struct.unpack("=H", answer[_FAMILY_ID][:2])
        return int(number)

    def _configure(self, index: int, name: str, attributes: bytes) -> None:
        who = _attribute(_INDEX, _u32(index)) + _attribute(_BACKING, name.encode() + b"\0")
        self._ask(self._family, _RECONFIGURE, who + attributes)

    def _ask(self, family: int, command: int, attributes: bytes) -> Mapping[int, bytes]:
        """Send a command and wait until it is done; the attributes of the kernel's answer, if it gave one."""
        body = _GENERIC.pack(command, 1, 0) + attributes
        header = _HEADER.pack(_HEADER.size + len(body), family, _REQUEST | _WANT_ACK, 1, 0)
        self._socket.sendall(header + body)
        answer: Mapping[int, bytes] = {}
        while True:
            packet = self._socket.recv(_MAX_PACKET)
            while packet:
                length, kind, _, _, _ = _HEADER.unpack_from(packet)
                message, packet = packet[_HEADER.size : length], packet[-(-length // 4) * 4 :]
                if kind != _MSG_ERROR:
                    answer = _parse(message[_GENERIC.size :])
                    continue
                (code,) = struct.unpack_from("=i", message)
                if code:
                    raise OSError(-code, f"the kernel's NBD driver refuses: {os.strerror(-code)}")
                return answer


def _described(size: int) -> list[bytes]:
    return [_attribute(_SIZE, _u64(size)), _attribute(_BLOCK_SIZE, _u64(_SECTOR))]


def _sockets(client: Client) -> bytes:
    fd = _attribute(_SOCKET_FD, _u32(client.socket.fileno()))
    return _attribute(_SOCKETS | _NESTED, _attribute(_SOCKET_ITEM | _NESTED, fd))


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def _parse(attributes: bytes) -> dict[int, bytes]:
    found = {}
    while len(attributes) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if length < _ATTRIBUTE.size:
            break
        found[kind & 0x3FFF] = attributes[_ATTRIBUTE.size : length]
        attributes = attributes[-(-length // 4) * 4 :]
    return found


def _u32(value: int) -> bytes:
    return struct.pack("=I", value)


def _u64(value: int) -> bytes:
    return struct.pack("=Q", value)
