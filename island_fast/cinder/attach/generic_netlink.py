"""Commands to drivers of the kernel, sent by generic netlink. The kernel accepts changes only from root.

Root runs this, so it imports nothing but the standard library. Source: linux/genetlink.h. Numbers are in the
machine's own byte order.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from typing import Self

__all__ = ["NESTED", "GenericNetlink", "attribute", "u32", "u64"]

NESTED = 0x8000
"""The bit in the number of an attribute whose value is attributes."""

_NETLINK_GENERIC = 16  # the socket module has no name for it
_REQUEST, _WANT_ACK, _MSG_ERROR = 0x1, 0x4, 0x2
_CONTROL, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 0x10, 3, 1, 2
_MAX_PACKET = 64 << 10  # bytes of the kernel's answer
_HEADER, _GENERIC, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BBH"), struct.Struct("=HH")


class GenericNetlink:
    """A netlink socket to one driver of the kernel. A context manager. Errors are OSError, the kernel's own.

    `driver` is the driver's name in generic netlink, and that of its module. Raises FileNotFoundError if the
    kernel does not know it here.
    """

    def __init__(self, driver: str) -> None:
        self._driver = driver
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

    def request(self, command: int, attributes: bytes) -> Mapping[int, bytes]:
        """Send a command and wait until it is done; return the attributes of the kernel's answer, if any."""
        return self._request(self._family, command, attributes)

    def _find_family(self) -> int:
        """Return the driver's number in netlink, which knows it only in the host's network namespace."""
        try:
            name = attribute(_FAMILY_NAME, self._driver.encode() + b"\0")
            answer = self._request(_CONTROL, _GET_FAMILY, name)
        except FileNotFoundError as error:
            raise OSError(
                error.errno,
                f"the module {self._driver} is not loaded, or this is not the host's network namespace",
            ) from error
        (number,) = struct.unpack("=H", answer[_FAMILY_ID][:2])
        return int(number)

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
                    raise OSError(
                        -code, f"the kernel's {self._driver} driver refused the command: {os.strerror(-code)}"
                    )
                return answer


def attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute of this number, padded."""
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


def u32(value: int) -> bytes:
    """Return a number as the value of a 32-bit attribute."""
    return struct.pack("=I", value)


def u64(value: int) -> bytes:
    """Return a number as the value of a 64-bit attribute."""
    return struct.pack("=Q", value)
