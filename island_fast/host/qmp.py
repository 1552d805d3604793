"""A qemu process that has images open, over its QMP socket; internal snapshots are taken there.

QMP is JSON, one message to a line: a greeting, then commands and their replies, with events between them
(qemu's docs/interop/qmp-spec.rst; the commands are in qapi/block-core.json). Answers are bounded in size
and in time: the process may be one that a guest has taken over.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

from island_fast.errors import IslandError, NotFoundError, RefusedError
from island_fast.host.imagelock import open_image, writer_present

__all__ = ["Qmp"]

TIMEOUT = 1800.0  # seconds for one command: with small caches, scattered tables take minutes
_HANDSHAKE_TIMEOUT = 10.0  # seconds; nothing but another client of the monitor delays a greeting
_QUEUE_STEP = 0.02  # seconds
_MAX_MESSAGE = 16 << 20
_MAX_SAID = 300  # characters of qemu's own words in a message
_READ_SIZE = 65536
_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Qmp:
    """A connection to one qemu process (a virtual machine or a qemu-storage-daemon). A context manager.

    Made, it is connected and has been greeted: NotFoundError if there is no such socket, IslandError if
    nobody answers on it within 10 seconds (a QMP socket serves one client at a time). `timeout` bounds
    each command, in seconds. A command that fails is an IslandError of one sentence with qemu's own
    words; when it times out or the connection ends, it may have been done or not, and the image's snapshot
    table tells. Not for use by several threads at once.
    """

    def __init__(self, socket_path: str | os.PathLike[str], timeout: float = TIMEOUT) -> None:
        self.socket_path = os.fspath(socket_path)
        self._timeout = timeout
        self._sent = 0
        self._received = bytearray()
        self._socket = _connect(self.socket_path)
        try:
            self._shake_hands()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; the process and its images stay as they are."""
        self._socket.close()

    def command(self, name: str, arguments: Mapping[str, object] | None = None) -> object:
        """Give one command and return qemu's answer to it."""
        return self._execute(name, arguments or {})

    def peer(self) -> int:
        """Return the pid of the process that listens on the socket."""
        peer = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        pid: int = _PEER.unpack(peer)[0]
        return pid

    def find_node(self, path: str | os.PathLike[str]) -> str:
        """Return the name of the qcow2 node whose file is the very inode of `path`.

        Where a daemon of ours has a filter in front of that node (`daemon.py` says why), it is the filter's
        name: qemu takes internal snapshots through it, and refuses to take them below it.

        Other nodes over the same file (its protocol node, a raw view, filters) do not count.
        RefusedError if the process has no such node, or several, or if nobody has the file open for
        writing: qemu tells the name that it opened, which may lead to another file by now.
        """
        shown = os.fspath(path)
        fd = open_image(shown)
        try:
            wanted, written = os.fstat(fd), writer_present(fd)
        finally:
            os.close(fd)
        nodes = self._execute("query-named-block-nodes", {"flat": True})
        names = [name for name, file in _qcow2_nodes(nodes) if self._is_file(file, wanted)]
        if not names:
            raise RefusedError(
                f"the process behind {self.socket_path!r} does not hold image {shown!r}; "
                f"name the QMP socket of the process that does"
            )
        if len(names) > 1:
            raise RefusedError(
                f"the process behind {self.socket_path!r} has image {shown!r} open {len(names)} times "
                f"(nodes {', '.join(map(repr, names))}); close all but one"
            )
        if not written:
            raise RefusedError(
                f"the process behind {self.socket_path!r} names image {shown!r}, but nobody has that file "
                f"open for writing; see whether it was replaced while in use, or is open read-only"
            )
        fronts = [name for name, file in _fronts(nodes) if self._is_file(file, wanted)]
        return fronts[0] if len(fronts) == 1 else names[0]

    def snapshot_create(self, node: str, name: str) -> None:
        """Take an internal snapshot of the node's image; on return it is in the file.

        The guest's writes wait meanwhile; what it has not written yet is not in the snapshot, as
        after a power cut. The node must be a root: one under a filter or an overlay is refused by qemu, as
        is a name that is in the table already.
        """
        self._execute("blockdev-snapshot-internal-sync", {"device": node, "name": name})

    def snapshot_delete(self, node: str, id: str, name: str) -> None:
        """Delete the internal snapshot that has this id and this name; NotFoundError if there is none."""
        self._execute("blockdev-snapshot-delete-internal-sync", {"device": node, "id": id, "name": name})

    def _shake_hands(self) -> None:
        deadline = time.monotonic() + min(self._timeout, _HANDSHAKE_TIMEOUT)
        if "QMP" not in self._receive(deadline, "its greeting"):
            raise self._nonsense("does not speak QMP")
        self._execute("qmp_capabilities", {}, deadline)

    def _execute(
        self, command: str, arguments: Mapping[str, object], deadline: float | None = None
    ) -> object:
        """Send a command and return its answer; events, and answers to earlier commands, are passed by."""
        if deadline is None:
            deadline = time.monotonic() + self._timeout
        self._sent += 1
        message = {"execute": command, "arguments": arguments, "id": self._sent}
        self._send(json.dumps(message).encode() + b"\n", deadline, command)
        while True:
            reply = self._receive(deadline, command)
            if "return" in reply and reply.get("id") == self._sent:
                return reply["return"]
            # an error without an id is about a message that could not be understood at all
            if "error" in reply and reply.get("id", self._sent) == self._sent:
                raise self._failure(command, reply["error"])

    def _send(self, message: bytes, deadline: float, command: str) -> None:
        try:
            self._socket.settimeout(_left(deadline))
            self._socket.sendall(message)
        except TimeoutError as error:
            raise self._silence(command) from error
        except OSError as error:
            raise self._hung_up(command) from error

    def _receive(self, deadline: float, awaited: str) -> dict[str, Any]:
        """Return the next message, whatever it is."""
        seen = 0
        while (end := self._received.find(b"\n", seen)) < 0:
            seen = len(self._received)
            if seen > _MAX_MESSAGE:
                raise self._nonsense(f"sent a message over {_MAX_MESSAGE >> 20} MiB")
            try:
                self._socket.settimeout(_left(deadline))
                data = self._socket.recv(_READ_SIZE)
            except TimeoutError as error:
                raise self._silence(awaited) from error
            except OSError as error:
                raise self._hung_up(awaited) from error
            if not data:
                raise self._hung_up(awaited)
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._nonsense("does not speak QMP") from error
        if not isinstance(message, dict):
            raise self._nonsense("does not speak QMP")
        return message

    def _is_file(self, name: str, wanted: os.stat_result) -> bool:
        """Tell whether `name`, as that process reports it, is the inode `wanted` seen from here.

        A relative name is one from that process's own working directory.
        """
        try:
            if not os.path.isabs(name):
                name = f"/proc/{self.peer()}/cwd/{name}"
            return os.path.samestat(os.stat(name), wanted)
        except (OSError, ValueError):
            return False

    def _failure(self, command: str, error: object) -> IslandError:
        said = str(error.get("desc")) if isinstance(error, dict) else str(error)
        said = "".join(c if c.isprintable() else "?" for c in said).rstrip(".")[:_MAX_SAID]
        sentence = f"the process behind {self.socket_path!r} refused {command}: {said}"
        if "does not exist on" in said:
            return NotFoundError(sentence)
        return IslandError(sentence)

    def _silence(self, awaited: str) -> IslandError:
        return IslandError(
            f"the process behind {self.socket_path!r} did not answer in time ({awaited}); "
            f"see whether it hangs, or whether another client holds this socket"
        )

    def _hung_up(self, awaited: str) -> IslandError:
        return IslandError(
            f"the process behind {self.socket_path!r} ended the connection ({awaited}); "
            f"see whether it still runs"
        )

    def _nonsense(self, what: str) -> IslandError:
        return IslandError(
            f"the process behind {self.socket_path!r} {what}; name the QMP socket of a qemu process"
        )


