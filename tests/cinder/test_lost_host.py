"""A host that is lost with its disks: another one takes its volumes over, and the lineages they have."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cinder.cloud import Cloud, exceptions
from tests.cinder.content import MIB, attached, connector, got, put, read, snapshots, write
from tests.cinder.services import Services
from tests.support.swift_faults import Fault

LOST, HEIR = "lost", "heir"
DATA = bytes(range(256)) * 4096  # 1 MiB


class Lost:
    """What was on the lost host, and is on the other one now.

    `volume` has one snapshot, and was written to since. `copy` was to be made from that snapshot, `blank` was
    never attached. `other` has a snapshot as well.
    """

    def __init__(self, services: Services) -> None:
        services.run(host=HEIR)
        cloud = self.cloud = services.run(host=LOST)
        self.volume = cloud.create_volume(host=LOST)
        write(cloud, self.volume, LOST, DATA)
        self.snapshot = cloud.snapshot(self.volume)
        write(cloud, self.volume, LOST, b"lost" * 1024)
        self.copy = cloud.create_volume(snapshot_id=self.snapshot.id)
        self.blank = cloud.create_volume(host=LOST)
        self.other = cloud.create_volume(host=LOST)
        self.others = cloud.snapshot(self.other)
        region = services.region()
        region.service(f"volume-{LOST}").kill()
        folder = services.account.folder(f"region-one/{LOST}/volumes")
        shutil.rmtree(folder)
        region.manage(
            *("volume", "update_host", "--currenthost", f"{LOST}@island", "--newhost", f"{HEIR}@island")
        )


@pytest.fixture(scope="module")
def lost(services: Services) -> Iterator[Lost]:
    yield Lost(services)
    for host in (LOST, HEIR):
        services.region().service(f"volume-{host}").stop()


def said(services: Services, host: str) -> str:
    return services.region().service(f"volume-{host}").text()


def refused(cloud: Cloud, volume: Any) -> str:
    """What is told when the volume cannot be attached."""
    reserved = cloud.api.attachments.create(volume.id, None)
    with pytest.raises(exceptions.ClientException) as told:
        cloud.api.attachments.update(reserved["id"], connector(HEIR))
    cloud.api.attachments.delete(reserved["id"])
    cloud.await_volume(volume, "available")
    return str(told.value)


def test_a_lost_volume_is_not_attached_and_what_to_do_is_said(lost: Lost) -> None:
    told = refused(lost.cloud, lost.volume)
    assert "has no image on this host" in told, told
    assert "revert it to its newest snapshot, or create a volume from one" in told, told


def test_volumes_that_were_never_attached_are_not_lost(services: Services, lost: Lost) -> None:
    lost.cloud.delete_snapshot(lost.snapshot, wait=False)  # the copy needs it, which only Cinder knows
    services.region().await_line(f"volume-{HEIR}", f"is needed by {lost.copy.id}, whose image is made")
    lost.cloud.await_snapshot(lost.snapshot, "available")
    assert read(lost.cloud, lost.copy, HEIR, len(DATA)) == DATA
    assert read(lost.cloud, lost.blank, HEIR, 4096) == bytes(4096)
    lost.cloud.delete_volume(lost.copy)
    lost.cloud.delete_volume(lost.blank)


def test_a_volume_is_made_from_a_snapshot_of_a_lost_one(lost: Lost) -> None:
    made = lost.cloud.create_volume(snapshot_id=lost.snapshot.id)
    assert read(lost.cloud, made, HEIR, len(DATA)) == DATA
    lost.cloud.delete_volume(made)


def test_a_revert_that_fails_leaves_no_blank_volume(services: Services, lost: Lost) -> None:
    swift = services.swift()
    swift.inject(Fault("answer", 404, method="GET", path="/packs/", times=10_000))
    lost.cloud.api.volumes.revert_to_snapshot(lost.volume, lost.snapshot)
    with pytest.raises(AssertionError, match="is error"):
        lost.cloud.await_volume(lost.volume, "available")
    swift.calm()
    lost.cloud.api.volumes.reset_state(lost.volume, "available")
    assert "revert" in refused(lost.cloud, lost.volume)


def test_the_heir_adopts_and_goes_on(services: Services, lost: Lost) -> None:
    cloud, volume = lost.cloud, lost.volume
    cloud.revert(volume, lost.snapshot)
    with attached(cloud, volume, HEIR) as here:
        assert got(here.device, len(DATA)) == DATA
        put(here.device, b"after", 8 * MIB)
        after = cloud.snapshot(volume)
    found = snapshots(services, volume.id)
    assert [row["label"] for row in found] == [lost.snapshot.id, after.id]
    assert found[1]["parent"] == found[0]["snapshot"]
    line = rf"of volume {volume.id}: (\S+) .*, (\d+) of \d+ blocks changed"
    assert re.findall(line, said(services, HEIR)) == [("table-diff", "1")]
    copy = cloud.create_volume(snapshot_id=after.id)
    assert read(cloud, copy, HEIR, len(DATA) + 8 * MIB)[8 * MIB :][:5] == b"after"
    cloud.delete_volume(copy)


def test_a_lost_volume_is_deleted_with_its_snapshots(services: Services, lost: Lost) -> None:
    lost.cloud.delete_volume(lost.other, cascade=True)
    assert snapshots(services, lost.other.id) == []


def test_the_lost_host_cannot_write_when_it_comes_back(services: Services, lost: Lost) -> None:
    """It was not gone after all: its state is there, and someone gives it the volume again."""
    cloud, volume = lost.cloud, lost.volume
    before = snapshots(services, volume.id)
    services.run(host=LOST)
    region = services.region()
    region.service(f"volume-{HEIR}").stop()
    region.manage(
        *("volume", "update_host", "--currenthost", f"{HEIR}@island", "--newhost", f"{LOST}@island#island")
    )
    shutil.copytree(
        services.account.folder(f"region-one/{HEIR}/volumes/{volume.id}"),
        services.account.folder(f"region-one/{LOST}/volumes/{volume.id}"),
        dirs_exist_ok=True,
        copy_function=_copy_as_owner,
    )
    late = cloud.snapshot(volume, wait=False)
    with pytest.raises(AssertionError, match=f"volume {volume.id} belongs to host"):
        cloud.await_snapshot(late, "available")
    with pytest.raises(AssertionError, match=f"volume {volume.id} belongs to host"):
        cloud.delete_snapshot(lost.snapshot)
    assert snapshots(services, volume.id) == before


def _copy_as_owner(source: str, target: str) -> None:
    shutil.copy2(source, target)
    found = os.stat(source)
    os.chown(target, found.st_uid, found.st_gid)
