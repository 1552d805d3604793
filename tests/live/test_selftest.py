"""The self-test of the data path: it passes here, finds known corruptions, and names what a host lacks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from island_fast.cinder.attach import daemon, nbd_devices, selftest, vduse_devices
from island_fast.cinder.attach.block_device import BlockDevice
from island_fast.cinder.attach.loop_devices import LoopDevices
from island_fast.cinder.attach.selftest import VOLUME, check_data_path, choose_kind
from island_fast.errors import DamagedError, IslandError
from island_fast.qemu.programs import RunProgram, run_program
from tests.live.actor import KIND, Remote
from tests.live.conftest import Host


def check(host: Host) -> None:
    if isinstance(host.exports, Remote):
        host.exports.call("check_data_path", host.images)
    else:
        check_data_path(host.run, host.links, host.images, run_program, KIND)


def test_the_path_of_this_machine_is_right_and_nothing_is_left(host: Host) -> None:
    before = [Path(f"/dev/{KIND}{n}").stat().st_uid for n in range(2)]
    check(host)
    assert host.exports.volumes() == []
    assert list(host.images.iterdir()) == []
    assert [Path(f"/dev/{KIND}{n}").stat().st_uid for n in range(2)] == before


def test_what_a_killed_self_test_left_is_cleared_away(host: Host) -> None:
    image = host.images / f".{VOLUME}.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    shutil.chown(image, host.uid, host.uid)
    host.exports.attach(VOLUME, image)
    check(host)
    assert host.exports.volumes() == []


def run_check(host: Host, execute: RunProgram = run_program) -> None:
    check_data_path(host.run, host.links, host.images, execute, "loop")


def test_direct_io_over_fuse_is_found_out(root_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused everywhere; QEMU 7.2 and 8.2 also corrupt data with it, 10.0 and 11.1 do not."""

    def direct(command: Sequence[str], /, **how: bool) -> subprocess.CompletedProcess[str]:
        done = run_program(command, **how)
        if command[:2] == ["island-loop", "attach"]:
            subprocess.run(["losetup", "--direct-io=on", done.stdout.strip()], check=True)
        return done

    with pytest.raises(IslandError, match="has direct I/O"):
        run_check(root_host, direct)
    monkeypatch.setattr(LoopDevices, "_check_device", lambda *_: None)
    version = re.search(r"version (\d+)", subprocess.check_output(["qemu-img", "--version"], text=True))
    assert version is not None
    if int(version[1]) >= 10:
        run_check(root_host, direct)
    else:
        with pytest.raises(DamagedError, match=r"corrupts data: .* do not use it"):
            run_check(root_host, direct)


@pytest.mark.parametrize(
    "front",
    [
        {"driver": "raw", "file": "volume", "discard": "unmap"},  # the edges of a hole stay as they were
        {"driver": "raw", "file": "volume", "discard": "ignore"},  # all of it does
    ],
)
def test_holes_that_are_none_are_found_out(
    root_host: Host, monkeypatch: pytest.MonkeyPatch, front: dict[str, object]
) -> None:
    if version() >= (8, 0):
        pytest.skip("from QEMU 8.0 on a hole punched through a FUSE export is written as zeros")
    monkeypatch.setattr(daemon, "front_node", lambda: {"node-name": "front", **front})
    with pytest.raises(DamagedError, match=r"corrupts data: .* do not use it"):
        run_check(root_host)


def version() -> tuple[int, int]:
    words = subprocess.check_output(["qemu-storage-daemon", "--version"], text=True).split()
    major, minor = words[words.index("version") + 1].split(".")[:2]
    return int(major), int(minor)


def test_discards_are_refused_and_not_pretended(root_host: Host) -> None:
    """A hole that QEMU 7.2 punches keeps old data at its edges; ours are refused, and the zeros written."""
    volume, image = root_host.volume()
    with BlockDevice(root_host.exports.attach(volume, image)) as device:
        device.write_direct(0, b"x" * (1 << 20))
        if device.punch(4096, 300_032):
            assert not any(device.read_direct(4096, 300_032))
        device.zero(4096, 300_032)
        assert device.read_direct(0, 1 << 20) == b"x" * 4096 + bytes(300_032) + b"x" * ((1 << 20) - 304_128)


