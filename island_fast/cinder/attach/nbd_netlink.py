"""Commands for the kernel's NBD driver, sent by generic netlink. The kernel accepts them only from root.

Root runs this, so it imports nothing but the standard library and the NBD handshake. Sources:
linux/genetlink.h and linux/nbd-netlink.h. Numbers are in the machine's own byte order.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from typing import Self

from island_fast.qemu.nbd_handshake import Client

__all__ = ["NbdNetlink"]

_DRIVER = b"nbd"
_NETLINK_GENERIC = 16  # the socket module has no name for it
_REQUEST, _WANT_ACK, _MSG_ERROR = 0x1, 0x4, 0x2
_CONTROL, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 0x10, 3, 1, 2
_CONNECT, _DISCONNECT, _RECONFIGURE = 1, 2, 3
_INDEX, _SIZE, _BLOCK_SIZE, _TIMEOUT, _SERVER_FLAGS, _CLIENT_FLAGS, _SOCKETS, _DEAD_TIMEOUT = range(1, 9)
_BACKING = 10
_SOCKET_ITEM, _SOCKET_FD = 1, 1
_NESTED = 0x8000
_DISCONNECT_ON_CLOSE = 2
_SECTOR = 512  # bytes
_MAX_PACKET = 64 << 10  # bytes of the kernel's answer
_HEADER, _GENERIC, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BBH"), struct.Struct("=HH")


class NbdNetlink:
    """A netlink socket to the kernel's NBD driver. A context manager. Errors are OSError, the kernel's own.

    `index` is the number of a device, and `name` the backing that the kernel keeps with it. The kernel
    refuses a command that gives another name for the index.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)
        try:
            self._socket.bind((0, 0))
            self._family = self._find_family()
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def connect(self, client: Client, name: str, timeout: int) -> int:
        """Connect a free device, which the kernel chooses, to the client's server; return its index.

        The server has `timeout` seconds for each request. Requests fail as soon as the connection breaks.
        """
        attributes = [
            *_size_attributes(client.size),
            _attribute(_SERVER_FLAGS, _u64(client.flags)),
            _attribute(_TIMEOUT, _u64(timeout)),
            _attribute(_BACKING, name.encode() + b"\0"),
            _socket_attribute(client),
        ]
        answer = self._request(self._family, _CONNECT, b"".join(attributes))
        (index,) = struct.unpack("=I", answer[_INDEX][:4])
        return int(index)

    def disconnect(self, index: int) -> None:
        """End the connection; whoever has the device open gets errors."""
        self._request(self._family, _DISCONNECT, _attribute(_INDEX, _u32(index)))

    def set_disconnect_on_close(self, index: int, name: str, enabled: bool) -> None:
        """Make the kernel disconnect the device when its last user closes it, or not."""
        flags = _attribute(_CLIENT_FLAGS, _u64(_DISCONNECT_ON_CLOSE if enabled else 0))
        self._configure(index, name, flags)

    def set_timeouts(self, index: int, name: str, timeout: int, reconnect_timeout: int) -> None:
        """Set the seconds for a request, and the seconds in which a broken connection can be replaced."""
        timeouts = _attribute(_TIMEOUT, _u64(timeout)) + _attribute(_DEAD_TIMEOUT, _u64(reconnect_timeout))
        self._configure(index, name, timeouts)

    def reconnect(self, index: int, name: str, client: Client) -> None:
        """Replace a broken connection of the device by the client's.

        If the old connection is not broken, the kernel keeps it and reports no error.
        """
        self._configure(index, name, _socket_attribute(client))

    def set_size(self, index: int, name: str, size: int) -> None:
        """Set the device's size in bytes.

        Since Linux 6.9 the kernel waits for all requests under way before it sets a new size, and sets it
        before it takes a connection that the same command brings. So this is a command of its own, for a
        connection that is alive.
        """
        self._configure(index, name, b"".join(_size_attributes(size)))

    def _find_family(self) -> int:
        """Return the driver's number in netlink, which knows it only in the host's network namespace."""
        try:
            answer = self._request(_CONTROL, _GET_FAMILY, _attribute(_FAMILY_NAME, _DRIVER + b"\0"))
        except FileNotFoundError as error:
            raise OSError(
                error.errno, "the module nbd is not loaded, or this is not the host's network namespace"
            ) from error
        (number,) = struct.unpack("=H", answer[_FAMILY_ID][:2])
        return int(number)

    def _configure(self, index: int, name: str, attributes: bytes) -> None:
        device = _attribute(_INDEX, _u32(index)) + _attribute(_BACKING, name.encode() + b"\0")
        self._request(self._family, _RECONFIGURE, device + attributes)

    def _request(self, family: int, command: int, attributes: bytes) -> Mapping[int, bytes]:
        """Send a command and wait until it is done; return the attributes of the kernel's answer, if any."""
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
                    answer = _parse_attributes(message[_GENERIC.size :])
                    continue
                (code,) = struct.unpack_from("=i", message)
                if code:
                    raise OSError(-code, f"the kernel's NBD driver refused the command: {os.strerror(-code)}")
                return answer


def _size_attributes(size: int) -> list[bytes]:
    return [_attribute(_SIZE, _u64(size)), _attribute(_BLOCK_SIZE, _u64(_SECTOR))]


def _socket_attribute(client: Client) -> bytes:
    fd = _attribute(_SOCKET_FD, _u32(client.socket.fileno()))
    return _attribute(_SOCKETS | _NESTED, _attribute(_SOCKET_ITEM | _NESTED, fd))


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def _parse_attributes(attributes: bytes) -> dict[int, bytes]:
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
