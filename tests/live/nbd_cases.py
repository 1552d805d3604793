"""What is true of NBD devices alone; `guest.py` calls each with a host of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from unittest import mock

import pytest

from island_fast.cinder.attach.block_device import BlockDevice
from island_fast.cinder.attach.daemon import Daemon
from island_fast.cinder.attach.exports import State
from island_fast.cinder.attach.nbd_devices import NbdDevices
from island_fast.errors import ImageInUseError, IslandError
from island_fast.qemu.programs import run_program
from tests.live.conftest import SIZE, Host
from tests.live.test_attach import check, daemon_of, eventually, make_file_system, mounted, run
from tests.live.test_snapshots import Writer, newest


class CutOffError(BaseException):
    """Stands for the end of the process."""


def it_is_right_and_is_chosen(host: Host) -> None:
    """The whole self-test, with the split of rights; what wants root's is allowed by the filters' names."""
    assert host.exports.call("choose_kind", host.images) == "nbd"
    assert {command[0] for command in host.exports.became_root} == {"island-nbd"}
    assert list(host.images.iterdir()) == []


def a_mounted_file_system_is_not_detached_and_outlives_growth(host: Host) -> None:
    volume, image = host.volume()
    link = host.exports.attach(volume, image)
    make_file_system(link)
    with mounted(link) as folder:
        with pytest.raises(ImageInUseError, match=r"/dev/nbd\d+ cannot .* because it is mounted"):
            host.exports.detach(volume)
        (folder / "before").write_bytes(b"before" * 4096)
        host.exports.grow(volume, 2 * SIZE)
        (folder / "after").write_bytes(b"after" * 4096)
    host.exports.detach(volume)
    with mounted(host.exports.attach(volume, image)) as folder:
        assert (folder / "before").read_bytes() == b"before" * 4096
        assert (folder / "after").read_bytes() == b"after" * 4096
    run("fsck.ext4", "-f", "-n", link)
    with BlockDevice(link) as device:
        assert device.read_direct(2 * SIZE - 4096, 4096) == bytes(4096)


def a_volume_that_is_written_to_is_frozen_and_grows(host: Host) -> None:
    volume, image = host.volume()
    link = host.exports.attach(volume, image)
    with Writer(link) as writer:
        assert eventually(lambda: writer.done > 20)
        flushed = writer.done
        host.exports.take_internal_snapshot(volume, "one")
        host.exports.grow(volume, 2 * SIZE)
        grown = writer.done
        assert eventually(lambda: writer.done > grown + 20)
    with BlockDevice(link) as device:
        assert newest(device.read_direct(0, SIZE)) >= writer.done
        assert device.read_direct(2 * SIZE - 4096, 4096) == bytes(4096)
    host.exports.stop(volume)
    frozen = host.images / "frozen"
    words = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", "snapshot.name=one", image, frozen]
    subprocess.run(words, check=True)
    assert flushed <= newest(frozen.read_bytes()) <= grown
    check(image)


def growth_that_was_cut_off_is_finished(host: Host) -> None:
    """Cut off with the export back and not connected, and with the export away; a guest has it open."""
    volume, image = host.volume()
    link = host.exports.attach(volume, image)
    before = link.readlink()
    with BlockDevice(link) as device:
        device.write_direct(0, b"x" * 4096)
        with mock.patch.object(NbdDevices, "resume", side_effect=CutOffError), pytest.raises(CutOffError):
            host.exports.grow(volume, 2 * SIZE)
        assert host.exports.attach(volume, image).readlink() == before
        assert device.read_direct(2 * SIZE - 4096, 4096) == bytes(4096)
        with (
            mock.patch.object(NbdDevices, "resume", side_effect=CutOffError),
            mock.patch.object(Daemon, "_add_export", return_value=None),
            pytest.raises(CutOffError),
        ):
            host.exports.grow(volume, 3 * SIZE)
        host.exports.grow(volume, 3 * SIZE)
        assert link.readlink() == before
        assert device.read_direct(0, 4096) == b"x" * 4096
        assert device.read_direct(3 * SIZE - 4096, 4096) == bytes(4096)
    assert not Daemon(host.run / volume, run_program).growing_mark.exists()
    host.exports.stop(volume)
    check(image)


def a_request_that_a_dead_daemon_took_with_it_fails(host: Host) -> None:
    volume, image = host.volume()
    link = host.exports.attach(volume, image)
    errors: list[OSError] = []
    with BlockDevice(link) as device:
        pid = daemon_of(host, volume)
        os.kill(pid, signal.SIGSTOP)

        def read() -> None:
            try:
                device.read_direct(0, 4096)
            except OSError as error:
                errors.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        assert eventually(lambda: under_way(link.readlink().name) == 1)
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: host.exports.state(volume) is State.DEAD)
        host.exports.stop(volume)
        reader.join()
        assert host.exports.state(volume) is State.NONE
    assert [error.errno for error in errors] == [5]


def another_program_s_device_is_left_alone(host: Host) -> None:
    """A device under another name is not ours, whatever its number; the programs of root see names only."""
    (first, image), (second, other) = host.volume(), host.volume()
    device = host.exports.attach(first, image).readlink()
    host.exports.attach(second, other)
    backing = Daemon(host.run / first, run_program).backing()
    stranger = backing.with_name("0" * 16)
    for command in ("release", "abandon", "loosen"):
        assert run_program(["island-nbd", command, str(stranger)], root=True).returncode == 0
    with pytest.raises(IslandError, match=r"has .* bytes and the volume"):
        NbdDevices(run_program).attach(stranger, SIZE + 4096)
    assert NbdDevices(run_program).stands_on(device, backing)
    assert not NbdDevices(run_program).stands_on(device, stranger)
    assert len(host.devices()) == 2


def under_way(name: str) -> int:
    with open(f"/sys/block/{name}/inflight") as file:
        return sum(map(int, file.read().split()))
