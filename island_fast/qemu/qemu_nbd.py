"""Writing to a qcow2 that no process has open, as the client of a qemu-nbd that opens it.

qemu does all of the format's work: clusters that internal snapshots share are written elsewhere, and
reference counts stay right. The image is given as a descriptor in a whole node (see `qemu_img.py`), so
nothing is probed, and no other file is opened. The protocol is described in the NBD project's doc/proto.md.
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

from island_fast.errors import ImageInUseError, IslandError
from island_fast.qemu.block_nodes import file_node, qcow2_node
from island_fast.qemu.interrupts import hold_interrupts
from island_fast.qemu.nbd_handshake import Client, shake_hands
from island_fast.qemu.programs import PACKAGES, TIMEOUT, copy_for_program, descriptor_path, error_text

__all__ = ["Piece", "WritableImage", "open_for_writing"]

Piece = tuple[int, Sequence[memoryview]]
"""An offset in the volume, and the bytes to write there, in order; at most 32 MiB."""

_REQUEST, _ANSWER = struct.Struct(">IHHQQI"), struct.Struct(">IIQ")
_REQUEST_MAGIC, _ANSWER_MAGIC = 0x25609513, 0x67446698
_WRITE, _DISCONNECT, _FLUSH, _ZERO = 1, 2, 3, 6
_READ_ONLY, _CAN_FLUSH, _CAN_ZERO = 1 << 1, 1 << 2, 1 << 6  # transmission flags
_ENVIRONMENT = ("PATH", "TMPDIR", "LD_LIBRARY_PATH")  # all that qemu-nbd needs; it gets no credentials
_IN_FLIGHT = 16  # requests; qemu-nbd works on this many at once
_STEP = 0.005  # seconds between two tries to connect
_MAX_FOLDER = 70  # bytes of the path of the socket's folder; a socket's own path has 107 at most
_KEPT = 4096  # bytes of error output: as many of its beginning as of its end
_READING = 5.0  # seconds to read the rest of its error output after it has ended
_CLOSING = 60.0  # seconds that qemu-nbd gets to close an image after a failure


class _ErrorOutput:
    """The beginning and end of qemu-nbd's error output. A context manager; `sink` is the pipe to write to."""

    def __init__(self) -> None:
        self._head = self._tail = b""
        self._reader = threading.Thread(target=self._drain, name="qemu-nbd's errors", daemon=True)

    def __enter__(self) -> Self:
        self._fd, self.sink = os.pipe()
        return self

    def start_reading(self) -> None:
        """Read until the program ends, which has inherited the sink now."""
        self._close_sink()
        self._reader.start()

    def __exit__(self, *error: object) -> None:
        self._close_sink()
        if self._reader.ident:
            self._reader.join(_READING)
        else:
            os.close(self._fd)

    def read_text(self) -> str:
        """Return what was read; all of it if the program has ended."""
        self._reader.join(_READING)
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


class WritableImage:
    """The volume of an image, `size` bytes, written through the qemu-nbd that has it open. Thread-safe.

    `process` is the pid of that qemu-nbd. Errors are IslandError with qemu's reason.
    """

    def __init__(self, image: Path, client: Client, process: int) -> None:
        self.size = client.size
        self.process = process
        self._image = image
        self._socket = client.socket
        self._lock = threading.Lock()
        if client.flags & (_READ_ONLY | _CAN_FLUSH | _CAN_ZERO) != _CAN_FLUSH | _CAN_ZERO:
            self._socket.close()
            raise IslandError(f"qemu-nbd cannot write, zero and flush {image}; update {PACKAGES['qemu-nbd']}")

    def write(self, pieces: Sequence[Piece]) -> None:
        """Write all pieces; on return they are in qemu's caches, not on disk."""
        waiting = 0
        with self._lock, self._translate_errors():
            for offset, buffers in pieces:
                if waiting == _IN_FLIGHT:
                    self._receive_answer()
                    waiting -= 1
                self._send_request(_WRITE, offset, sum(buffer.nbytes for buffer in buffers))
                for buffer in buffers:
                    self._socket.sendall(buffer)
                waiting += 1
            for _ in range(waiting):
                self._receive_answer()

    def zero(self, offset: int, length: int) -> None:
        """Write zeros, at most 2 GiB at once, which take no space if possible."""
        with self._lock, self._translate_errors():
            self._send_request(_ZERO, offset, length)
            self._receive_answer()

    def flush(self) -> None:
        """Bring everything that was written from qemu's caches to the disk."""
        with self._lock, self._translate_errors():
            self._send_request(_FLUSH, 0, 0)
            self._receive_answer()

    def close(self) -> None:
        """Disconnect; qemu-nbd then closes the image and ends."""
        with contextlib.suppress(OSError):
            self._send_request(_DISCONNECT, 0, 0)
        self._socket.close()

    def _send_request(self, kind: int, offset: int, length: int) -> None:
        self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, kind, 0, offset, length))

    def _receive_answer(self) -> None:
        answer = self._socket.recv(_ANSWER.size, socket.MSG_WAITALL)
        if len(answer) < _ANSWER.size:
            raise ConnectionError("it closed the connection")
        magic, code, _ = _ANSWER.unpack(answer)
        if magic != _ANSWER_MAGIC:
            raise ConnectionError("its reply is invalid")
        if code:
            raise OSError(code, os.strerror(code))

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise IslandError(
                f"{self._image} cannot be written by qemu-nbd: {error.strerror or error}; check the disk and "
                "its free space, then run the command again"
            ) from error


