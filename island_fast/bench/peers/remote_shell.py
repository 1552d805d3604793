"""What Borg 1 runs in place of ssh (BORG_RSH): it connects Borg with the server of `servers.serve_borg`.

    python -I -S remote_shell.py PORT HOST COMMAND...

It ignores host and command, and copies both ways without looking at a byte, which costs less than ssh.
"""

from __future__ import annotations

import os
import socket
import sys
import threading

_MOST = 1 << 20


def main() -> None:
    """Connect standard input and output with the port until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as server:
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_send, args=[server], daemon=True).start()
        # Not by splice(): while that waits for the socket, nobody else can even look at the pipe.
        while data := server.recv(_MOST):
            _write(data)
    os._exit(0)  # the thread may be waiting for input


def _send(server: socket.socket) -> None:
    while data := os.read(0, _MOST):
        server.sendall(data)
    server.shutdown(socket.SHUT_WR)


def _write(data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(1, rest) :]


if __name__ == "__main__":
    main()
