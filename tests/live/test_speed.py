"""The self-test's measurement of a real device's speed: it ends well, and finds a device that is slow.

Images are in memory, so that no disk's moods decide what is slow.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from island_fast.cinder.attach import daemon, selftest, speed
from island_fast.cinder.attach.daemon import Daemon
from island_fast.cinder.attach.selftest import choose_kind, measure_speed
from island_fast.cinder.attach.speed import SHAPES, Speed
from island_fast.qemu.block_nodes import VOLUME_NODE, front_node
from island_fast.qemu.programs import run_program
from tests.live.actor import KIND, Remote
from tests.live.conftest import Host

SLOW = "throttle-group,id=slow,x-iops-total=50"


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder for images, of the host's user."""
    name = "host" if "host" in request.fixturenames else "root_host"
    with tempfile.TemporaryDirectory(prefix="island-images-", dir="/dev/shm") as folder:
        os.chown(folder, request.getfixturevalue(name).uid, 0)
        yield Path(folder)


def figures(host: Host, images: Path) -> list[tuple[str, float, float]]:
    if isinstance(host.exports, Remote):
        return [tuple(one) for one in host.exports.call("measure_speed", images)]
    found: list[Speed] = measure_speed(host.run, host.links, images, run_program, KIND)
    return [(one.shape.name, one.device, one.image) for one in found]


def test_a_device_is_measured_and_nothing_is_left(host: Host, memory: Path) -> None:
    before = [Path(f"/dev/{KIND}{n}").stat().st_uid for n in range(2)]
    found = figures(host, memory)
    assert [name for name, _, _ in found] == [shape.name for shape in SHAPES]
    assert all(device > 0 and image > 0 for _, device, image in found)
    assert host.exports.volumes() == []
    assert list(memory.iterdir()) == []
    assert [Path(f"/dev/{KIND}{n}").stat().st_uid for n in range(2)] == before
    if isinstance(host.exports, Remote):
        assert {command[0] for command in host.exports.became_root} <= {"island-loop", "island-nbd"}


def test_a_device_that_is_slow_is_warned_of(
    root_host: Host, memory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Fifty requests a second by qemu's own throttle, below the node that is exported."""
    throttle = {"driver": "throttle", "throttle-group": "slow", "file": VOLUME_NODE}
    monkeypatch.setattr(daemon, "front_node", lambda: {**front_node(), "image": throttle})
    program = Daemon._program_script

    def program_throttled(self: Daemon, *how: object) -> str:
        return program(self, *how).replace("--blockdev", f"--object {SLOW} --blockdev", 1)  # type: ignore[arg-type]

    monkeypatch.setattr(Daemon, "_program_script", program_throttled)
    monkeypatch.setattr(selftest, "check_data_path", lambda *_: None)  # hundreds of requests
    monkeypatch.setattr(
        speed, "_RUN", 0.5
    )  # more than the few requests that the throttle lets through at once
    places = root_host.run, root_host.links, memory
    monkeypatch.setattr(selftest, "KINDS", ("loop",))
    with caplog.at_level(logging.WARNING, selftest.__name__):
        assert choose_kind(*places, run_program) == "loop"
    (said,) = [record.getMessage() for record in caplog.records]
    assert all(shape.name in said for shape in SHAPES)
    assert "kind loop reach less than 0.5" in said
    assert list(memory.iterdir()) == []
