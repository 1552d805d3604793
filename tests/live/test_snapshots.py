"""Snapshots of an attached volume while it is written to, through the daemon's second monitor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from island_fast.cinder.attach.block_device import BlockDevice
from island_fast.cinder.attach.exports import State
from tests.live.actor import ROOT
from tests.live.conftest import SIZE, Host
from tests.live.test_attach import check

SECTORS = SIZE // 4096


def island(host: Host, *words: object) -> dict[str, object]:
    """Run the command as the user who owns the volumes; its JSON."""
    user = ["setpriv", f"--reuid={host.uid}", f"--regid={host.uid}", "--clear-groups"]
    done = subprocess.run(
        [*user, sys.executable, "-P", "-m", "island_fast", *[str(word) for word in words], "--json"],
        cwd="/",
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "ISLAND_STATE": str(host.images / "state"),
            "ISLAND_REPOSITORY": str(host.images / "repository"),
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Writer:
    """Writes the next number over every 4 KiB of the volume, in turn, and flushes; `done` were flushed."""

    def __init__(self, link: Path) -> None:
        self._device = link
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self.done = 0

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()

    def _write(self) -> None:
        with BlockDevice(self._device) as device:
            while not self._enough.is_set():
                number = self.done + 1
                device.write_direct(number % SECTORS * 4096, number.to_bytes(8, "big") * 512)
                device.flush()
                self.done = number


def newest(volume: bytes) -> int:
    """The highest number in a volume; every number up to it must be there, or a later one in its place."""
    numbers = [int.from_bytes(volume[at : at + 8], "big") for at in range(0, SIZE, 4096)]
    top = max(numbers)
    for place, number in enumerate(numbers):
        wanted = top - (top - place) % SECTORS  # the last number written at this place
        assert number == max(wanted, 0), f"place {place} has {number}, not {wanted}; the newest is {top}"
    return top


def test_snapshots_while_a_guest_writes_hold_all_that_it_flushed_before(host: Host) -> None:
    volume, image = host.volume()
    link = host.exports.attach(volume, image)
    monitor = host.exports.monitor(volume)
    assert monitor is not None
    rules, taken = [], []
    with Writer(link) as writer:
        for _ in range(3):
            flushed = writer.done
            made = island(host, "snapshot", image, "--volume", volume, "--qmp", monitor)
            rules.append(made["rule"])
            taken.append((flushed, made["snapshot"], writer.done))
            assert host.exports.state(volume) is State.ATTACHED
    for flushed, snapshot, later in taken:
        target = host.images / f"{snapshot}.raw"
        island(host, "restore", f"{volume}@{snapshot}", target, "--format", "raw")
        assert flushed <= newest(target.read_bytes()) <= later + 1
    assert rules == ["full-scan", "table-diff", "table-diff"]
    assert taken[0][0] < taken[1][0] < taken[2][0], "nothing was written meanwhile"
    host.exports.stop(volume)
    check(image)


@pytest.mark.parametrize("how", ["served", "grown"])
def test_a_snapshot_goes_on_without_a_device_and_after_growth(host: Host, how: str) -> None:
    volume, image = host.volume()
    with BlockDevice(host.exports.attach(volume, image)) as device:
        device.write_direct(0, b"1" * 65536)
        device.flush()
    first = island(host, "snapshot", image, "--volume", volume, "--qmp", host.exports.monitor(volume))
    if how == "served":
        host.exports.detach(volume)
    else:
        host.exports.grow(volume, 2 * SIZE)
        with BlockDevice(host.links / volume) as device:
            device.write_direct(2 * SIZE - 65536, b"2" * 65536)
            device.flush()
    second = island(host, "snapshot", image, "--volume", volume, "--qmp", host.exports.monitor(volume))
    assert (first["rule"], second["rule"]) == ("full-scan", "table-diff")
    assert second["blocks_changed"] == (0 if how == "served" else 1)
    assert second["volume_size"] == (SIZE if how == "served" else 2 * SIZE)
