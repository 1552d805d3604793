"""What is true of VDUSE disks alone; `guest.py` calls each with a host of its own."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from island_fast.cinder.attach.block_device import BlockDevice
from island_fast.cinder.attach.daemon import Daemon
from island_fast.cinder.attach.exports import Exports, State
from island_fast.cinder.attach.udev import RULE, require_rule
from island_fast.cinder.attach.vduse_control import create, destroy, device_name
from island_fast.cinder.attach.vduse_devices import VduseDevices
from island_fast.errors import ImageInUseError
from island_fast.qemu.programs import run_program
from tests.live.conftest import SIZE, Host
from tests.live.test_attach import check, daemon_of, eventually, make_file_system, mounted, run
from tests.live.test_snapshots import Writer, newest
from tests.live.test_udev import UDEVD

BUS = Path("/sys/bus/vdpa")


def it_is_right_and_is_chosen(host: Host) -> None:
    """The whole self-test, with the split of rights; what wants root's is allowed by the filters' names."""
    assert host.exports.call("choose_kind", host.images) == "vduse"
    assert {command[0] for command in host.exports.became_root} == {"island-vduse"}
    assert list(host.images.iterdir()) == []


def it_has_queues_a_serial_and_no_partitions(host: Host) -> None:
    volume, image = host.volume()
    link = host.exports.attach(volume, image)
    entry = Path("/sys/block") / link.readlink().name
    assert (entry / "serial").read_text().strip() == volume[:20]
    assert (entry / "queue/rotational").read_text().strip() == "0"
    assert len(list((entry / "mq").iterdir())) == os.cpu_count() > 1
    with BlockDevice(link) as device:  # one partition of 4 MiB at 1 MiB, as fdisk would write it
        device.write_direct(
            0, bytes(446) + b"\0\0\0\0\x83\0\0\0\0\x08\0\0\0\x20\0\0" + bytes(48) + b"\x55\xaa"
        )
        device.flush()
    host.exports.detach(volume)
    link = host.exports.attach(volume, image)
    assert not list((Path("/sys/block") / link.readlink().name).glob("vd*"))
    node = Path("/dev/vduse", device_name(Daemon(host.run / volume, run_program).backing()))
    assert (node.stat().st_uid, node.stat().st_mode & 0o777) == (host.uid, 0o600)


def a_mounted_file_system_is_not_detached_and_outlives_growth(host: Host) -> None:
    volume, image = host.volume()
    link = host.exports.attach(volume, image)
    make_file_system(link)
    with mounted(link) as folder:
        with pytest.raises(ImageInUseError, match=r"/dev/vd\w cannot .* because it is mounted"):
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


def what_stands_on_it_without_a_process_keeps_it(host: Host) -> None:
    """The kernel alone has it open: a loop device, and a mount that this process does not see."""
    volume, image = host.volume()
    link = host.exports.attach(volume, image)
    make_file_system(link)
    disk = link.readlink()
    loop = run("losetup", "--find", "--show", disk).strip() if os.path.exists("/dev/loop-control") else ""
    if loop:
        with pytest.raises(ImageInUseError, match="has it open"):
            host.exports.detach(volume)
        run("losetup", "--detach", loop)
    script = f"mount {disk} /mnt && echo mounted && read line"
    elsewhere = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert elsewhere.stdout.readline() == "mounted\n"  # type: ignore[union-attr]
    with pytest.raises(ImageInUseError, match="has it open"):
        host.exports.detach(volume)
    assert host.exports.state(volume) is State.ATTACHED
    elsewhere.communicate("\n")
    host.exports.detach(volume)


def a_volume_that_is_written_to_is_frozen_grows_and_gets_a_new_daemon(host: Host) -> None:
    volume, image = host.volume()
    link = host.exports.attach(volume, image)
    disk, first = link.readlink(), daemon_of(host, volume)
    with Writer(link) as writer:
        assert eventually(lambda: writer.done > 20)
        flushed = writer.done
        host.exports.take_internal_snapshot(volume, "one")
        host.exports.grow(volume, 2 * SIZE)
        grown = writer.done
        assert eventually(lambda: writer.done > grown + 20)
        for _ in range(2):
            before = writer.done
            host.exports.restart(volume, image)
            assert eventually(lambda before=before: writer.done > before + 20)
    assert daemon_of(host, volume) != first
    assert link.readlink() == disk
    with BlockDevice(link) as device:
        assert newest(device.read_direct(0, SIZE)) >= writer.done
        assert device.read_direct(2 * SIZE - 4096, 4096) == bytes(4096)
    os.kill(daemon_of(host, volume), signal.SIGKILL)  # the second daemon is watched as the first was
    assert eventually(lambda: host.exports.state(volume) is State.DEAD)
    with pytest.raises(OSError, match="Input/output error"), BlockDevice(link) as device:
        device.read_direct(0, 4096)
    host.exports.stop(volume)
    frozen = host.images / "frozen"
    words = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", "snapshot.name=one", image, frozen]
    subprocess.run(words, check=True)
    assert flushed <= newest(frozen.read_bytes()) <= grown
    run("qemu-img", "check", "-q", "-r", "all", "-f", "qcow2", image)


def what_was_not_flushed_when_the_daemon_died_is_not_confirmed(host: Host) -> None:
    """A flush after the death fails, though nothing was written since: what it would confirm may be lost."""
    volume, image = host.volume()
    link = host.exports.attach(volume, image)
    device = os.open(link, os.O_RDWR)
    try:
        with BlockDevice(link) as other:
            other.write_direct(0, b"f" * 4096)
            other.flush()
            other.write_direct(1 << 20, b"u" * 4096)
        os.kill(daemon_of(host, volume), signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                os.fsync(device)
        host.exports.stop(volume)  # it stays, for it is open
        assert host.exports.state(volume) is State.NONE
        assert len(host.devices()) == 1
        for begin in (0, SIZE - 4096):  # and does not become a disk that ends where it is read
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(device, 512, begin)
        host.exports.care(volume)
        assert host.exports.needs_care(volume)
        assert len(host.devices()) == 1
    finally:
        os.close(device)
    host.exports.care(volume)
    assert not host.exports.needs_care(volume)
    assert host.devices() == []
    assert host.exports.volumes() == []
    assert stand_ins() == []


def requests_that_a_dead_daemon_took_with_it_fail(host: Host) -> None:
    volume, image = host.volume()
    link = host.exports.attach(volume, image)
    with BlockDevice(link) as device:
        pid = daemon_of(host, volume)
        os.kill(pid, signal.SIGSTOP)
        errors = [in_thread(lambda n=n: device.read_direct(n << 20, 4096)) for n in range(3)]
        disk = link.readlink().name
        assert eventually(lambda: under_way(disk) == 3)
        os.kill(pid, signal.SIGKILL)
        assert [error() for error in errors] == [errno.EIO] * 3
    assert eventually(lambda: host.exports.state(volume) is State.DEAD)
    host.exports.stop(volume)
    assert host.devices() == []


def a_disk_whose_daemon_and_watcher_are_killed_gets_errors_by_care(host: Host) -> None:
    """As when the whole unit is killed: nobody is there until cinder-volume looks after it."""
    volume, image = host.volume()
    link = host.exports.attach(volume, image)
    with BlockDevice(link) as device:
        kill_with_watcher(daemon_of(host, volume))
        assert eventually(lambda: host.exports.state(volume) is State.DEAD)
        error = in_thread(lambda: device.read_direct(0, 4096))
        assert eventually(lambda: under_way(link.readlink().name) == 1)
        assert host.exports.needs_care(volume)
        host.exports.care(volume)
        assert error() == errno.EIO
        (stand_in,) = stand_ins()
        os.kill(stand_in, signal.SIGKILL)  # and once more
        assert eventually(lambda: stand_ins() == [])
        error = in_thread(lambda: device.read_direct(0, 4096))
        host.exports.care(volume)
        assert error() == errno.EIO
        assert host.exports.attach(volume, image).readlink().name != ""
        with pytest.raises(OSError, match="Input/output error"):
            device.read_direct(0, 4096)
    assert host.exports.state(volume) is State.ATTACHED
    host.exports.care(volume)
    assert host.devices() == [link.readlink().name]
    with BlockDevice(link) as device:
        device.write_direct(0, b"y" * 4096)
        device.flush()
    host.exports.stop(volume)
    assert stand_ins() == []
    check(image)


def a_dead_disk_that_a_guest_has_open_gives_way_to_a_new_one(host: Host) -> None:
    volume, image = host.volume()
    link = host.exports.attach(volume, image)
    old = link.readlink()
    with BlockDevice(link) as device:
        os.kill(daemon_of(host, volume), signal.SIGKILL)
        assert eventually(lambda: host.exports.state(volume) is State.DEAD)
        host.exports.attach(volume, image)
        assert host.exports.state(volume) is State.ATTACHED
        assert link.readlink() != old
        with pytest.raises(OSError, match="Input/output error"):
            device.read_direct(0, 4096)
        with BlockDevice(link) as new:
            new.write_direct(0, b"new" * 4096)
    host.exports.care(volume)
    assert host.devices() == [link.readlink().name]


def a_daemon_that_is_asked_to_end_leaves_errors_and_no_hang(host: Host) -> None:
    """By systemd or by hand: a disk without its daemon answers."""
    volume, image = host.volume()
    link = host.exports.attach(volume, image)
    with BlockDevice(link) as device:
        device.write_direct(0, b"z" * 4096)
        os.kill(daemon_of(host, volume), signal.SIGTERM)
        assert eventually(lambda: host.exports.state(volume) is State.DEAD)
        with pytest.raises(OSError, match="Input/output error"):
            device.read_direct(0, 4096)
    host.exports.stop(volume)
    check(image)


def what_a_crash_of_the_service_leaves_is_used_or_removed(host: Host) -> None:
    """Cut off after each step of an attach; the next attach, or a stop, goes on from there."""
    for step in ("create", "export", "attach", "size"):
        for end in ("attach", "stop"):
            volume, image = host.volume()
            cut_off(host, volume, image, step)
            if end == "attach":
                link = host.exports.attach(volume, image)
                with BlockDevice(link) as device:
                    assert device.read_direct(SIZE - 4096, 4096) == bytes(4096)
                assert host.devices() == [link.readlink().name]
            host.exports.stop(volume)
            assert host.devices() == [], (step, end)
            assert host.exports.volumes() == []


def another_driver_that_took_the_device_gives_it_back(host: Host) -> None:
    """vhost_vdpa takes devices of the same bus, and makes no disk of them."""
    volume, image = host.volume()
    first = host.exports.attach(volume, image).readlink()
    name = device_name(Daemon(host.run / volume, run_program).backing())
    (BUS / "devices" / name / "driver_override").write_text("vhost_vdpa")
    (BUS / "drivers/virtio_vdpa/unbind").write_text(name)
    (BUS / "drivers/vhost_vdpa/bind").write_text(name)
    assert not first.exists()
    link = host.exports.attach(volume, image)
    with BlockDevice(link) as device:
        assert device.read_direct(SIZE - 4096, 4096) == bytes(4096)


def another_program_s_device_is_left_alone(host: Host) -> None:
    (first, image), (second, other) = host.volume(), host.volume()
    disk = host.exports.attach(first, image).readlink()
    host.exports.attach(second, other)
    backing = Daemon(host.run / first, run_program).backing()
    create("stranger", 0)
    try:
        for command in ("release", "attach"):
            done = run_program(["island-vduse", command, str(backing.with_name("0" * 16))], root=True)
            assert (done.returncode == 0) == (command == "release")
        elsewhere = host.images / first
        assert (
            run_program(
                ["island-vduse", "release", f"{elsewhere}/vduse/{backing.name}"], root=True
            ).returncode
            == 1
        )
        assert Path("/dev/vduse/stranger").exists()
        assert len(host.devices()) == 2
        assert disk.exists()
    finally:
        assert destroy("stranger")


def the_host_s_udev_leaves_it_alone(host: Host) -> None:
    """A real udevd with our rule; the machine is the test's own."""
    assert UDEVD is not None, "udev is not installed (scripts/install_packages udev)"
    rules = Path("/etc/udev/rules.d")
    rules.mkdir(parents=True, exist_ok=True)
    shutil.copy(RULE, rules)
    volume, image = host.volume()
    with subprocess.Popen([UDEVD], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as udevd:
        try:
            assert eventually(Path("/run/udev/control").exists)
            link = host.exports.attach(volume, image)
            disk = link.resolve()
            make_file_system(link)
            entry = f"/sys/block/{disk.name}"
            run("udevadm", "trigger", "--action=change", "--settle", entry)
            require_rule(disk)
            shown = run("udevadm", "info", "--query=property", entry)
            assert "ID_FS_TYPE=island_volume" in shown
            links = [one for one in Path("/dev/disk").rglob("*") if one.resolve() == disk]
            assert [one for one in links if "by-diskseq" not in str(one)] == []
            host.exports.detach(volume)  # udev opens a disk that changes, for a moment alone
        finally:
            udevd.terminate()
            udevd.wait(60)
            shutil.rmtree("/run/udev")


# --- what the cases share ---


def in_thread(action: Callable[[], object]) -> Callable[[], int]:
    """Start an action, and return what waits for its end, and returns the number of its error, or 0."""
    numbers: list[int] = []

    def act() -> None:
        try:
            action()
        except OSError as error:
            numbers.append(error.errno or -1)
        else:
            numbers.append(0)

    thread = threading.Thread(target=act)
    thread.start()

    def wait() -> int:
        thread.join(120)
        assert numbers, "it hangs"
        return numbers[0]

    return wait


def under_way(name: str) -> int:
    with open(f"/sys/block/{name}/inflight") as file:
        return sum(map(int, file.read().split()))


def kill_with_watcher(daemon: int) -> None:
    """Kill a daemon and the shell that watches it, the shell first."""
    parent = int(Path(f"/proc/{daemon}/stat").read_text().rpartition(")")[2].split()[1])
    assert b"/start" in Path(f"/proc/{parent}/cmdline").read_bytes()
    os.kill(parent, signal.SIGKILL)
    os.kill(daemon, signal.SIGKILL)


def stand_ins() -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if (
                b"block-export" not in (words := entry.read_bytes())
                and b'"errors"' in words
                and b"qemu-st" in words
            ):
                found.append(int(entry.parts[2]))
    return found


class CutOffError(BaseException):
    """Stands for the end of the process."""


def cut_off(host: Host, volume: str, image: Path, step: str) -> None:
    """Begin to attach, and end after a step."""
    places = {
        "create": mock.patch.object(Daemon, "_add_export", side_effect=CutOffError),
        "export": mock.patch.object(VduseDevices, "attach", side_effect=CutOffError),
        "attach": mock.patch.object(Daemon, "announce_size", side_effect=CutOffError),
        "size": mock.patch.object(Exports, "_point_link", side_effect=CutOffError),
    }
    with places[step], pytest.raises(CutOffError):
        host.exports.attach(volume, image)
