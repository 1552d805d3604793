"""Find out which process listens on a socket and whether a process is alive, from the kernel alone."""

from __future__ import annotations

import errno
import socket
import struct
from pathlib import Path

from island_fast.errors import IslandError

__all__ = ["find_listener", "is_alive"]

_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid
_NOBODY_LISTENS = (errno.ENOENT, errno.ECONNREFUSED)


def find_listener(path: Path) -> int | None:
    """Return the pid of the process that listens on a socket, 0 if its queue is full, None if nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as client:
        client.setblocking(False)
        try:
            client.connect(str(path))
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno in _NOBODY_LISTENS:
                return None
            raise IslandError(f"cannot connect to the QMP socket {str(path)!r}: {error.strerror}") from error
        peer = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        pid: int = _PEER.unpack(peer)[0]
        return pid


def is_alive(pid: int) -> bool:
    """Return whether a process is running; a zombie is not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
