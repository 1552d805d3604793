"""Writing to a qcow2 that no process has open: by a qemu-nbd that has it, and a client of that.

qemu does all of the format's work: what internal snapshots share is written elsewhere, reference counts stay
right. The image is named as a whole node (see `qemu_img.py`), so nothing is probed and no second file opened.
The protocol is described in the NBD project's doc/proto.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from island_fast.errors import ImageInUseError, IslandError, UsageError
from island_fast.qemu.block_nodes import file_node, qcow2_node
from island_fast.qemu.nbd_handshake import Client, shake_hands
from island_fast.qemu.programs import TIMEOUT, said_by

__all__ = ["Disk", "Piece", "writing"]

Piece = tuple[int, Sequence[memoryview]]
"""Where bytes belong, and the bytes, in order; at most 32 MiB."""

_REQUEST, _ANSWER = struct.Struct(">IHHQQI"), struct.Struct(">IIQ")
_REQUEST_MAGIC, _ANSWER_MAGIC = 0x25609513, 0x67446698
_WRITE, _DISCONNECT, _FLUSH, _ZERO = 1, 2, 3, 6
_READ_ONLY, _CAN_FLUSH, _CAN_ZERO = 1 << 1, 1 << 2, 1 << 6  # transmission flags
_NEEDED = ("PATH", "TMPDIR", "LD_LIBRARY_PATH")
_IN_FLIGHT = 16  # requests, as many as qemu-nbd works on at once
_STEP = 0.005  # seconds
_LONGEST = 70  # bytes of a folder's path; a socket's has 107 at most
_KEPT = 4096  # bytes of its complaints: so many of the first, and of the last
_SAYING = 5.0  # seconds until all is read that it said before it ended
_CLOSING = 60.0  # seconds that qemu-nbd gets to close an image after a failure


class _Complaints:
    """What qemu-nbd says on standard error: the first and the last of it, however much it is."""

    def __init__(self) -> None:
        self._head = self._tail = b""
        self._reader = threading.Thread(target=self._drain, name="qemu-nbd's complaints", daemon=True)

    def __enter__(self) -> Self:
        self._fd, self.sink = os.pipe()
        return self

    def follow(self) -> None:
        """The program has the sink; read until it ends."""
        self._close_sink()
        self._reader.start()

    def __exit__(self, *error: object) -> None:
        self._close_sink()
        if self._reader.ident:
            self._reader.join(_SAYING)
        else:
            os.close(self._fd)

    def text(self) -> str:
        """What it has said; all of it once it has ended."""
        self._reader.join(_SAYING)
        return (self._head + self._tail).decode(errors="backslashreplace")

    def _drain(self) -> None:
        with open(self._fd, "rb", buffering=0) as pipe:
            while data := pipe.read(_KEPT):
                room = _KEPT - len(self._head)
                self._head += data[:room]
                self._tail = (self._tail + data[room:])[-_KEPT:]

    def _close_sink(self) -> None:
        sink, self.sink = self.sink, -1
        if sink >= 0:
            os.close(sink)


class Disk:
    """The volume of an image, `size` bytes, through the qemu that has it open. Thread-safe.

    Errors are IslandError, and say what qemu refused.
    """

    def __init__(self, image: Path, client: Client) -> None:
        self.size = client.size
        self._image = image
        self._socket = client.socket
        self._lock = threading.Lock()
        if client.flags & (_READ_ONLY | _CAN_FLUSH | _CAN_ZERO) != _CAN_FLUSH | _CAN_ZERO:
            self._socket.close()
            raise IslandError(f"qemu-nbd cannot write, zero and flush {image}; update qemu-utils")

    def write(self, pieces: Sequence[Piece]) -> None:
        """Write all pieces; in qemu's caches on return."""
        waiting = 0
        with self._lock, self._told():
            for offset, buffers in pieces:
                if waiting == _IN_FLIGHT:
                    self._answered()
                    waiting -= 1
                self._ask(_WRITE, offset, sum(buffer.nbytes for buffer in buffers))
                for buffer in buffers:
                    self._socket.sendall(buffer)
                waiting += 1
            for _ in range(waiting):
                self._answered()

    def zero(self, offset: int, length: int) -> None:
        """Make zeros that take no space where that can be; at most 2 GiB at once."""
        with self._lock, self._told():
            self._ask(_ZERO, offset, length)
            self._answered()

    def flush(self) -> None:
        """Bring all that was written to the disk."""
        with self._lock, self._told():
            self._ask(_FLUSH, 0, 0)
            self._answered()

    def close(self) -> None:
        """Say goodbye: qemu-nbd closes the image and ends."""
        with contextlib.suppress(OSError):
            self._ask(_DISCONNECT, 0, 0)
        self._socket.close()

    def _ask(self, kind: int, offset: int, length: int) -> None:
        self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, kind, 0, offset, length))

    def _answered(self) -> None:
        answer = self._socket.recv(_ANSWER.size, socket.MSG_WAITALL)
        if len(answer) < _ANSWER.size:
            raise ConnectionError("it ended")
        magic, code, _ = _ANSWER.unpack(answer)
        if magic != _ANSWER_MAGIC:
            raise ConnectionError("it talks nonsense")
        if code:
            raise OSError(code, os.strerror(code))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise IslandError(
                f"{self._image} cannot be written by qemu-nbd: {error.strerror or error}; check the disk and "
                "its free space, then run it again"
            ) from error


