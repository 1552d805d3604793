"""The servers of peers that cannot use Swift: `borg serve` for Borg 1, and Borg 2's own REST server."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from island_fast.bench.peers.all_peers import PROGRAMS
from island_fast.errors import IslandError, NotFoundError

__all__ = ["find_rest_server", "serve_borg", "serve_rest"]

_TIMEOUT = 180.0  # seconds until a server answers; on a busy machine that takes long
_REST = "borgstore-server-rest"


@contextlib.contextmanager
def serve_borg(program: str) -> Iterator[int]:
    """Run `borg serve` for each connection to a port, while the body runs; yield the port."""
    running: list[subprocess.Popen[bytes]] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with connection:
                    both = connection.fileno()
                    process = subprocess.Popen([program, "serve"], stdin=both, stdout=both)
                running.append(process)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)  # ends accept()
            thread.join()
            for process in running:
                process.kill()
                process.wait()


def find_rest_server() -> str:
    """Return the REST server that comes with Borg 2's borgstore. Raises NotFoundError if there is none."""
    found = shutil.which(_REST, path=str(PROGRAMS)) or shutil.which(_REST)
    if not found:
        raise NotFoundError(f"{_REST}, the server of Borg 2, is not installed; run: python -m scripts.peers")
    return found


@contextlib.contextmanager
def serve_rest(folder: Path) -> Iterator[int]:
    """Run Borg 2's REST server for a repository in `folder` while the body runs; yield its port.

    Raises NotFoundError if it is not installed, IslandError if it does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [find_rest_server(), "--port", str(port), "--backend", f"file://{folder}"]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            end = time.monotonic() + _TIMEOUT
            while not _listens(port):
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    last = log.read().decode(errors="replace")[-1000:]
                    raise IslandError(f"Borg 2's REST server did not start; its last output: {last}")
                time.sleep(0.05)
            yield port
        finally:
            server.kill()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
