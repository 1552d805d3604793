"""Volumes from images of Glance, images from volumes, and backups."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

import tests.cinder.guest as guest
from island_fast.qcow2.image import Image
from tests.cinder.cloud import Cloud
from tests.cinder.guest import GIB, noise
from tests.cinder.programs import wait_for
from tests.cinder.services import Services
from tests.support import qemu

_DATA = noise("image", 2 << 20)


@pytest.fixture
def cloud(services: Services) -> Cloud:
    return services.run()


def holds(cloud: Cloud, volume: Any, data: bytes = _DATA) -> bool:
    """Whether a volume that is not attached has this, and zeros after it."""
    attached = cloud.attach(volume)
    found = guest.read(attached.device, 0, len(data) + 65536)
    cloud.detach(attached, volume)
    return found == data + bytes(65536)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_an_image_becomes_a_volume(services: Services, cloud: Cloud, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "image.raw"
    file.write_bytes(_DATA)
    if kind == "qcow2":
        file = tmp_path / "image.qcow2"
        qemu.run("qemu-img", "convert", "-O", "qcow2", tmp_path / "image.raw", file)
    volume = cloud.from_image(services.glance.upload("made", file.read_bytes(), kind))
    assert volume.bootable == "true"
    assert holds(cloud, volume)
    assert guest.image(cloud.region, volume).stat().st_blocks * 512 < 2 * len(_DATA)  # zeros take nothing
    cloud.delete_volume(volume)


def test_a_volume_becomes_an_image_attached_or_not(services: Services, cloud: Cloud, tmp_path: Path) -> None:
    volume = cloud.create_volume()
    attached = cloud.attach(volume)
    guest.write(attached.device, 0, _DATA)
    images = [cloud.upload(volume, disk_format=kind) for kind in ("raw", "qcow2")]
    guest.write(attached.device, 0, bytes(4096))
    cloud.snapshot(volume)
    cloud.detach(attached, volume)
    images += [cloud.upload(volume, disk_format=kind) for kind in ("raw", "qcow2")]
    found = [services.glance.folder / "images" / one for one in images]
    with Image.open(guest.image(cloud.region, volume)) as opened:
        assert len(opened.snapshots) == 1  # the pin of its snapshot, which no image gets
    for number, file in enumerate(found):
        assert services.glance.show(images[number])["disk_format"] == ("raw", "qcow2")[number % 2]
        if number % 2:
            with Image.open(file) as uploaded:
                assert uploaded.snapshots == ()
            qemu.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", file, tmp_path / "raw")
            file = tmp_path / "raw"
        assert file.stat().st_size == GIB
        assert guest.read(file, 0, len(_DATA)) == (_DATA if number < 2 else bytes(4096) + _DATA[4096:])
    cloud.delete_volume(volume, cascade=True)


def test_a_volume_that_was_never_attached_becomes_an_image(services: Services, cloud: Cloud) -> None:
    volume = cloud.create_volume()
    image = cloud.upload(volume, disk_format="qcow2")
    with Image.open(services.glance.folder / "images" / image) as uploaded:
        assert uploaded.header.size == GIB
    cloud.delete_volume(volume)


def test_backups_of_a_volume_attached_and_not(services: Services, cloud: Cloud) -> None:
    services.start_backup()
    volume = cloud.create_volume()
    attached = cloud.attach(volume)
    guest.write(attached.device, 0, _DATA)
    guest.write(attached.device, GIB - 4096, b"e" * 4096)
    volumes = len(cloud.api.volumes.list())
    first = cloud.backup(volume)
    assert cloud.api.volumes.get(volume.id).status == "in-use"
    gone = "the copy that was read is gone"
    wait_for(gone, lambda: len(cloud.api.volumes.list()) == volumes, lambda: cloud.why(volume))
    guest.write(attached.device, 0, b"later")
    cloud.detach(attached, volume)
    second = cloud.backup(volume, incremental=True)
    cloud.delete_volume(volume)
    restored = cloud.restore_backup(second)
    assert holds(cloud, restored, b"later" + _DATA[5:])
    attached = cloud.attach(restored)
    assert guest.read(attached.device, GIB - 4096, 4096) == b"e" * 4096
    cloud.detach(attached, restored)
    for backup in (second, first):
        cloud.delete_backup(backup)
    cloud.delete_volume(restored)
    left = subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True).stdout
    assert volume.id not in left