@contextlib.contextmanager
def open_for_writing(fd: int, image: Path, size: int, cluster: int) -> Iterator[WritableImage]:
    """Have qemu open a qcow2 without a backing file for writing while the body runs.

    `fd` is the file, open for reading, and stays the caller's; `image` is what messages call it. `size`, of
    its volume, and `cluster` are in bytes. No other qemu can write to it meanwhile:
    ImageInUseError if one has it open. Until the first write the file does not change. After a normal return
    everything that was written is on disk. If the body raises, or if this process is killed, the image is
    closed too, and is intact as a qcow2.
    """
    usual = len(tempfile.gettempdir()) <= _MAX_FOLDER
    with tempfile.TemporaryDirectory(prefix="island-nbd-", dir=None if usual else "/tmp") as folder:
        socket_path = Path(folder, "socket")
        with (
            _ErrorOutput() as errors,
            copy_for_program(fd) as copy,
            _run_qemu_nbd(image, copy, qcow2_node(size, cluster, False), socket_path, errors) as process,
        ):
            disk = WritableImage(image, _connect_client(image, process, socket_path, errors), process.pid)
            try:
                yield disk
                disk.flush()
            finally:
                disk.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TIMEOUT)
            if process.returncode != 0:  # None if it did not end in time
                raise _qemu_nbd_error(image, errors, closing=True)


@contextlib.contextmanager
def _run_qemu_nbd(
    image: Path, fd: int, volume: dict[str, object], socket_path: Path, errors: _ErrorOutput
) -> Iterator[subprocess.Popen[bytes]]:
    """Run qemu-nbd during the body; it ends when its client disconnects, or when this process dies."""
    node = {**volume, "file": file_node(Path(descriptor_path(fd)), False)}
    start = ["setpriv", "--pdeathsig", "TERM"]
    command = [*start, "qemu-nbd", "-k", str(socket_path), "json:" + json.dumps(node)]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | {"LC_ALL": "C"}
    process: subprocess.Popen[bytes] | None = None
    try:
        with hold_interrupts():
            # SIGPIPE stays ignored: qemu-nbd must close the image even if nobody reads its output any more.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors.sink,
                env=environment, start_new_session=True, restore_signals=False, pass_fds=[fd],
            )  # fmt: skip
        errors.start_reading()
        yield process
    except BaseException as error:
        if process is not None:
            process.terminate()  # it closes the image before it ends
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_CLOSING)
            process.kill()
        elif isinstance(error, FileNotFoundError):
            raise _missing_program_error(image) from error
        raise
    finally:
        if process is not None:
            process.wait()


def _connect_client(
    image: Path, process: subprocess.Popen[bytes], socket_path: Path, errors: _ErrorOutput
) -> Client:
    """Connect as soon as qemu-nbd has opened the image, which takes a while if the image needs repair.

    qemu-nbd listens before it opens the image, and closes the connection if that fails.
    """
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.connect(str(socket_path))
            return shake_hands(connection, "")
        except (FileNotFoundError, ConnectionError):
            connection.close()
            time.sleep(_STEP)
        except BaseException:
            connection.close()
            raise
    raise _qemu_nbd_error(image, errors)


def _missing_program_error(image: Path) -> IslandError:
    return IslandError(
        f"qemu-nbd, which would write to {image}, or setpriv, which starts it, is missing; install "
        f"the packages {PACKAGES['qemu-nbd']} and {PACKAGES['setsid']}"
    )


def _qemu_nbd_error(image: Path, errors: _ErrorOutput, *, closing: bool = False) -> IslandError:
    """Return the exception for qemu-nbd's error when it opened or, with `closing`, closed the image."""
    text = errors.read_text()
    if 'Failed to get "' in text and '" lock' in text:
        return ImageInUseError(f"{image} is open in another process; stop that process first")
    if "failed to execute qemu-nbd" in text:
        return _missing_program_error(image)
    words = error_text(text.partition("': ")[2] or text)
    if closing:
        return IslandError(
            f"qemu-nbd could not close {image}, which may be half written: {words}; check the disk, then run "
            "the restore of that snapshot again"
        )
    return IslandError(
        f"qemu-nbd could not open {image}, and nothing was written: {words}; correct that, then run the "
        "command again"
    )