# --- what a host lacks ---


def test_links_that_outlive_a_reboot_are_refused(root_host: Host) -> None:
    links = root_host.images / "links"  # on the disk, as images are
    with pytest.raises(IslandError, match=r"outlives a reboot.* put it on a tmpfs"):
        check_data_path(root_host.run, links, root_host.images, run_program, "loop")


@pytest.mark.parametrize("node, word", [("/dev/fuse", "module fuse"), ("/dev/loop-control", "module loop")])
def test_a_device_node_that_is_missing_is_named(
    root_host: Host, monkeypatch: pytest.MonkeyPatch, node: str, word: str
) -> None:
    there = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: str(path) != node and there(path))
    with pytest.raises(IslandError, match=f"no {node}; load the {word}"):
        run_check(root_host)


@pytest.mark.parametrize(
    "program, package",
    [
        ("qemu-storage-daemon", "qemu-utils or qemu-system-common .on RHEL qemu-img."),
        ("fusermount3", "fuse3"),
        ("island-loop", "island-fast"),
    ],
)
def test_a_program_that_is_missing_is_named_with_its_package(
    root_host: Host, monkeypatch: pytest.MonkeyPatch, program: str, package: str
) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **how: None if name == program else which(name, **how))
    with pytest.raises(IslandError, match=f"{program} is missing; install the package {package}"):
        run_check(root_host)


def without_fuse(command: Sequence[str], /, **how: bool) -> subprocess.CompletedProcess[str]:
    """Run a program, but let the help of the daemon be that of one that was built without FUSE."""
    done = run_program(command, **how)
    if command == ["qemu-storage-daemon", "--help"]:
        done.stdout = "".join(line for line in done.stdout.splitlines(True) if "fuse" not in line)
    return done


def test_a_qemu_without_fuse_is_named_with_the_kind_that_is_left(
    root_host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As RHEL's is."""
    with pytest.raises(IslandError, match=r"without FUSE exports.* only kernel NBD is left"):
        run_check(root_host, without_fuse)
    monkeypatch.setattr(nbd_devices, "_MODULE", tmp_path / "none")
    with pytest.raises(IslandError, match=r"nbd: the module nbd is not loaded.*; loop: .* only kernel NBD"):
        choose_kind(root_host.run, root_host.links, root_host.images, without_fuse)
    assert root_host.exports.volumes() == []


def test_fuse_conf_without_user_allow_other_is_named(
    root_host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    conf = tmp_path / "fuse.conf"
    monkeypatch.setattr(selftest, "_FUSE_CONF", conf)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for text in ("", "#user_allow_other\n"):
        conf.write_text(text)
        with pytest.raises(IslandError, match="add a line user_allow_other"):
            run_check(root_host)


def test_rights_that_are_missing_are_named(root_host: Host) -> None:
    def refusing(command: Sequence[str], /, **how: bool) -> subprocess.CompletedProcess[str]:
        if how.get("root"):
            return subprocess.CompletedProcess(command, 99, "", "Unauthorized command: no filter matched")
        return run_program(command, **how)

    with pytest.raises(IslandError, match=r"make a loop device .* Unauthorized command: no filter matched"):
        run_check(root_host, refusing)
    assert root_host.exports.volumes() == []


def test_the_best_kind_is_chosen_or_all_reasons_given(
    root_host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(nbd_devices, "_MODULE", tmp_path / "none")  # test_nbd.py has a kernel that has it
    monkeypatch.setattr(vduse_devices, "_CONTROL", tmp_path / "none")  # and test_vduse.py this
    places = root_host.run, root_host.links, root_host.images
    assert choose_kind(*places, run_program) == "loop"
    root_host.run.chmod(0o755)
    reasons = r"\(vduse: there is no .*; nbd: the module .*; loop: other users have access to"
    with pytest.raises(IslandError, match=rf"no kind of block device .*{reasons}"):
        choose_kind(*places, run_program)
    root_host.run.chmod(0o700)