def _connect(path: str) -> socket.socket:
    """Connect to a unix socket, waiting for a place in its queue: qemu's has one, for the next client."""
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
            f"nothing listens on QMP socket {path!r}; see whether its process still runs"
        ) from error
    except BlockingIOError as error:
        connection.close()
        raise IslandError(
            f"QMP socket {path!r} is busy with other clients; try again when they have ended"
        ) from error
    except (OSError, ValueError) as error:
        connection.close()
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise IslandError(f"QMP socket {path!r} cannot be connected to: {reason}") from error
    except BaseException:
        connection.close()
        raise


def _left(deadline: float) -> float:
    """Return the seconds until `deadline`; TimeoutError when it is past, also if there is data to read."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _qcow2_nodes(nodes: object) -> Iterator[tuple[str, str]]:
    """Yield node name and file name of every qcow2 node in an answer of query-named-block-nodes."""
    for node in nodes if isinstance(nodes, list) else ():
        if not isinstance(node, dict) or node.get("drv") != "qcow2":
            continue
        name, file = node.get("node-name"), node.get("file")
        if isinstance(name, str) and isinstance(file, str):
            yield name, _protocol_file(file)


def _fronts(nodes: object) -> Iterator[tuple[str, str]]:
    """Yield node name and file name of every blkdebug filter that stands on a qcow2 node."""
    for node in nodes if isinstance(nodes, list) else ():
        if not isinstance(node, dict) or node.get("drv") != "blkdebug":
            continue
        name, file = node.get("node-name"), node.get("file")
        if isinstance(name, str) and isinstance(file, str):
            below = _options(file).get("image")
            if isinstance(below, dict) and below.get("driver") == "qcow2":
                yield name, _bottom(below)


def _protocol_file(name: str) -> str:
    """Return the name of the file at the bottom of a node; "" where it is no file.

    qemu reports a plain name where that says all, else the node's options as JSON, each node's child
    under "file".
    """
    return _bottom(_options(name)) if name.startswith("json:") else name


def _options(name: str) -> dict[str, object]:
    """Return a node's options, where qemu reports it by them."""
    try:
        node = json.loads(name.removeprefix("json:"))
    except (ValueError, RecursionError):
        return {}
    return node if isinstance(node, dict) else {}


def _bottom(node: object) -> str:
    while isinstance(node, dict) and "filename" not in node:
        node = node.get("file")
    file = node.get("filename") if isinstance(node, dict) else None
    return file if isinstance(file, str) else ""
