"""Who listens on a socket, and whether a process lives: what the kernel tells without asking the process."""

from __future__ import annotations

import errno
import socket
import struct
from pathlib import Path

from island_fast.errors import IslandError

__all__ = ["is_alive", "listener"]

_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid
_NOBODY_LISTENS = (errno.ENOENT, errno.ECONNREFUSED)


def listener(path: Path) -> int | None:
    """The process that listens on a socket: its pid, 0 where its queue is full, None where nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as client:
        client.setblocking(False)
        try:
            client.connect(str(path))
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno in _NOBODY_LISTENS:
                return None
            raise IslandError(f"QMP socket {str(path)!r} cannot be connected to: {error.strerror}") from error
        peer = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        pid: int = _PEER.unpack(peer)[0]
        return pid


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and waits for its parent does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
