"""The self-test of the data path: it passes here, finds known corruptions, and names what a host lacks."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from island_fast.errors import DamagedError, IslandError
from island_fast.host.device import LoopDevices
from island_fast.host.execute import run_to_the_end
from island_fast.host.selftest import VOLUME, check_data_path
from tests.live.actor import Remote
from tests.live.conftest import Host


def check(host: Host) -> None:
    if isinstance(host.exports, Remote):
        host.exports.call("check_data_path", host.images)
    else:
        check_data_path(host.run, host.links, host.images, run_to_the_end, "loop")


def test_the_path_of_this_machine_is_right_and_nothing_is_left(host: Host) -> None:
    before = [Path(f"/dev/loop{n}").stat().st_uid for n in range(2)]
    check(host)
    assert host.exports.volumes() == []
    assert list(host.images.iterdir()) == []
    assert [Path(f"/dev/loop{n}").stat().st_uid for n in range(2)] == before


def test_what_a_killed_self_test_left_is_cleared_away(host: Host) -> None:
    image = host.images / f".{VOLUME}.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    shutil.chown(image, host.uid, host.uid)
    host.exports.attach(VOLUME, image)
    check(host)
    assert host.exports.volumes() == []


def only_root(host: Host) -> None:
    """Faults are planted in this process, so only root's exports have them."""
    if host.uid:
        pytest.skip("what is planted in this process is not in the other user's")


def test_direct_io_over_fuse_is_found_out(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    only_root(host)

    def direct(command: Sequence[str], /, **how: bool) -> subprocess.CompletedProcess[str]:
        words = ["--direct-io=on" if word == "--direct-io=off" else word for word in command]
        return run_to_the_end(words, **how)

    with pytest.raises(IslandError, match="came with direct I/O"):
        check_data_path(host.run, host.links, host.images, direct, "loop")
    monkeypatch.setattr(LoopDevices, "_check", lambda *_: None)
    with pytest.raises(DamagedError, match="corrupts: .* do not use it"):
        check_data_path(host.run, host.links, host.images, direct, "loop")
