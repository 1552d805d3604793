"""A volume's life on a host: attached, written to, detached, attached again, stopped."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from island_fast.host.exports import State
from island_fast.host.qmp import Qmp
from tests.daemon import qemu_io
from tests.live.conftest import SIZE, Host


def check(image: Path) -> None:
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", image], check=True)


def daemon_of(host: Host, volume: str) -> int:
    with Qmp(host.control(volume)) as qmp:
        return qmp.peer()


def status(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on: state, parent, group, session."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def test_a_volume_goes_through_its_life(host: Host) -> None:
    volume, image = host.volume()
    exports = host.exports
    assert exports.state(volume) is State.NONE
    assert exports.monitor(volume) is None
    link = exports.attach(volume, image)
    assert link == host.links / volume
    assert exports.state(volume) is State.ATTACHED
    assert exports.volumes() == [volume]
    assert [str(link.resolve())] == [f"/dev/{name}" for name in host.loops()]
    with link.open("r+b") as device:
        assert device.seek(0, os.SEEK_END) == SIZE
        device.seek(12345)
        device.write(b"kept")
        device.flush()
        os.fsync(device.fileno())
    exports.detach(volume)
    assert exports.state(volume) is State.SERVED
    assert not link.is_symlink()
    assert host.loops() == []
    assert exports.monitor(volume) == host.run / volume / "monitor"
    with exports.attach(volume, image).open("rb") as device:
        device.seek(12345)
        assert device.read(4) == b"kept"
    exports.stop(volume)
    assert exports.state(volume) is State.NONE
    assert exports.volumes() == []
    check(image)
    qemu_io(image, "read -q -P 107 12345 1")


def test_every_call_may_be_repeated(host: Host) -> None:
    volume, image = host.volume()
    exports = host.exports
    exports.detach(volume)
    exports.stop(volume)
    exports.serve(volume, image)
    daemon = daemon_of(host, volume)
    exports.serve(volume, image)
    assert exports.state(volume) is State.SERVED
    link = exports.attach(volume, image)
    device = link.readlink()
    assert exports.attach(volume, image) == link
    assert link.readlink() == device
    assert len(host.loops()) == 1
    assert daemon_of(host, volume) == daemon
    for _ in range(2):
        exports.detach(volume)
        assert exports.state(volume) is State.SERVED
    for _ in range(2):
        exports.stop(volume)
        assert exports.state(volume) is State.NONE
