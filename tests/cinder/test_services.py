"""The services themselves, with a driver of raw files."""

from __future__ import annotations

import pytest

from tests.cinder.cloud import Cloud
from tests.cinder.services import Services

HOST = "plain"


@pytest.fixture
def cloud(services: Services) -> Cloud:
    """A host of region one with that driver."""
    return services.run(host=HOST, backend=services.plain("one", HOST))


def test_a_volume_lives_and_goes(cloud: Cloud) -> None:
    volume = cloud.create_volume(host=HOST)
    assert cloud.host_of(volume) == HOST
    snapshot = cloud.snapshot(volume)
    copy = cloud.create_volume(snapshot_id=snapshot.id)
    clone = cloud.create_volume(source_volid=volume.id)
    assert cloud.extend(copy, 2).size == 2
    attached = cloud.attach(volume, cloud.connector(HOST))
    assert attached.device.stat().st_size == 1 << 30
    cloud.detach(attached, volume)
    cloud.delete_snapshot(snapshot)
    for one in (clone, copy, volume):
        cloud.delete_volume(one)
    assert not attached.device.exists()


def test_images_become_volumes_and_volumes_images(services: Services, cloud: Cloud) -> None:
    data = bytes(range(256)) * 4096
    volume = cloud.from_image(services.glance.upload("pattern", data), host=HOST)
    attached = cloud.attach(volume, cloud.connector(HOST))
    with open(attached.device, "rb") as file:
        assert file.read(len(data) + 1) == data + b"\0"
    cloud.detach(attached, volume)
    image = cloud.upload(volume)
    assert services.glance.show(image)["size"] == 1 << 30
    cloud.delete_volume(volume)


def test_backups_read_devices_by_sudo(services: Services, cloud: Cloud) -> None:
    services.start_backup(host=HOST)
    volume = cloud.create_volume(host=HOST)
    attached = cloud.attach(volume, cloud.connector(HOST))
    attached.device.write_bytes(b"kept" + bytes((1 << 30) - 4))
    cloud.detach(attached, volume)
    backup = cloud.backup(volume)
    restored = cloud.restore_backup(backup, cloud.create_volume(host=HOST))
    with open(cloud.attach(restored, cloud.connector(HOST)).device, "rb") as file:
        assert file.read(5) == b"kept\0"
    cloud.delete_backup(backup)
    said = services.region().service(f"backup-{HOST}").text()
    assert "Spawned new privsep daemon via rootwrap" in said


def test_regions_and_hosts_stand_apart(services: Services, cloud: Cloud) -> None:
    services.run(host="other", backend=services.plain("one", "other"))
    far = services.run("two", HOST, services.plain("two", HOST))
    here, there, away = (
        cloud.create_volume(host=HOST),
        cloud.create_volume(host="other"),
        far.create_volume(host=HOST),
    )
    assert [cloud.host_of(one) for one in (here, there)] == [HOST, "other"]
    assert {one.id for one in far.api.volumes.list()} == {away.id}
    services.region("two").stop()
    services.region().service("volume-other").stop()
    cloud.delete_volume(here)


def test_a_failure_is_told_with_its_cause(cloud: Cloud) -> None:
    with pytest.raises(AssertionError, match=r"is error, not available\n(.|\n)*No valid (host|backend)"):
        cloud.create_volume(host=HOST, size=1 << 20)


def test_a_killed_service_comes_back(services: Services, cloud: Cloud) -> None:
    before = cloud.heartbeat("cinder-volume", f"{HOST}@island")
    program = services.region().service(f"volume-{HOST}")
    first = program.pid
    program.kill()
    services.start_volume(host=HOST)
    assert program.pid != first
    cloud.delete_volume(cloud.create_volume(host=HOST))
    assert cloud.heartbeat("cinder-volume", f"{HOST}@island") > before


def test_services_are_not_root_and_may_become_it_for_rootwrap_alone(services: Services) -> None:
    account = services.account
    assert account.call("python", "-c", "import os; print(os.getuid())").strip() == str(account.ids[0]) != "0"
    rootwrap = ("sudo", "-n", str(account.rootwrap.parents[1] / "bin" / "cinder-rootwrap"))
    as_root = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:], capture_output=True).returncode)"
    account.call(
        "python", "-c", as_root, *rootwrap, str(account.rootwrap), "dd", "if=/dev/null", "of=/dev/null"
    )
    for refused in (
        (*rootwrap, str(account.rootwrap), "id"),
        (*rootwrap, "/dev/null", "dd"),
        ("sudo", "-n", "dd"),
    ):
        with pytest.raises(AssertionError):
            account.call("python", "-c", as_root, *refused)
