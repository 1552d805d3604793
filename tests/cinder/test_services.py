"""The services themselves, with a driver that only says what it is asked to do."""

from __future__ import annotations

import pytest

from tests.cinder.cloud import Cloud
from tests.cinder.services import FAKE, Services


@pytest.fixture
def cloud(services: Services) -> Cloud:
    """Host "fake" of region one, with Cinder's own fake driver."""
    return services.run(host="fake", backend=FAKE)


def test_a_volume_lives_and_goes(cloud: Cloud) -> None:
    volume = cloud.create_volume(host="fake")
    assert cloud.api.volumes.get(volume.id).__dict__["os-vol-host-attr:host"].startswith("fake@island")
    snapshot = cloud.snapshot(volume)
    copy = cloud.create_volume(snapshot_id=snapshot.id)
    assert cloud.extend(copy, 2).size == 2
    attached = cloud.attach(volume, cloud.connector("fake"))
    cloud.detach(attached, volume)
    cloud.delete_volume(copy)
    cloud.delete_snapshot(snapshot)
    cloud.delete_volume(volume)


def test_a_failure_is_told_with_its_cause(cloud: Cloud) -> None:
    with pytest.raises(AssertionError, match=r"is error, not available\n(.|\n)*No valid (host|backend)"):
        cloud.create_volume(host="fake", size=1 << 20)


def test_a_killed_service_comes_back(services: Services, cloud: Cloud) -> None:
    before = cloud.heartbeat("cinder-volume", "fake@island")
    program = services.region().service("volume-fake")
    first = program.pid
    program.kill()
    services.start_volume(host="fake")
    assert program.pid != first
    cloud.delete_volume(cloud.create_volume(host="fake"))
    assert cloud.heartbeat("cinder-volume", "fake@island") > before


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


def test_images_come_and_go(services: Services) -> None:
    data = bytes(range(256)) * 4096
    image = services.glance.upload("pattern", data)
    assert services.glance.download(image) == data
