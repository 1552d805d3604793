"""A real qemu-storage-daemon with one qcow2 image, for tests that need a guest's writes without a guest.

It serves the image over NBD on one unix socket, where qemu-io writes to it, and QMP on another.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import pytest

__all__ = [
    "StorageDaemon",
    "create_qcow2",
    "needs_qemu",
    "needs_storage_daemon",
    "qemu_io",
    "wait_for_socket",
]

STORAGE_DAEMON = "qemu-storage-daemon"
_PATIENCE = 20.0  # seconds for a daemon to start or to end

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-img") is None or shutil.which("qemu-io") is None,
    reason="qemu-img and qemu-io (package qemu-utils) are not installed",
)
needs_storage_daemon = pytest.mark.skipif(
    shutil.which(STORAGE_DAEMON) is None or shutil.which("qemu-io") is None,
    reason=f"{STORAGE_DAEMON} (package qemu-utils or qemu-system-common) or qemu-io is not installed",
)


class StorageDaemon:
    """A daemon that has `image` open, from `start` (or `with`) to `stop` or `kill`.

    It opens the image for writing unless `read_only`. The sockets are in a temporary folder with a short path
    (a unix socket's path has at most 107 bytes). `node` is the name of the qcow2 node and of the export,
    `node_options` are more options of that node, `options` more arguments. With `cwd` and a relative `image`,
    the daemon knows its image only by a relative name.
    """

    def __init__(
        self,
        image: str | os.PathLike[str],
        *,
        node: str = "disk",
        read_only: bool = False,
        options: Sequence[str] = (),
        node_options: Mapping[str, object] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> None:
        self.image = os.fspath(image)
        self.node = node
        self._read_only = read_only
        self._options = list(options)
        self._node_options = dict(node_options or {})
        self._cwd = cwd
        self._folder = Path(tempfile.mkdtemp(prefix="island-qsd-"))
        self.qmp_socket = self._folder / "qmp"
        self.nbd_socket = self._folder / "nbd"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the daemon is not running"
        return self._process.pid

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{self.node}?socket={self.nbd_socket}"

    def start(self) -> None:
        name = self.image.replace(",", ",,")
        only, writable = ("on", "off") if self._read_only else ("off", "on")
        node = f"driver=qcow2,node-name={self.node},read-only={only}"
        for key, value in self._node_options.items():
            node += f",{key}={str(value).lower() if isinstance(value, bool) else value}"
        command = [
            *[STORAGE_DAEMON, "--blockdev"],
            f"{node},file.driver=file,file.filename={name}",
            *self._options,
            *["--nbd-server", f"addr.type=unix,addr.path={self.nbd_socket}"],
            *["--export", f"type=nbd,id=e,node-name={self.node},writable={writable}"],
            *["--chardev", f"socket,path={self.qmp_socket},server=on,wait=off,id=m"],
            *["--monitor", "chardev=m"],
        ]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._cwd
            )
        try:
            wait_for_socket(self._process, self.nbd_socket)
            wait_for_socket(self._process, self.qmp_socket)
        except BaseException as error:
            error.add_note((self._folder / "log").read_text(errors="replace"))
            self.kill()
            raise

    def io(self, *commands: str) -> str:
        """Run qemu-io commands on the volume as a guest would; return what they printed."""
        return qemu_io(self.uri, *commands, image_format="raw", read_only=self._read_only)

    def write(self, offset: int, length: int, pattern: int) -> None:
        """Write one byte value over a range of the volume, in bytes; qemu-io flushes when it ends."""
        self.io(f"write -q -P {pattern} {offset} {length}")

    def stop(self) -> int:
        """End the daemon as a host would: it flushes and closes its image. Return its exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int:
        """End the daemon as a crash would: what it has only in memory is lost. Return its exit status."""
        return self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> int:
        process, self._process = self._process, None
        status = 0
        if process is not None:
            try:
                status = _signal_until_ended(process, number)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
        shutil.rmtree(self._folder, ignore_errors=True)
        return status

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _signal_until_ended(process: subprocess.Popen[bytes], number: signal.Signals) -> int:
    """Send a signal until the process has ended: qemu can miss one that comes just before it waits."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        process.send_signal(number)
        try:
            return process.wait(1)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                raise


def wait_for_socket(process: subprocess.Popen[bytes], path: Path) -> None:
    """Wait until `process` listens on `path`. Only a connection proves it: the file exists earlier."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, f"{process.args!r} ended with status {process.returncode}"
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            return
        time.sleep(0.01)
    raise TimeoutError(f"{path} did not appear")


def qemu_io(
    target: str | os.PathLike[str], *commands: str, image_format: str = "qcow2", read_only: bool = False
) -> str:
    """Run qemu-io commands on a target. Raises CalledProcessError if one fails or finds another pattern."""
    words = ["qemu-io", "-f", image_format, *(["-r"] if read_only else [])]
    for command in commands:
        words += ["-c", command]
    result = subprocess.run(
        [*words, os.fspath(target)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    failed = "Pattern verification failed" in result.stdout
    if result.returncode or failed:
        raise subprocess.CalledProcessError(result.returncode or 1, words, result.stdout, result.stderr)
    return result.stdout


def create_qcow2(path: Path, size: int, **options: object) -> Path:
    """Create an empty qcow2 image of `size` bytes, by default with lazy reference counts."""
    settings = {"lazy_refcounts": "on", **options}
    words = ",".join(f"{key}={value}" for key, value in settings.items())
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", words, f"{path}", f"{size}"],
        stdin=subprocess.DEVNULL,
        check=True,
        timeout=120,
    )
    return path
