"""A qemu process that has images open, over its QMP socket.

QMP is JSON, one message to a line: a greeting, then commands and their replies, with events between them
(qemu's docs/interop/qmp-spec.rst; the commands are in qapi/block-core.json). Answers are limited in size and
time: a guest can have taken over the process.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from island_fast.errors import IslandError, NotFoundError
from island_fast.qemu.monitor import Monitor

__all__ = ["Qmp"]

TIMEOUT = 1800.0  # seconds for one command; with small caches, scattered tables take minutes
_HANDSHAKE_TIMEOUT = 10.0  # seconds; only another client of the monitor delays a greeting
_QUEUE_STEP = 0.02  # seconds
_MAX_MESSAGE = 16 << 20
_READ_SIZE = 65536
_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Qmp(Monitor):
    """A connection to one qemu process (a virtual machine or a qemu-storage-daemon). A context manager.

    The constructor connects and waits for the greeting: NotFoundError if there is no such socket, IslandError
    if nobody answers on it within 10 seconds (a QMP socket serves one client at a time). `timeout` limits
    each command, in seconds. A command that fails is an IslandError of one sentence with qemu's own words.
    After a timeout, or if the connection ends, the command may have taken effect: the image's snapshot table
    shows it. Not for use by several threads at once.
    """

    def __init__(self, socket_path: str | os.PathLike[str], timeout: float = TIMEOUT) -> None:
        self.socket_path = os.fspath(socket_path)
        self.who = f"the process behind {self.socket_path!r}"
        self.way_out = "name the QMP socket of the process that does"
        self._timeout = timeout
        self._sent = 0
        self._received = bytearray()
        self._socket = _connect(self.socket_path)
        try:
            self._shake_hands()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the connection; the process and its images stay as they are."""
        self._socket.close()

    def command(self, name: str, arguments: Mapping[str, object] | None = None) -> object:
        """See Monitor.command."""
        return self._execute(name, arguments or {})

    def peer_pid(self) -> int:
        """Return the pid of the process that listens on the socket."""
        peer = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        pid: int = _PEER.unpack(peer)[0]
        return pid

    def locate(self, name: str) -> Sequence[str]:
        """See Monitor.locate: in that process's root, and a relative name from its working directory."""
        process = f"/proc/{self.peer_pid()}"
        return [f"{process}/root{name}", name] if os.path.isabs(name) else [f"{process}/cwd/{name}"]

    def processes(self) -> Iterable[int]:
        """See Monitor.processes."""
        return [self.peer_pid()]

    def _shake_hands(self) -> None:
        deadline = time.monotonic() + min(self._timeout, _HANDSHAKE_TIMEOUT)
        if "QMP" not in self._receive(deadline, "its greeting"):
            raise self._protocol_error("does not speak QMP")
        self._execute("qmp_capabilities", {}, deadline)

    def _execute(
        self, command: str, arguments: Mapping[str, object], deadline: float | None = None
    ) -> object:
        """Send a command and return its answer; skip events, and answers to earlier commands."""
        if deadline is None:
            deadline = time.monotonic() + self._timeout
        self._sent += 1
        message = {"execute": command, "arguments": arguments, "id": self._sent}
        self._send(json.dumps(message).encode() + b"\n", deadline, command)
        while True:
            reply = self._receive(deadline, command)
            if "return" in reply and reply.get("id") == self._sent:
                return reply["return"]
            # an error without an id is about a message that qemu could not parse
            if "error" in reply and reply.get("id", self._sent) == self._sent:
                raise self.refusal_error(command, reply["error"])

    def _send(self, message: bytes, deadline: float, command: str) -> None:
        try:
            self._socket.settimeout(_seconds_left(deadline))
            self._socket.sendall(message)
        except TimeoutError as error:
            raise self._timeout_error(command) from error
        except OSError as error:
            raise self._hung_up_error(command) from error

    def _receive(self, deadline: float, awaited: str) -> dict[str, Any]:
        """Return the next message of any kind."""
        seen = 0
        while (end := self._received.find(b"\n", seen)) < 0:
            seen = len(self._received)
            if seen > _MAX_MESSAGE:
                raise self._protocol_error(f"sent a message over {_MAX_MESSAGE >> 20} MiB")
            try:
                self._socket.settimeout(_seconds_left(deadline))
                data = self._socket.recv(_READ_SIZE)
            except TimeoutError as error:
                raise self._timeout_error(awaited) from error
            except OSError as error:
                raise self._hung_up_error(awaited) from error
            if not data:
                raise self._hung_up_error(awaited)
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._protocol_error("does not speak QMP") from error
        if not isinstance(message, dict):
            raise self._protocol_error("does not speak QMP")
        return message

    def _timeout_error(self, awaited: str) -> IslandError:
        return IslandError(
            f"{self.who} did not answer in time ({awaited}); "
            f"check whether it hangs, or whether another client uses this socket"
        )

    def _hung_up_error(self, awaited: str) -> IslandError:
        return IslandError(f"{self.who} ended the connection ({awaited}); check whether it still runs")

    def _protocol_error(self, what: str) -> IslandError:
        return IslandError(f"{self.who} {what}; name the QMP socket of a qemu process")


def _connect(path: str) -> socket.socket:
    """Connect to a unix socket; wait for a place in its queue, which in qemu has only one."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(_HANDSHAKE_TIMEOUT)
        deadline = time.monotonic() + _HANDSHAKE_TIMEOUT
        while True:
            try:
                connection.connect(path)
                return connection
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_QUEUE_STEP)
    except FileNotFoundError as error:
        connection.close()
        raise NotFoundError(f"there is no QMP socket {path!r}; check the path") from error
    except ConnectionRefusedError as error:
        connection.close()
        raise IslandError(
            f"nothing listens on QMP socket {path!r}; check whether its process still runs"
        ) from error
    except BlockingIOError as error:
        connection.close()
        raise IslandError(
            f"QMP socket {path!r} is busy with other clients; run this again when they have ended"
        ) from error
    except (OSError, ValueError) as error:
        connection.close()
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise IslandError(f"QMP socket {path!r} cannot be connected to: {reason}") from error
    except BaseException:
        connection.close()
        raise


def _seconds_left(deadline: float) -> float:
    """Return the seconds until `deadline`; TimeoutError if it is past, even if there is data to read."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
