"""Volumes of a host, with real daemons and devices, and a directory for a repository."""

from __future__ import annotations

import shutil
import tempfile
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from island_fast.cinder.attach.exports import Exports
from island_fast.cinder.island_command import IslandCommand
from island_fast.cinder.records import VolumeRecords
from island_fast.cinder.volumes import Volumes
from island_fast.qemu.programs import run_program

MIB = 1 << 20


class Host:
    """One host: its folders, its volumes, and the repository that it shares with others."""

    def __init__(self, folder: Path, run: Path, repository: Path, **options: bool) -> None:
        self.folder = folder
        environment = {"ISLAND_STATE": str(folder / "state")}
        locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self.repositories = {
            "": IslandCommand(str(repository), environment),
            "far": IslandCommand(str(repository), environment | {"ISLAND_STATE": str(folder / "far")}, "far"),
        }
        self.exports = Exports(run / "daemons", run / "devices", run_program, "loop")
        self.volumes = Volumes(
            VolumeRecords(folder / "volumes"),
            self.exports,
            run_program,
            self.repositories,
            locks.__getitem__,
            **options,
        )

    def stop(self) -> None:
        for volume in self.exports.volumes():
            self.exports.stop(volume)


@pytest.fixture
def new_host(tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """`new_host(lazy=...)`: another host on the same repository."""
    run = Path(tempfile.mkdtemp(prefix="island-", dir="/dev/shm"))
    hosts: list[Host] = []

    def make(**options: bool) -> Host:
        number = len(hosts)
        hosts.append(Host(tmp_path / f"host{number}", run / str(number), tmp_path / "snapshots", **options))
        return hosts[-1]

    yield make
    for host in hosts:
        host.stop()
    shutil.rmtree(run)


@pytest.fixture
def host(new_host: Callable[..., Host]) -> Host:
    return new_host()


def new_id() -> str:
    return str(uuid.uuid4())


def write(device: Path, offset: int, data: bytes) -> None:
    """Write to a device as a guest would, flushed."""
    import os

    fd = os.open(device, os.O_RDWR)
    try:
        os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def read(device: Path, offset: int, length: int) -> bytes:
    """Read from a device what it holds now, not what this host remembers."""
    import os

    fd = os.open(device, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)
