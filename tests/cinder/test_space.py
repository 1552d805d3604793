"""A host whose disk fills up: pins go before a guest notices, and a snapshot under way with them."""

from __future__ import annotations

import os
import random

import pytest

from tests.cinder.disks import read, small_disk, write
from tests.cinder.faulty import FaultyHost
from tests.cinder.services import Services

MIB = 1 << 20
HOST = "small"
RESERVE = 30  # percent
CAPACITY = 128 * MIB


@pytest.fixture(scope="module")
def host(services: Services) -> FaultyHost:
    """A host that has 128 MiB for volumes."""
    folder = services.account.folder(f"region-one/{HOST}/disk")
    small_disk(folder, CAPACITY, services.account.ids)
    options = {
        "island_volumes_dir": folder / "volumes",
        "island_free_space_reserve": RESERVE,
        "max_over_subscription_ratio": 1000,  # the scheduler is to let snapshots through on a disk so small
    }
    return FaultyHost(services, HOST, **options)


def noise(number: int, length: int) -> bytes:
    return random.Random(number).randbytes(length)


def free(host: FaultyHost) -> float:
    """Percent of the disk that is free."""
    disk = os.statvfs(str(host.backend["island_volumes_dir"]))
    return 100 * disk.f_bavail / disk.f_blocks


def test_pins_go_before_a_guest_runs_out_of_space(host: FaultyHost) -> None:
    disk = host.disk()
    first, second = noise(1, 48 * MIB), noise(2, 40 * MIB)
    write(disk.device, 0, first)
    host.cloud.snapshot(disk.volume)
    assert len(host.pins(disk.volume)) == 1
    assert free(host) > RESERVE
    begun = len(host.service.text())
    write(disk.device, 0, second)  # to new places, for the pin holds the old ones
    assert free(host) < RESERVE
    host.await_word(f"space is short: 1 pins of volume {disk.id} dropped", begun)
    assert host.pins(disk.volume) == []
    third = noise(3, 30 * MIB)
    assert CAPACITY // MIB * 0.9 < 48 + 40 + 30  # with the pin there would not have been room for it
    write(disk.device, 64 * MIB, third)
    assert read(disk.device, 0, 48 * MIB) == second + first[40 * MIB :]
    assert read(disk.device, 64 * MIB, 30 * MIB) == third
    begun = len(host.service.text())
    good = host.cloud.snapshot(disk.volume)
    [line] = [line for line in host.service.text()[begun:].splitlines() if f"of volume {disk.id}:" in line]
    assert ": full-scan (" in line
    host.cloud.delete_snapshot(good)
    host.detach(disk)
    host.cloud.delete_volume(disk.volume, cascade=True)


def test_a_snapshot_under_way_is_given_up(host: FaultyHost) -> None:
    disk = host.disk()
    first, second, third = (noise(4 + n, 24 * MIB) for n in range(3))
    write(disk.device, 0, first + second)
    host.cloud.snapshot(disk.volume)
    write(disk.device, 0, third)
    begun = len(host.service.text())
    with host.holding({"PUT": f"{disk.id}/packs/"}):
        given_up = host.cloud.snapshot(disk.volume, wait=False)
        host.await_request("PUT", f"{disk.id}/packs/")
        assert free(host) > RESERVE
        write(disk.device, 0, second + first[: 8 * MIB])
        assert free(host) < RESERVE / 2
        host.await_word(f"aborting the running snapshot of volume {disk.id}", begun)
        with pytest.raises(AssertionError, match="is error, not available"):
            host.cloud.await_snapshot(given_up, "available")
    assert f"the snapshot of volume {disk.id} was aborted" in host.service.text()[begun:]
    host.await_word(f"pins of volume {disk.id} dropped", begun)
    assert host.pins(disk.volume) == []
    write(disk.device, 64 * MIB, first + second[: 10 * MIB])
    assert read(disk.device, 0, 48 * MIB) == second + first[: 8 * MIB] + second[8 * MIB :]
    assert read(disk.device, 64 * MIB, 34 * MIB) == first + second[: 10 * MIB]
    host.cloud.delete_snapshot(given_up)
    host.detach(disk)
    host.cloud.delete_volume(disk.volume, cascade=True)
