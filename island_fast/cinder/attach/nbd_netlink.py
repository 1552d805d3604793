"""Commands for the kernel's NBD driver, sent by generic netlink. The kernel accepts them only from root.

Root runs this, so it imports nothing but the standard library, `generic_netlink.py` and the NBD handshake.
Source: linux/nbd-netlink.h.
"""

from __future__ import annotations

import struct

from island_fast.cinder.attach.generic_netlink import NESTED, GenericNetlink, attribute, u32, u64
from island_fast.qemu.nbd_handshake import Client

__all__ = ["NbdNetlink"]

_DRIVER = "nbd"
_CONNECT, _DISCONNECT, _RECONFIGURE = 1, 2, 3
_INDEX, _SIZE, _BLOCK_SIZE, _TIMEOUT, _SERVER_FLAGS, _CLIENT_FLAGS, _SOCKETS, _DEAD_TIMEOUT = range(1, 9)
_BACKING = 10
_SOCKET_ITEM, _SOCKET_FD = 1, 1
_DISCONNECT_ON_CLOSE = 2
_SECTOR = 512  # bytes


class NbdNetlink(GenericNetlink):
    """A netlink socket to the kernel's NBD driver. A context manager. Errors are OSError, the kernel's own.

    `index` is the number of a device, and `name` the backing that the kernel keeps with it. The kernel
    refuses a command that gives another name for the index.
    """

    def __init__(self) -> None:
        super().__init__(_DRIVER)

    def connect(self, client: Client, name: str, timeout: int) -> int:
        """Connect a free device, which the kernel chooses, to the client's server; return its index.

        The server has `timeout` seconds for each request. Requests fail as soon as the connection breaks.
        """
        attributes = [
            *_size_attributes(client.size),
            attribute(_SERVER_FLAGS, u64(client.flags)),
            attribute(_TIMEOUT, u64(timeout)),
            attribute(_BACKING, name.encode() + b"\0"),
            _socket_attribute(client),
        ]
        answer = self.request(_CONNECT, b"".join(attributes))
        (index,) = struct.unpack("=I", answer[_INDEX][:4])
        return int(index)

    def disconnect(self, index: int) -> None:
        """End the connection; whoever has the device open gets errors."""
        self.request(_DISCONNECT, attribute(_INDEX, u32(index)))

    def set_disconnect_on_close(self, index: int, name: str, enabled: bool) -> None:
        """Make the kernel disconnect the device when its last user closes it, or not."""
        flags = attribute(_CLIENT_FLAGS, u64(_DISCONNECT_ON_CLOSE if enabled else 0))
        self._configure(index, name, flags)

    def set_timeouts(self, index: int, name: str, timeout: int, reconnect_timeout: int) -> None:
        """Set the seconds for a request, and the seconds in which a broken connection can be replaced."""
        timeouts = attribute(_TIMEOUT, u64(timeout)) + attribute(_DEAD_TIMEOUT, u64(reconnect_timeout))
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

    def _configure(self, index: int, name: str, attributes: bytes) -> None:
        device = attribute(_INDEX, u32(index)) + attribute(_BACKING, name.encode() + b"\0")
        self.request(_RECONFIGURE, device + attributes)


def _size_attributes(size: int) -> list[bytes]:
    return [attribute(_SIZE, u64(size)), attribute(_BLOCK_SIZE, u64(_SECTOR))]


def _socket_attribute(client: Client) -> bytes:
    fd = attribute(_SOCKET_FD, u32(client.socket.fileno()))
    return attribute(_SOCKETS | NESTED, attribute(_SOCKET_ITEM | NESTED, fd))
