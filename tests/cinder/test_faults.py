"""The service killed, and Swift down or slow, in the middle of snapshots and of attaching."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from typing import Any

import pytest

from tests.cinder.cloud import Attached, Cloud, exceptions
from tests.cinder.disks import read, size, write
from tests.cinder.faulty import Disk, FaultyHost
from tests.cinder.programs import wait_for
from tests.cinder.services import Services

MIB = 1 << 20
GIB = 1 << 30
HOST = "faulty"


@pytest.fixture(scope="module")
def host(services: Services) -> FaultyHost:
    return FaultyHost(services, HOST)


@pytest.fixture(scope="module")
def impatient(host: FaultyHost) -> Cloud:
    """The same cloud through an API that waits 6 seconds for the service."""
    return host.slow_api(6)


def based(host: FaultyHost) -> tuple[Disk, Any]:
    """A volume in use that holds noise(0), and a snapshot of that."""
    disk = host.disk()
    write(disk.device, 0, noise(0))
    return disk, host.cloud.snapshot(disk.volume)


@pytest.fixture(scope="module")
def base(host: FaultyHost) -> tuple[Disk, Any]:
    return based(host)


def noise(number: int, length: int = 3 * MIB) -> bytes:
    return random.Random(number).randbytes(length)


# --- killed ---


@dataclass
class Killed:
    """What was in the middle of something when the service and its commands were killed at once."""

    sending: Disk
    sent: Disk
    restoring: Any
    unsent: Any
    unknown: Any
    attachment: str
    pins: list[str]


@pytest.fixture(scope="module")
def killed(host: FaultyHost, impatient: Cloud, base: tuple[Disk, Any]) -> Killed:
    """Killed while one snapshot was sent, another just stored, and a volume restored; started again."""
    sending, _ = based(host)
    sent, _ = based(host)
    pins = host.pins(sending.volume)
    restoring = host.volume(snapshot_id=base[1].id)
    attachment = host.reserve(restoring)
    for disk in (sending, sent):
        write(disk.device, 4 * MIB, noise(1))
    paths = {"PUT": f"{sending.id}/packs/|{sent.id}/catalog/", "GET": f"{base[0].id}/packs/"}
    with host.holding(paths):
        unsent = host.cloud.snapshot(sending.volume, wait=False)
        unknown = host.cloud.snapshot(sent.volume, wait=False)
        host.await_request("PUT", f"{sending.id}/packs/")
        host.await_request("PUT", f"{sent.id}/catalog/")
        with pytest.raises(exceptions.ClientException):
            host.connect(attachment, impatient)
        host.await_request("GET", f"{base[0].id}/packs/")
        at_work = [("snapshot", sending.id), ("snapshot", sent.id), ("restore", base[0].id)]
        host.kill_with([pid for verb, about in at_work for pid in host.commands(verb, about)])
    assert len(host.pins(sending.volume)) == 2
    assert not host.image(restoring).exists()
    wait_for("the record is stored", lambda: unknown.id in host.stored(sent.volume).values(), str)
    write(sending.device, 8 * MIB, noise(2))  # the guest has noticed nothing
    host.start()
    return Killed(sending, sent, restoring, unsent, unknown, attachment, pins)


def test_a_snapshot_that_was_cut_off(host: FaultyHost, killed: Killed) -> None:
    disk = killed.sending
    host.cloud.await_snapshot(killed.unsent, "error")
    assert host.cloud.api.volumes.get(disk.id).status == "in-use"
    host.cloud.delete_snapshot(killed.unsent)
    assert host.pins(disk.volume) == killed.pins
    good = host.cloud.snapshot(disk.volume)
    assert len(host.pins(disk.volume)) == 1
    assert good.id in host.stored(disk.volume).values()
    assert len(host.stored(disk.volume)) == 2
    copy = host.disk(snapshot_id=good.id)
    assert read(copy.device, 4 * MIB, 7 * MIB) == noise(1) + bytes(MIB) + noise(2)


def test_a_snapshot_that_was_stored_and_cinder_does_not_know(host: FaultyHost, killed: Killed) -> None:
    disk = killed.sent
    host.cloud.await_snapshot(killed.unknown, "error")
    host.cloud.delete_snapshot(killed.unknown)
    assert len(host.stored(disk.volume)) == 1
    good = host.cloud.snapshot(disk.volume)
    assert host.stored(disk.volume).keys() > set()
    assert good.id in host.stored(disk.volume).values()


def test_attaching_that_was_cut_off(host: FaultyHost, killed: Killed) -> None:
    there = host.connect(killed.attachment)
    host.cloud.api.attachments.complete(killed.attachment)
    host.cloud.await_volume(killed.restoring, "in-use")
    assert read(there.device, 0, 8 * MIB) == noise(0) + bytes(5 * MIB)
    names = sorted(path.name for path in host.folder(killed.restoring).iterdir())
    assert names == ["image.qcow2", "volume.json"]


# --- attaching takes longer than an answer may ---


def test_a_restore_outlasts_the_answer_and_is_joined(
    host: FaultyHost, impatient: Cloud, base: tuple[Disk, Any]
) -> None:
    source, snapshot = base
    volume = host.volume(snapshot_id=snapshot.id)
    assert not host.image(volume).exists()
    begun = len(host.service.text())
    attachment = host.reserve(volume)
    joined: list[Attached] = []
    with host.holding({"GET": f"{source.id}/packs/"}):
        with pytest.raises(exceptions.ClientException):
            host.connect(attachment, impatient)
        again = threading.Thread(target=lambda: joined.append(host.connect(attachment)))
        again.start()
        with pytest.raises(exceptions.ClientException):
            host.connect(attachment, impatient)
        assert len(host.commands("restore", source.id)) == 1
        assert not host.image(volume).exists()
    again.join()
    host.cloud.api.attachments.complete(attachment)
    host.cloud.await_volume(volume, "in-use")
    assert host.service.text()[begun:].count("restored snapshot") == 1
    [there] = joined
    assert read(there.device, 0, 8 * MIB) == noise(0) + bytes(5 * MIB)
    host.cloud.detach(there, volume)
    assert not there.device.exists()


# --- Swift is down, or slow ---


def test_swift_is_down_during_a_snapshot(host: FaultyHost, base: tuple[Disk, Any]) -> None:
    disk, _ = base
    before, pins = host.stored(disk.volume), host.pins(disk.volume)
    write(disk.device, 4 * MIB, noise(6))
    begun = len(host.service.text())
    host.swift.stop_server("proxy")
    try:
        broken = host.cloud.snapshot(disk.volume, wait=False)
        with pytest.raises(AssertionError, match="is error, not available"):
            host.cloud.await_snapshot(broken, "available")
        assert host.cloud.service_state("cinder-volume", f"{HOST}@island") == "up"
        assert host.cloud.api.volumes.get(disk.id).status == "in-use"
        write(disk.device, 8 * MIB, noise(7))
        host.detach(disk)
        host.attach(disk)
        assert read(disk.device, 4 * MIB, 7 * MIB) == noise(6) + bytes(MIB) + noise(7)
    finally:
        host.swift.restart_server("proxy")
    [said] = [
        line for line in host.service.text()[begun:].splitlines() if "island_fast.cinder.errors" in line
    ]
    assert f"snapshot {broken.id}: cannot reach Swift at" in said
    assert "nothing was changed" in said
    assert host.pins(disk.volume) == pins
    good = host.cloud.snapshot(disk.volume)
    host.cloud.delete_snapshot(broken)
    assert {*host.stored(disk.volume).values()} == {*before.values(), good.id}


def test_much_is_done_during_an_upload(host: FaultyHost, base: tuple[Disk, Any]) -> None:
    disk, _ = base
    cloud = host.cloud
    me = "cinder-volume", f"{HOST}@island"
    write(disk.device, 4 * MIB, noise(8))
    begun = len(host.service.text())
    with host.holding({"PUT": f"{disk.id}/packs/"}):
        first = cloud.snapshot(disk.volume, wait=False)
        host.await_request("PUT", f"{disk.id}/packs/")
        write(disk.device, 4 * MIB, noise(9))
        second = cloud.snapshot(disk.volume, wait=False)
        for _ in range(3):
            beat = cloud.heartbeat(*me)
            wait_for(
                "the heart beats", lambda beat=beat: cloud.heartbeat(*me) > beat, host.service.complaints
            )
        assert cloud.service_state(*me) == "up"
        cloud.extend(disk.volume, 2)
        assert size(disk.device) == 2 * GIB
        pid = host.daemon(disk.volume)
        host.detach(disk)
        assert not disk.device.exists()
        host.attach(disk)
        assert host.daemon(disk.volume) == pid
        write(disk.device, 2 * GIB - MIB, noise(10, MIB))
        assert len(host.commands("snapshot", disk.id)) == 1
        for one in (first, second):
            assert cloud.api.volume_snapshots.get(one.id).status == "creating"
    for one in (first, second):
        cloud.await_snapshot(one, "available")
    assert host.service.text()[begun:].count(": table-diff (") == 2
    for one, content in ((first, noise(8)), (second, noise(9))):
        copy = host.disk(size=2, snapshot_id=one.id)
        assert read(copy.device, 4 * MIB, 3 * MIB) == content
    assert read(disk.device, 2 * GIB - MIB, MIB) == noise(10, MIB)
