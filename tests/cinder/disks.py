"""What a guest does with an attached device: reading and writing past all caches, file systems."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

_BLOCK = 4096  # bytes; what O_DIRECT is aligned to


def write(device: Path, offset: int, data: bytes) -> None:
    """Write at a multiple of 4096 bytes, and flush; the data is on disk on return."""
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        for at in range(0, len(data), 1 << 20):
            piece = data[at : at + (1 << 20)]
            assert os.pwrite(fd, piece, offset + at) == len(piece)
        os.fsync(fd)
    finally:
        os.close(fd)


def read(device: Path, offset: int, length: int) -> bytes:
    """Read what the device holds, not what this machine remembers of it."""
    begin, stop = offset // _BLOCK * _BLOCK, -(-(offset + length) // _BLOCK) * _BLOCK
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, stop - begin) as memory:
            at = 0
            while at < stop - begin:
                with memoryview(memory) as view, view[at:] as rest:
                    count = os.preadv(fd, [rest], begin + at)
                assert count, f"{device} ends at {begin + at}"
                at += count
            return memory[offset - begin : offset - begin + length]
    finally:
        os.close(fd)


def size(device: Path) -> int:
    """How many bytes the device has."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def run(*command: object) -> str:
    """What a program prints; fails if it does."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def make_file_system(device: Path) -> None:
    """An empty ext4 that writes nothing more by itself."""
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)


@contextlib.contextmanager
def mounted(device: Path, *options: str) -> Iterator[Path]:
    """Where the device's file system is mounted."""
    with tempfile.TemporaryDirectory(prefix="island-mount-") as folder:
        run("mount", *options, device, folder)
        try:
            yield Path(folder)
        finally:
            run("umount", folder)


def small_disk(folder: Path, capacity: int, owner: tuple[int, int]) -> None:
    """Mount an ext4 of its own at `folder`; it goes with the account."""
    file = folder.with_name(f"{folder.name}.ext4")
    with open(file, "xb") as opened:
        opened.truncate(capacity)
    run("mke2fs", "-q", "-t", "ext4", "-m", "0", "-J", "size=4", "-N", "256", file)
    run("mount", "-o", "loop,discard", file, folder)
    os.chown(folder, *owner)


class Writer:
    """A guest that writes and flushes numbered blocks over and over, from `offset` on, as a context.

    `done` counts the blocks that were flushed; block n holds n. An error of the device is raised at the end.
    """

    _BLOCKS = 1024  # it begins anew after these

    def __init__(self, device: Path, offset: int = 0) -> None:
        self.done = 0
        self._offset = offset
        self._fd = os.open(device, os.O_RDWR | os.O_DSYNC | os.O_CLOEXEC)
        self._ending = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._write)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        os.close(self._fd)
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        while not self._ending.wait(0.002):
            try:
                place = self._offset + self.done % self._BLOCKS * _BLOCK
                os.pwrite(self._fd, self.done.to_bytes(8, "big") * (_BLOCK // 8), place)
            except OSError as error:
                self._error = error
                return
            self.done += 1

    def check(self, device: Path) -> None:
        """See that the device holds what was written, after the end."""
        found = read(device, self._offset, self._BLOCKS * _BLOCK)
        for number in range(max(0, self.done - self._BLOCKS), self.done):
            at = number % self._BLOCKS * _BLOCK
            assert found[at : at + _BLOCK] == number.to_bytes(8, "big") * (_BLOCK // 8), number
