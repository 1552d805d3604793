"""Volumes, files and snapshots that Cinder takes in, and lets go."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import tests.cinder.guest as guest
from tests.cinder.cloud import Cloud
from tests.cinder.guest import GIB, SnapshotLine, noise
from tests.cinder.programs import wait_for
from tests.cinder.services import Services
from tests.support import qemu

_DATA = noise("managed", 2 << 20)


@pytest.fixture
def cloud(services: Services) -> Cloud:
    return services.run()


@pytest.fixture
def folder(cloud: Cloud) -> Path:
    """The folder of hosta's volumes."""
    return cloud.region.folder / "hosta" / "volumes"


def holds(cloud: Cloud, volume: Any, data: bytes = _DATA) -> bool:
    attached = cloud.attach(volume)
    found = guest.read(attached.device, 0, len(data))
    cloud.detach(attached, volume)
    return found == data


def listed(cloud: Cloud) -> dict[str, Any]:
    """What may be managed on the host, and what not, by its name."""
    entries = cloud.api.volumes.list_manageable(cloud.pool("hosta"), detailed=True)
    return {entry.reference["source-name"]: entry for entry in entries}


def listed_snapshots(cloud: Cloud) -> dict[str, Any]:
    entries = cloud.api.volume_snapshots.list_manageable(cloud.pool("hosta"), detailed=True)
    return {entry.reference["source-name"]: entry for entry in entries}


def test_a_volume_and_its_snapshot_go_and_come_back(cloud: Cloud, folder: Path) -> None:
    volume = cloud.create_volume()
    attached = cloud.attach(volume)
    guest.write(attached.device, 0, _DATA)
    cloud.detach(attached, volume)
    snapshot = cloud.snapshot(volume)
    [[name, entry]] = [one for one in listed_snapshots(cloud).items() if one[0].startswith(f"{volume.id}@")]
    assert entry.cinder_id == snapshot.id
    entry = listed(cloud)[volume.id]
    assert entry.cinder_id == volume.id
    assert not entry.safe_to_manage
    cloud.unmanage_snapshot(snapshot)
    assert listed_snapshots(cloud)[name].safe_to_manage
    cloud.unmanage_volume(volume)
    entry = listed(cloud)[volume.id]
    assert entry.safe_to_manage
    assert entry.size == 1

    again = cloud.manage_volume({"source-name": volume.id})
    assert again.id != volume.id
    assert volume.id not in listed(cloud)
    assert listed_snapshots(cloud)[name].source_reference == {"source-name": again.id}
    taken = cloud.manage_snapshot(again, {"source-name": name})
    assert taken.size == 1
    attached = cloud.attach(again)
    assert guest.read(attached.device, 0, len(_DATA)) == _DATA
    guest.write(attached.device, 0, b"later")
    seen = len(cloud.region.service("volume-hosta").text())
    later = cloud.snapshot(again)
    line = SnapshotLine(cloud.region.service("volume-hosta").text()[seen:], volume)
    assert line.rule == "table-diff"  # the lineage keeps its name, and the image its pin
    cloud.detach(attached, again)
    copy = cloud.create_volume(snapshot_id=taken.id)
    assert holds(cloud, copy)
    for one in (taken, later):
        cloud.delete_snapshot(one)
    assert not any(name.startswith(f"{volume.id}@") for name in listed_snapshots(cloud))
    for one in (again, copy):
        cloud.delete_volume(one)


def test_a_volume_without_an_image_goes_and_comes_back(cloud: Cloud) -> None:
    volume = cloud.create_volume(2)
    cloud.unmanage_volume(volume)
    again = cloud.manage_volume({"source-name": volume.id})
    assert again.size == 2
    assert holds(cloud, again, bytes(4096))
    cloud.delete_volume(again)


def loose(services: Services, path: Path, size: int = GIB, **options: object) -> Path:
    """A qcow2 file of the services' user that holds _DATA."""
    qemu.create(path, size, **options)
    source = path.with_name("data")
    source.write_bytes(_DATA)
    qemu.write_file(path, 0, source)
    source.unlink()
    os.chown(path, *services.account.ids)
    return path


def test_a_loose_file_becomes_a_volume(services: Services, cloud: Cloud, folder: Path) -> None:
    loose(services, folder / "found.qcow2", size=GIB - 65536)
    assert listed(cloud)["found.qcow2"].safe_to_manage
    volume = cloud.manage_volume({"source-name": "found.qcow2"})
    assert volume.size == 1
    assert not (folder / "found.qcow2").exists()
    assert guest.image(cloud.region, volume).stat().st_mode & 0o777 == 0o600
    attached = cloud.attach(volume)
    assert guest.size(attached.device) == GIB
    cloud.detach(attached, volume)
    assert holds(cloud, volume)
    snapshot = cloud.snapshot(volume)
    cloud.delete_snapshot(snapshot)
    cloud.delete_volume(volume)


def test_what_could_lead_elsewhere_is_not_taken_in(services: Services, cloud: Cloud, folder: Path) -> None:
    secret = services.account.folder("elsewhere") / "secret"
    secret.write_bytes(b"secret" * 4096)
    os.chown(secret, *services.account.ids)
    hostile = {
        "backed.qcow2": "backing file",
        "split.qcow2": "data file",
        "old.qcow2": "version 2",
        "link.qcow2": "regular file",
        "twice.qcow2": "no other name",
        "text.qcow2": "",
    }
    make_hostile(services, folder, secret)
    entries = listed(cloud)
    for name, reason in hostile.items():
        assert not entries[name].safe_to_manage
        assert reason in entries[name].reason_not_safe
        refused(cloud, name, reason)
    for name in ("../elsewhere/secret", str(secret), ".", "", "not-there.qcow2", "a/b"):
        refused(cloud, name, "")
    for name in ("lineage@none", f"{'a' * 32}@{'b' * 32}"):
        refused(cloud, name, "")
    for path in folder.iterdir():
        if path.is_symlink() or path.is_file():
            path.unlink()


def make_hostile(services: Services, folder: Path, secret: Path) -> None:
    qemu.run(
        "qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", folder / "backed.qcow2", GIB
    )
    qemu.create(folder / "split.qcow2", GIB, data_file=folder / "split.data")
    qemu.create(folder / "old.qcow2", GIB, compat="0.10")
    loose(services, folder.parent / "target", GIB)
    (folder / "link.qcow2").symlink_to(folder.parent / "target")
    shutil.copy(folder.parent / "target", folder / "twice.qcow2")
    (folder / "twice.link").hardlink_to(folder / "twice.qcow2")
    (folder / "text.qcow2").write_text("no image at all")
    for path in folder.glob("*.*"):
        os.chown(path, *services.account.ids, follow_symlinks=False)


def refused(cloud: Cloud, name: str, reason: str) -> None:
    """Manage a volume by this name: it does not work, and the log says why; then it is deleted."""
    log = cloud.region.service("volume-hosta")
    seen = len(log.text())
    volume = cloud.manage_volume({"source-name": name}, wait=False)
    wait_for(
        f"{name} is refused",
        lambda: cloud.api.volumes.get(volume.id).status == "error",  # as the API tells of error_managing
        lambda: cloud.why(volume),
    )
    cloud.region.await_line("volume-hosta", "exception.ManageExistingInvalidReference: ", seen)
    assert reason in log.text()[seen:]
    cloud.delete_volume(volume)
