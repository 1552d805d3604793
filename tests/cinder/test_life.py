"""The life of volumes and snapshots on one host, through Cinder's API."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

import tests.cinder.guest as guest
from island_fast.qcow2.image import Image
from tests.cinder.cloud import Cloud
from tests.cinder.guest import GIB, SnapshotLine, Writer, check_ext4, image, make_ext4, mounted, noise
from tests.cinder.leftovers import processes
from tests.cinder.programs import wait_for
from tests.cinder.services import Services

_DATA = 4 << 20  # bytes


@pytest.fixture
def cloud(services: Services) -> Cloud:
    return services.run()


def written(cloud: Cloud, seed: object, **more: Any) -> Any:
    """A volume that holds `noise(seed)` at its beginning, detached."""
    volume = cloud.create_volume(**more)
    attached = cloud.attach(volume)
    guest.write(attached.device, 0, noise(seed, _DATA))
    cloud.detach(attached, volume)
    return volume


def beginning(cloud: Cloud, volume: Any, length: int = _DATA) -> bytes:
    """What a volume that is not attached holds there."""
    attached = cloud.attach(volume)
    data = guest.read(attached.device, 0, length)
    cloud.detach(attached, volume)
    return data


def log(cloud: Cloud, host: str = "hosta") -> str:
    return cloud.region.service(f"volume-{host}").text()


def modes(*paths: Path) -> list[int]:
    return [stat.S_IMODE(path.stat().st_mode) for path in paths]


def test_a_volume_is_a_record_until_it_is_attached(services: Services, cloud: Cloud) -> None:
    volume = cloud.create_volume()
    folder = guest.volume_folder(cloud.region, volume)
    assert os.listdir(folder) == ["volume.json"]
    cloud.extend(volume, 2)
    assert os.listdir(folder) == ["volume.json"]
    attached = cloud.attach(volume)
    assert attached.connection["driver_volume_type"] == "local"
    assert guest.size(attached.device) == 2 * GIB
    assert attached.device.name == volume.id
    assert attached.device.is_symlink()
    daemons = attached.device.parents[1] / "daemons"
    assert modes(folder.parent, folder, daemons, daemons / volume.id) == [0o700] * 4
    assert modes(image(cloud.region, volume), folder / "volume.json") == [0o600] * 2
    served = [pid for pid in processes(services.account.ids[0]) if is_daemon(pid, volume)]
    assert len(served) == 1  # and none of root's, or of anybody else's
    cloud.detach(attached, volume)
    assert not attached.device.is_symlink()
    assert not any(is_daemon(int(entry.name), volume) for entry in Path("/proc").glob("[0-9]*"))
    cloud.delete_volume(volume)
    assert not folder.exists()


def is_daemon(pid: int, volume: Any) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"qemu-storage-daemon" in words and volume.id.encode() in words


def test_a_volume_that_was_never_attached_is_deleted(cloud: Cloud) -> None:
    volume = cloud.create_volume()
    cloud.delete_volume(volume)
    assert not guest.volume_folder(cloud.region, volume).exists()


def test_a_volume_grows_attached_and_detached(cloud: Cloud, tmp_path: Path) -> None:
    volume = cloud.create_volume()
    attached = cloud.attach(volume)
    make_ext4(attached.device)
    with mounted(attached.device, tmp_path / "mount") as place:
        (place / "kept").write_bytes(noise("kept", _DATA))
        assert cloud.extend(volume, 2).size == 2
        assert guest.size(attached.device) == 2 * GIB
        assert (place / "kept").read_bytes() == noise("kept", _DATA)
    guest.write(attached.device, 2 * GIB - 4096, b"e" * 4096)
    cloud.detach(attached, volume)
    cloud.extend(volume, 3)
    attached = cloud.attach(volume)
    assert guest.size(attached.device) == 3 * GIB
    assert guest.read(attached.device, 2 * GIB - 4096, 8192) == b"e" * 4096 + bytes(4096)
    check_ext4(attached.device)
    cloud.detach(attached, volume)
    cloud.delete_volume(volume)


def test_a_snapshot_under_load_holds_all_that_was_on_disk_before(cloud: Cloud, tmp_path: Path) -> None:
    volume = cloud.create_volume()
    attached = cloud.attach(volume)
    make_ext4(attached.device)
    snapshots, asked = [], []
    with mounted(attached.device, tmp_path / "mount") as place:
        (place / "kept").write_bytes(noise("much", 4 * _DATA))
        os.sync()
        with Writer(place / "records", tmp_path / "log") as writer:
            for rule in ("full-scan", "table-diff"):
                asked.append(writer.on_disk(writer.go_on()))
                snapshots.append(cloud.snapshot(volume))
                line = SnapshotLine(log(cloud), volume)
                assert line.rule == rule
                assert writer.on_disk() > asked[-1]  # it went on meanwhile
            writer.go_on()
            written = writer.on_disk()
    assert 0 < line.candidates < 4 * _DATA // 65536
    for snapshot, at_least in zip(snapshots, asked, strict=True):
        copy = cloud.create_volume(snapshot_id=snapshot.id)
        restored = cloud.attach(copy)
        with mounted(restored.device, tmp_path / "restored") as place:
            assert at_least <= guest.records(place / "records") < written
            assert (place / "kept").read_bytes() == noise("much", 4 * _DATA)
        check_ext4(restored.device)
        cloud.detach(restored, copy)
        cloud.delete_volume(copy)
    cloud.detach(attached, volume)
    cloud.delete_volume(volume, cascade=True)


def test_a_snapshot_of_a_detached_volume_becomes_a_bigger_one(cloud: Cloud) -> None:
    volume = written(cloud, "small")
    snapshot = cloud.snapshot(volume)
    with Image.open(image(cloud.region, volume)) as opened:
        assert len(opened.snapshots) == 1  # the pin
    bigger = cloud.create_volume(2, snapshot_id=snapshot.id)
    assert not image(cloud.region, bigger).exists()
    attached = cloud.attach(bigger)
    assert guest.size(attached.device) == 2 * GIB
    assert guest.read(attached.device, 0, _DATA + 1) == noise("small", _DATA) + b"\0"
    assert not any(guest.read(attached.device, GIB - 4096, 8192))
    cloud.detach(attached, bigger)
    cloud.delete_snapshot(snapshot)
    assert beginning(cloud, volume) == noise("small", _DATA)
    for one in (volume, bigger):
        cloud.delete_volume(one)


def test_a_clone_of_an_attached_volume_is_made_on_the_host(
    services: Services, cloud: Cloud, tmp_path: Path
) -> None:
    volume = cloud.create_volume()
    attached = cloud.attach(volume)
    make_ext4(attached.device)
    services.swift().calm()
    with (
        mounted(attached.device, tmp_path / "mount") as place,
        Writer(place / "records", tmp_path / "log") as writer,
    ):
        before = writer.on_disk(writer.go_on())
        clone = cloud.create_volume(2, source_volid=volume.id)
        writer.go_on()
        after = writer.on_disk()
    assert [services.swift().count(verb, "/packs/") for verb in ("PUT", "GET")] == [0, 0]
    assert services.swift().count("PUT", "/manifests/") == 0
    copy = cloud.attach(clone)
    assert guest.size(copy.device) == 2 * GIB
    with mounted(copy.device, tmp_path / "copy") as place:
        assert before <= guest.records(place / "records") < after
    check_ext4(copy.device)
    for one, name in ((attached, volume), (copy, clone)):
        cloud.detach(one, name)
        with Image.open(image(cloud.region, name)) as opened:
            assert opened.snapshots == ()
        cloud.delete_volume(name)


def test_a_snapshot_that_volumes_are_made_from_later_is_kept(cloud: Cloud) -> None:
    volume = written(cloud, "guarded")
    snapshot = cloud.snapshot(volume)
    first = cloud.create_volume(snapshot_id=snapshot.id)
    clone = cloud.create_volume(2, source_volid=first.id)
    assert not image(cloud.region, clone).exists()
    refused_to_delete(cloud, snapshot, first, clone)
    cloud.delete_volume(first)
    refused_to_delete(cloud, snapshot, clone)
    assert beginning(cloud, clone) == noise("guarded", _DATA)  # and the guard is gone
    cloud.delete_snapshot(snapshot)
    for one in (clone, volume):
        cloud.delete_volume(one)


def refused_to_delete(cloud: Cloud, snapshot: Any, *needing: Any) -> None:
    """Ask for it; the snapshot stays, the user is told, and the log names the volumes that need it."""
    seen = len(log(cloud))
    cloud.delete_snapshot(snapshot, wait=False)
    cloud.region.await_line("volume-hosta", "due to snapshot busy", seen)
    cloud.await_snapshot(snapshot, "available")
    told = [line for line in log(cloud)[seen:].splitlines() if "is needed by" in line]
    assert snapshot.id in told[-1]
    named = told[-1].partition("is needed by ")[2].partition(", whose")[0]
    assert sorted(named.split(", ")) == sorted(one.id for one in needing)
    assert cloud.messages(snapshot)


def test_a_volume_yet_to_be_made_can_be_snapshotted(cloud: Cloud) -> None:
    volume = written(cloud, "source")
    snapshot = cloud.snapshot(volume)
    child = cloud.create_volume(snapshot_id=snapshot.id)
    again = cloud.snapshot(child)
    cloud.delete_snapshot(snapshot)
    assert beginning(cloud, cloud.create_volume(snapshot_id=again.id)) == noise("source", _DATA)
    assert beginning(cloud, child) == noise("source", _DATA)
    cloud.delete_volume(volume)


def test_revert_goes_back_and_snapshots_go_on(cloud: Cloud) -> None:
    volume = written(cloud, "old")
    snapshot = cloud.snapshot(volume)
    attached = cloud.attach(volume)
    guest.write(attached.device, 0, noise("new", _DATA))
    cloud.detach(attached, volume)
    cloud.revert(volume, snapshot)
    attached = cloud.attach(volume)
    assert guest.read(attached.device, 0, _DATA) == noise("old", _DATA)
    guest.write(attached.device, 0, b"branch")
    later = cloud.snapshot(volume)
    line = SnapshotLine(log(cloud), volume)
    assert line.rule == "table-diff"
    assert line.candidates < _DATA // 65536
    cloud.detach(attached, volume)
    copy = cloud.create_volume(snapshot_id=later.id)
    assert beginning(cloud, copy) == b"branch" + noise("old", _DATA)[6:]
    cloud.delete_volume(volume, cascade=True)
    cloud.delete_volume(copy)


def test_the_scheduler_is_told_what_volumes_could_come_to_take(cloud: Cloud) -> None:
    before = fresh_stats(cloud)
    volume = cloud.create_volume(3)
    settled(cloud, before, volumes=1, provisioned=3.0)
    attached = cloud.attach(volume)
    guest.write(attached.device, 0, noise("pinned", _DATA))
    cloud.snapshot(volume)
    cloud.detach(attached, volume)
    pinned = image(cloud.region, volume).stat().st_blocks * 512 / GIB
    assert pinned >= _DATA / GIB
    settled(cloud, before, volumes=1, provisioned=3.0 + pinned)
    cloud.delete_volume(volume, cascade=True)
    settled(cloud, before, volumes=0, provisioned=0.0)
    assert before["thin_provisioning_support"]
    assert before["online_extend_support"]
    assert not before["multiattach"]
    assert not before["thick_provisioning_support"]
    assert 0 < before["free_capacity_gb"] < before["total_capacity_gb"]


def stats(cloud: Cloud) -> dict[str, Any]:
    [pool] = [one for one in cloud.api.pools.list(detailed=True) if one.name.startswith("hosta@")]
    return dict(pool.to_dict().get("capabilities") or pool.to_dict())


def fresh_stats(cloud: Cloud) -> dict[str, Any]:
    """Those that were made after this call: the second report from now on."""
    for _ in range(2):
        last = stats(cloud)["timestamp"]
        wait_for(
            "a report comes", lambda last=last: stats(cloud)["timestamp"] != last, cloud.region.complaints
        )
    return stats(cloud)


def settled(cloud: Cloud, before: dict[str, Any], volumes: int, provisioned: float) -> None:
    """Return when the scheduler knows of that much more than before."""
    goal = before["total_volumes"] + volumes, before["provisioned_capacity_gb"] + provisioned

    def reached() -> bool:
        now = stats(cloud)
        return now["total_volumes"] == goal[0] and abs(now["provisioned_capacity_gb"] - goal[1]) < 1e-3

    wait_for(f"stats are {goal}", reached, lambda: f"they are {stats(cloud)}, and were {before}")


def test_what_is_not_supported_is_refused(cloud: Cloud) -> None:
    many = cloud.api.volume_types.create("many")
    many.set_keys({"volume_backend_name": "island", "multiattach": "<is> True"})
    with pytest.raises(AssertionError, match=r"No valid (host|backend)"):
        cloud.create_volume(volume_type="many")
    locked = cloud.api.volume_types.create("locked")
    locked.set_keys({"volume_backend_name": "island"})
    specs = {"provider": "luks", "cipher": "aes-xts-plain64", "key_size": 256}
    cloud.api.volume_encryption_types.create(locked, {**specs, "control_location": "front-end"})
    seen = len(log(cloud))
    with pytest.raises(AssertionError, match="is error, not available"):
        cloud.create_volume(volume_type="locked")
    assert "encrypted volume types are not supported" in log(cloud)[seen:]


def test_a_retype_on_the_host_keeps_the_volume(cloud: Cloud) -> None:
    other = cloud.api.volume_types.create("other")
    other.set_keys({"volume_backend_name": "island"})
    volume = written(cloud, "retyped")
    cloud.api.volumes.retype(volume, "other", "never")
    wait_for(
        "the type is the other",
        lambda: cloud.api.volumes.get(volume.id).volume_type == "other",
        lambda: cloud.why(volume),
    )
    cloud.await_volume(volume, "available")
    assert beginning(cloud, volume) == noise("retyped", _DATA)
    cloud.delete_volume(volume)
