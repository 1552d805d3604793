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
        while os.splice(server.fileno(), 1, _MOST):
            pass
    os._exit(0)  # the thread may be waiting for input


def _send(server: socket.socket) -> None:
    while os.splice(0, server.fileno(), _MOST):
        pass
    server.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    main()
