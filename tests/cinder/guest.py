"""What a guest does to its disk, done here to the block device of an attached volume."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from tests.cinder.programs import wait_for
from tests.cinder.region import Region

GIB = 1 << 30
_RECORD = 64  # bytes

_SNAPSHOT = re.compile(
    r"snapshot \w+ of volume (\S+): (\S+) \((.*?)\), (\d+) of (\d+) blocks changed, (\d+) B read"
)

_WRITER = """
import os, sys, time
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
number = 0
while True:
    os.write(fd, b"%063d\\n" % number)
    os.fsync(fd)
    os.write(log, b"%d %d\\n" % (number, time.monotonic_ns()))
    number += 1
"""


def volume_folder(region: Region, volume: Any, host: str = "hosta") -> Path:
    """Where a host keeps a volume."""
    return region.folder / host / "volumes" / str(volume.id)


def image(region: Region, volume: Any, host: str = "hosta") -> Path:
    return volume_folder(region, volume, host) / "image.qcow2"


def noise(seed: object, length: int) -> bytes:
    """Bytes that do not compress; the same ones for the same seed."""
    return random.Random(str(seed)).randbytes(length)


def write(device: Path, at: int, data: bytes) -> None:
    with open(device, "r+b", buffering=0) as file:
        file.seek(at)
        file.write(data)
        os.fsync(file.fileno())


def read(device: Path, at: int, length: int) -> bytes:
    with open(device, "rb") as file:
        file.seek(at)
        return file.read(length)


def size(device: Path) -> int:
    with open(device, "rb") as file:
        return file.seek(0, os.SEEK_END)


def make_ext4(device: Path) -> None:
    """An empty file system, whose journal is so small that it does not look like a large change."""
    _run("mkfs.ext4", "-q", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)


def check_ext4(device: Path) -> None:
    """Fail if anything is wrong with a file system that is not mounted, its journal replayed."""
    _run("fsck.ext4", "-fn", device)


@contextmanager
def mounted(device: Path, place: Path) -> Iterator[Path]:
    """Have the device's file system at `place`, as a guest that starts after a crash would."""
    place.mkdir(exist_ok=True)
    _run("mount", device, place)
    try:
        yield place
    finally:
        _run("umount", place)


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"


class Writer:
    """A process that appends numbered records to a file, one after another, each flushed to disk.

    It logs, elsewhere, each record that is on disk and the time at which it was told so.
    """

    def __init__(self, file: Path, log: Path) -> None:
        self._command = [sys.executable, "-c", _WRITER, str(file), str(log)]
        self._log = log

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def on_disk(self, before: float = float("inf")) -> int:
        """How many records were on disk before a time of the monotonic clock, in nanoseconds."""
        lines = self._log.read_text().split("\n")[:-1] if self._log.exists() else []
        return sum(int(line.split()[1]) < before for line in lines)

    def go_on(self, records: int = 20) -> int:
        """Return when this many more records are on disk: the time then."""
        goal = self.on_disk() + records

        def reached() -> bool:
            assert self._process.poll() is None, "the writer ended"
            return self.on_disk() >= goal

        wait_for(f"{goal} records are on disk", reached, lambda: f"there are {self.on_disk()}")
        return time.monotonic_ns()


def records(file: Path) -> int:
    """How many whole records a file holds; fails unless they are the first ones, in their order."""
    data = file.read_bytes()
    count = len(data) // _RECORD
    assert data[: count * _RECORD] == b"".join(b"%063d\n" % number for number in range(count))
    return count


class SnapshotLine:
    """What the last line in a log says about a snapshot of a volume that was taken."""

    def __init__(self, log: str, volume: Any) -> None:
        found = [line for line in _SNAPSHOT.findall(log) if line[0] == volume.id]
        assert found, f"the log tells of no snapshot of {volume.id}"
        _, self.rule, self.reason, changed, candidates, read_bytes = found[-1]
        self.changed, self.candidates, self.bytes_read = int(changed), int(candidates), int(read_bytes)