@contextlib.contextmanager
def writing(image: Path, size: int, cluster: int) -> Iterator[Disk]:
    """Have qemu open a qcow2 without a backing file for writing, as long as the body runs.

    `size` of its volume and `cluster` are in bytes. No other qemu can write to it meanwhile: ImageInUseError
    if one has it open. Until the first write the file stays as it was when the body began. When this
    returns normally all that was written is on disk; when the body raises the image is closed all the
    same, and whole as a qcow2. It is, too, when this process is killed.
    """
    usual = len(tempfile.gettempdir()) <= _LONGEST
    with tempfile.TemporaryDirectory(prefix="island-nbd-", dir=None if usual else "/tmp") as folder:
        where = Path(folder, "socket")
        node = {**qcow2_node(size, cluster, False), "file": file_node(image, False)}
        with _Complaints() as said, _started(image, node, where, said) as process:
            disk = Disk(image, _connected(image, process, where, said))
            try:
                yield disk
                disk.flush()
            finally:
                disk.close()
            if _code(process) != 0:
                raise _failure(image, said, closing=True)


@contextlib.contextmanager
def _started(image: Path, node: object, where: Path, said: _Complaints) -> Iterator[subprocess.Popen[bytes]]:
    """qemu-nbd, which ends when its client goes, or when this process dies; gone afterwards."""
    try:
        str(image).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the path {str(image)!r} is not UTF-8, so qemu cannot be told of it") from error
    command = ["setpriv", "--pdeathsig", "TERM", "qemu-nbd", "-k", str(where), "json:" + json.dumps(node)]
    try:
        # SIGPIPE stays ignored: it closes the image though nobody hears it any more.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said.sink,
            env=_environment(), start_new_session=True, restore_signals=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise _missing(image) from error
    try:
        said.follow()
        yield process
    except BaseException:
        process.terminate()  # it closes the image before it ends
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_CLOSING)
        process.kill()
        raise
    finally:
        process.wait()


def _environment() -> dict[str, str]:
    """What qemu-nbd needs of ours; credentials are none of its business."""
    return {name: os.environ[name] for name in _NEEDED if name in os.environ} | {"LC_ALL": "C"}


def _code(process: subprocess.Popen[bytes]) -> int | None:
    """How it ended; None if it has not."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(TIMEOUT)
    return process.returncode


def _connected(image: Path, process: subprocess.Popen[bytes], where: Path, said: _Complaints) -> Client:
    """The only client, as soon as qemu-nbd has opened the image; one that needs repair takes a while.

    It listens before it opens the image, and hangs up if that fails.
    """
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.connect(str(where))
            return shake_hands(connection, "")
        except (FileNotFoundError, ConnectionError):
            connection.close()
            time.sleep(_STEP)
        except BaseException:
            connection.close()
            raise
    raise _failure(image, said)


def _missing(image: Path) -> IslandError:
    return IslandError(
        f"qemu-nbd, which would write to {image}, or setpriv before it is missing; install qemu-utils and "
        "util-linux"
    )


def _failure(image: Path, said: _Complaints, *, closing: bool = False) -> IslandError:
    """What qemu-nbd complained of, when it opened the image, or when it closed it."""
    text = said.text()
    if 'Failed to get "' in text and '" lock' in text:
        return ImageInUseError(f"{image} is open in another process; stop that process first")
    if "failed to execute qemu-nbd" in text:
        return _missing(image)
    words = said_by(text.partition("': ")[2] or text)
    if closing:
        return IslandError(
            f"qemu-nbd could not close {image}, which may be half written: {words}; check the disk, then run "
            "the restore of that snapshot again"
        )
    return IslandError(
        f"qemu-nbd could not open {image}, and nothing was written: {words}; mend that, then run it again"
    )
