"""Volumes in use when the service, the host or a daemon ends: what lives on, and what comes back."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cinder import leftovers
from tests.cinder.cloud import exceptions
from tests.cinder.disks import Writer, make_file_system, mounted, read, run, write
from tests.cinder.faulty import Disk, FaultyHost
from tests.cinder.programs import wait_for
from tests.cinder.services import Services

MIB = 1 << 20
HOST = "restarted"


@pytest.fixture(scope="module")
def host(services: Services) -> FaultyHost:
    return FaultyHost(services, HOST)


@pytest.fixture(scope="module")
def disk(host: FaultyHost) -> Disk:
    """A volume in use, of one GiB."""
    return host.disk()


def noise(number: int, length: int = MIB) -> bytes:
    return random.Random(number).randbytes(length)


@contextmanager
def foreign_loop(folder: Path) -> Iterator[Path]:
    """A loop device with something of somebody else's."""
    file = folder / "foreign"
    file.write_bytes(b"secret" * 1000)
    device = run("losetup", "--find", "--show", file).strip()
    try:
        yield Path(device)
    finally:
        run("losetup", "--detach", device)


def test_a_restart_of_the_service_is_not_noticed_by_guests(host: FaultyHost, disk: Disk) -> None:
    pid, target = host.daemon(disk.volume), disk.device.readlink()
    assert os.getsid(pid) != os.getsid(host.service.pid)
    assert os.getpgid(pid) != os.getpgid(host.service.pid)
    assert os.stat(f"/proc/{pid}").st_uid == host.account.ids[0]
    with Writer(disk.device) as writer:
        wait_for("writes", lambda: writer.done > 10, str)
        host.service.stop()
        assert not host.service.running
        before = writer.done
        wait_for("writes while no service runs", lambda: writer.done > before + 10, str)
        host.start()
        before = writer.done
        wait_for("writes afterwards", lambda: writer.done > before + 10, str)
    writer.check(disk.device)
    assert (host.daemon(disk.volume), disk.device.readlink()) == (pid, target)
    host.detach(disk)
    host.attach(disk)
    writer.check(disk.device)


def test_a_restart_of_the_host(host: FaultyHost, disk: Disk, tmp_path: Path) -> None:
    """All processes, devices and the tmpfs go; old links, were they to stay, lead to another's disk."""
    other, idle = host.disk(), host.volume()
    write(disk.device, 0, noise(1))
    write(other.device, 0, noise(2))
    host.service.kill()
    host.kill_all([host.daemon(one.volume) for one in (disk, other)])
    for device in leftovers.loops([host.run]):
        run("losetup", "--detach", device)
    for place in leftovers.mounts([host.run], []):
        run("umount", "--lazy", place)
    shutil.rmtree(host.run)
    with foreign_loop(tmp_path) as foreign:
        for folder in (host.run, host.links):
            folder.mkdir(0o755)
            os.chown(folder, *host.account.ids)
        for volume in (disk.volume, idle):
            (host.links / volume.id).symlink_to(foreign)
        host.start()
        assert not (host.links / idle.id).is_symlink()
        assert disk.device.readlink() != foreign
        for one, content in ((disk, noise(1)), (other, noise(2))):
            assert host.cloud.api.volumes.get(one.id).status == "in-use"
            assert read(one.device, 0, MIB) == content
            write(one.device, MIB, content)
    host.detach(other)


def test_a_daemon_that_died_is_told_and_healed(host: FaultyHost, disk: Disk) -> None:
    make_file_system(disk.device)
    begun = len(host.service.text())
    data = noise(3)
    with mounted(disk.device) as folder:
        (folder / "kept").write_bytes(data)
        run("sync", "-f", folder)
        os.kill(host.daemon(disk.volume), signal.SIGKILL)
        host.await_word(f"the daemon of volume {disk.id} died", begun)
        with pytest.raises(OSError, match=r"error|Read-only"):
            write_file(folder / "lost", data)
    host.detach(disk)
    assert not disk.device.is_symlink()
    host.attach(disk)
    with mounted(disk.device) as folder:
        assert (folder / "kept").read_bytes() == data
    run("fsck.ext4", "-f", "-n", disk.device)
    assert host.service.text()[begun:].count(f"the daemon of volume {disk.id} died") == 1


def write_file(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        os.fsync(file.fileno())


def test_an_image_that_was_deleted_by_hand_is_never_made_blank(host: FaultyHost) -> None:
    disk = host.disk()
    write(disk.device, 0, noise(4))
    host.detach(disk)
    image = host.image(disk.volume)
    aside = image.with_name("aside")
    image.rename(aside)
    attachment = host.reserve(disk.volume)
    begun = len(host.service.text())
    with pytest.raises(exceptions.ClientException):
        host.connect(attachment)
    assert f"{image} is gone: put it back, or revert volume {disk.id} to its" in host.service.text()[begun:]
    assert not image.exists()
    assert not disk.device.is_symlink()
    aside.rename(image)
    there = host.connect(attachment)
    assert read(there.device, 0, MIB) == noise(4)
    host.cloud.api.attachments.complete(attachment)
