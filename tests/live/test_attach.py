"""A volume's life on a host: attached, written to, detached, attached again, stopped."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from island_fast.cinder.attach.block_device import BlockDevice
from island_fast.cinder.attach.daemon import Daemon
from island_fast.cinder.attach.exports import Exports, State
from island_fast.cinder.attach.loop_devices import LoopDevices
from island_fast.errors import ImageInUseError, IslandError, NotFoundError, RefusedError, UsageError
from island_fast.qemu.programs import run_program
from island_fast.qemu.qmp import Qmp
from tests.live.actor import KIND, ROOT, Remote
from tests.live.conftest import SIZE, Host
from tests.support.daemon import qemu_io


def check(image: Path) -> None:
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", image], check=True)


def daemon_of(host: Host, volume: str) -> int:
    with Qmp(host.control(volume)) as qmp:
        return qmp.peer_pid()


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
    assert [str(link.resolve())] == [f"/dev/{name}" for name in host.devices()]
    with link.open("r+b") as device:
        assert device.seek(0, os.SEEK_END) == SIZE
        device.seek(12345)
        device.write(b"kept")
        device.flush()
        os.fsync(device.fileno())
    exports.detach(volume)
    assert exports.state(volume) is State.SERVED
    assert not link.is_symlink()
    assert host.devices() == []
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
    assert len(host.devices()) == 1
    assert daemon_of(host, volume) == daemon
    for _ in range(2):
        exports.detach(volume)
        assert exports.state(volume) is State.SERVED
    for _ in range(2):
        exports.stop(volume)
        assert exports.state(volume) is State.NONE


# --- a file system on the device ---


@contextlib.contextmanager
def mounted(link: Path) -> Iterator[Path]:
    """The device's file system, mounted where this process alone knows it."""
    with tempfile.TemporaryDirectory(prefix="island-mount-") as folder:
        run("mount", link, folder)
        try:
            yield Path(folder)
        finally:
            run("umount", folder)


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def make_file_system(link: Path) -> None:
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0", link)


def test_files_outlive_detach_and_attach(host: Host) -> None:
    volume, image = host.volume()
    exports = host.exports
    link = exports.attach(volume, image)
    make_file_system(link)
    data = random.Random(7).randbytes(10 << 20)
    with mounted(link) as folder:
        (folder / "data").write_bytes(data)
    exports.detach(volume)
    with mounted(exports.attach(volume, image)) as folder:
        assert (folder / "data").read_bytes() == data
        (folder / "data").unlink()
        (folder / "more").write_bytes(data[::-1])
    exports.stop(volume)
    check(image)
    with mounted(exports.attach(volume, image)) as folder:
        assert [entry.name for entry in folder.iterdir() if entry.is_file()] == ["more"]
        assert (folder / "more").read_bytes() == data[::-1]
    run("fsck.ext4", "-f", "-n", link)


def test_a_mounted_volume_is_not_detached(host: Host) -> None:
    volume, image = host.volume()
    link = host.exports.attach(volume, image)
    make_file_system(link)
    with mounted(link) as folder:
        for call in (host.exports.detach, host.exports.stop):
            with pytest.raises(ImageInUseError, match=rf"/dev/{KIND}\d+ cannot .* because it is mounted"):
                call(volume)
        assert host.exports.state(volume) is State.ATTACHED
        (folder / "file").write_bytes(b"still there")
    host.exports.detach(volume)
    assert host.exports.state(volume) is State.SERVED


def test_a_volume_that_a_guest_has_open_is_not_detached(host: Host) -> None:
    volume, image = host.volume()
    link = host.exports.attach(volume, image)
    before = link.readlink()
    with BlockDevice(link) as device:
        with pytest.raises(ImageInUseError, match="a guest or another program has it open"):
            host.exports.detach(volume)
        assert host.exports.state(volume) is State.ATTACHED
        assert link.readlink() == before
        device.write_direct(0, b"x" * 4096)
    # with its last user gone the device is there to stay, as before
    assert host.exports.state(volume) is State.ATTACHED
    host.exports.stop(volume)
    assert host.exports.state(volume) is State.NONE
    qemu_io(image, "read -q -P 120 0 4096")


def test_a_mounted_volume_grows(host: Host) -> None:
    volume, image = host.volume()
    link = host.exports.attach(volume, image)
    make_file_system(link)
    with mounted(link) as folder:
        before = os.statvfs(folder).f_blocks
        for _ in range(2):
            host.exports.grow(volume, 3 * SIZE)
        (folder / "small").write_bytes(b"small")
    run("fsck.ext4", "-f", "-p", link)
    run("resize2fs", link)  # not while it is mounted: containers seldom have CAP_SYS_RESOURCE
    with mounted(link) as folder:
        assert os.statvfs(folder).f_blocks > 2 * before
        (folder / "big").write_bytes(bytes(range(256)) * (SIZE >> 8))
        assert (folder / "small").read_bytes() == b"small"
    with link.open("rb") as device:
        assert device.seek(0, os.SEEK_END) == 3 * SIZE
    with pytest.raises(RefusedError, match="can only grow"):
        host.exports.grow(volume, SIZE)
    run("fsck.ext4", "-f", "-n", link)
    host.exports.detach(volume)
    host.exports.grow(volume, 4 * SIZE)
    with host.exports.attach(volume, image).open("rb") as device:
        assert device.seek(0, os.SEEK_END) == 4 * SIZE
    host.exports.stop(volume)
    check(image)
    with pytest.raises(NotFoundError, match="attach it first"):
        host.exports.grow(volume, 5 * SIZE)


def test_zeros_give_space_back(host: Host) -> None:
    volume, image = host.volume()
    with BlockDevice(host.exports.attach(volume, image)) as device:
        device.write_direct(0, random.Random(1).randbytes(32 << 20))
        device.flush()
        full = image.stat().st_blocks * 512
        assert full > 32 << 20
        device.write_direct(1 << 20, bytes(30 << 20))
        device.flush()
        # not all 30 MiB: a cluster whose zeros come in two requests, as the kernel splits them, is kept; with
        # QEMU 11, whose FUSE takes no more than 64 KiB at once, about half of them are
        assert image.stat().st_blocks * 512 < full - (10 << 20)
        assert not any(device.read_direct(1 << 20, 30 << 20))
    host.exports.stop(volume)
    check(image)


def test_flushed_writes_are_in_the_image_when_the_daemon_is_killed(host: Host) -> None:
    volume, image = host.volume()
    with BlockDevice(host.exports.attach(volume, image)) as device:
        for number in range(64):
            device.write(number * 262_144, bytes([number + 1]) * 8192)
            device.flush()
        os.kill(daemon_of(host, volume), signal.SIGKILL)
    host.exports.stop(volume)
    run("qemu-img", "check", "-q", "-r", "all", "-f", "qcow2", image)
    qemu_io(image, *[f"read -q -P {number + 1} {number * 262_144} 8192" for number in range(64)])


# --- daemons ---


def test_a_daemon_outlives_the_process_that_started_it(host: Host) -> None:
    volume, image = host.volume()
    script = (
        "import sys; from pathlib import Path; from island_fast.cinder.attach.exports import Exports;"
        "from island_fast.qemu.programs import run_program as run;"
        "from tests.live.actor import KIND; a, b, v, i = sys.argv[1:];"
        "Exports(Path(a), Path(b), run, KIND).serve(v, Path(i))"
    )
    words = [
        "setpriv",
        f"--reuid={host.uid}",
        f"--regid={host.uid}",
        "--clear-groups",
        sys.executable,
        "-P",
        "-c",
    ]
    with subprocess.Popen(
        [*words, script, host.run, host.links, volume, image],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        start_new_session=True,
    ) as starter:
        starter.wait(60)
        with pytest.raises(ProcessLookupError):
            os.killpg(starter.pid, signal.SIGKILL)  # nothing of its session is left
    daemon = daemon_of(host, volume)
    _, parent, group, session = status(daemon)[:4]
    assert (int(group), int(session)) == (int(session), int(session))
    assert int(session) != os.getsid(0)
    assert int(session) != starter.pid
    assert int(parent) not in (os.getpid(), starter.pid)
    assert Path(f"/proc/{daemon}").stat().st_uid == host.uid
    host.exports.attach(volume, image)
    assert daemon_of(host, volume) == daemon


def test_a_daemon_that_was_killed_is_noticed_and_healed(host: Host) -> None:
    volume, image = host.volume()
    exports = host.exports
    link = exports.attach(volume, image)
    with BlockDevice(link) as device:
        device.write_direct(65536, b"y" * 65536)
        device.flush()
    os.kill(daemon_of(host, volume), signal.SIGKILL)
    assert eventually(lambda: exports.state(volume) is State.DEAD)
    assert exports.monitor(volume) is None
    assert exports.attach(volume, image) == link
    assert exports.state(volume) is State.ATTACHED
    with BlockDevice(link) as device:
        assert device.read_direct(65536, 65536) == b"y" * 65536
    assert len(host.devices()) == 1


def test_a_dead_device_that_a_guest_has_open_gives_way_to_a_new_one(host: Host) -> None:
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
    assert eventually(lambda: host.devices() == [link.readlink().name])


@pytest.mark.parametrize("call", ["detach", "stop"])
def test_what_a_dead_daemon_left_is_taken_away(host: Host, call: str) -> None:
    volume, image = host.volume()
    host.exports.attach(volume, image)
    os.kill(daemon_of(host, volume), signal.SIGKILL)
    assert eventually(lambda: host.exports.state(volume) is State.DEAD)
    getattr(host.exports, call)(volume)
    assert host.exports.state(volume) is State.NONE
    assert host.devices() == []
    assert not (host.links / volume).is_symlink()


def test_a_daemon_that_hangs_up_while_it_starts_is_asked_again(
    root_host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, image = root_host.volume()
    check_serves, asked = Daemon.check_serves, []

    def hangs_up_once(daemon: Daemon, image: Path) -> None:
        asked.append(image)
        if len(asked) == 1:
            raise IslandError("ended the connection (its greeting)")
        check_serves(daemon, image)

    monkeypatch.setattr(Daemon, "check_serves", hangs_up_once)
    root_host.exports.serve(volume, image)
    assert len(asked) == 2
    assert root_host.exports.state(volume) is State.SERVED


def test_an_image_that_qemu_does_not_open_is_refused_in_its_words(host: Host) -> None:
    volume, image = host.volume()
    with image.open("r+b") as file:  # the corrupt bit: no writer may open it
        file.seek(79)
        file.write(b"\2")
    with pytest.raises(IslandError, match=r"did not start on .*: .*corrupt"):
        host.exports.attach(volume, image)
    assert host.exports.state(volume) is State.NONE


def test_headers_are_not_trusted(host: Host) -> None:
    volume, image = host.volume()
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/passwd", image)
    with pytest.raises(RefusedError, match="backing file"):
        host.exports.attach(volume, image)
    assert host.exports.state(volume) is State.NONE


def test_a_volume_is_not_served_from_two_images(host: Host) -> None:
    volume, image = host.volume()
    _, other = host.volume()
    host.exports.serve(volume, image)
    with pytest.raises(RefusedError, match="does not hold image"):
        host.exports.attach(volume, other)
    second, _ = host.volume()
    with pytest.raises(ImageInUseError, match=r"did not start on .*: .*lock"):
        host.exports.attach(second, image)


# --- devices and links ---


def test_two_volumes_never_share_a_device(host: Host) -> None:
    volumes = [host.volume(SIZE + number * 65536) for number in range(3)]
    links = [host.exports.attach(volume, image) for volume, image in volumes]
    devices = {link.readlink() for link in links}
    assert len(devices) == len(host.devices()) == 3
    for number, link in enumerate(links):
        with BlockDevice(link) as device:
            device.write_direct(0, bytes([number + 1]) * 4096)
    host.exports.detach(volumes[1][0])
    again = host.exports.attach(*volumes[1])
    assert again.readlink() not in {links[0].readlink(), links[2].readlink()}
    for number, link in enumerate(links):
        with BlockDevice(link) as device:
            assert device.read_direct(0, 4096) == bytes([number + 1]) * 4096


def test_stale_links_go_and_good_ones_stay(host: Host) -> None:
    volume, image = host.volume()
    gone, _ = host.volume()
    link = host.exports.attach(volume, image)
    good = link.readlink()
    (host.links / gone).symlink_to(good)  # as after a reboot: its number is another's now
    (host.links / "a-note").symlink_to("/etc/hostname")
    host.exports.remove_stale_links()
    assert not (host.links / gone).is_symlink()
    assert link.readlink() == good
    (host.links / "a-note").unlink()
    link.unlink()
    link.symlink_to("/dev/loop4095")
    assert host.exports.state(volume) is State.SERVED
    assert host.exports.attach(volume, image).readlink() == good
    assert host.exports.state(volume) is State.ATTACHED
    assert host.devices() == [good.name]


def test_a_device_of_the_wrong_size_is_refused(root_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    volume, image = root_host.volume()
    monkeypatch.setattr(Daemon, "size", lambda _: SIZE + 65536)
    with pytest.raises(IslandError, match=f"has {SIZE} bytes and the volume {SIZE + 65536}"):
        root_host.exports.attach(volume, image)
    assert root_host.devices() == []
    monkeypatch.setattr(LoopDevices, "_check_file", lambda *_, **__: None)  # and by the device's own size
    with pytest.raises(IslandError, match=f"has {SIZE} bytes and the volume {SIZE + 65536}; it is not used"):
        root_host.exports.attach(volume, image)
    assert root_host.devices() == []
    assert root_host.exports.state(volume) is State.SERVED


def test_losetup_on_a_dead_export_is_refused(root_host: Host) -> None:
    volume, image = root_host.volume()
    link = root_host.exports.attach(volume, image)
    root_host.exports.detach(volume)
    daemon = Daemon(root_host.run / volume, run_program)
    daemon.export()
    os.kill(daemon_of(root_host, volume), signal.SIGKILL)
    assert eventually(lambda: not daemon.is_running())
    # the export of a QEMU 11 that was killed answers with ECONNABORTED
    gone = "Transport endpoint is not connected|Software caused connection abort"
    with pytest.raises(IslandError, match=f"does not respond: ({gone})"):
        LoopDevices(run_program).attach(daemon.disk, SIZE)
    assert root_host.devices() == []
    assert not link.is_symlink()


def test_names_and_folders_are_checked(root_host: Host) -> None:
    exports = root_host.exports
    for name in ("", "..", "volume-1", "0" * 36, str(uuid.uuid4()).upper()):
        with pytest.raises(UsageError, match="is not a volume id"):
            exports.attach(name, root_host.images / "none")
    with pytest.raises(NotFoundError, match="no image"):
        exports.attach(str(uuid.uuid4()), root_host.images / "none")
    with pytest.raises(UsageError, match="letters, digits"):
        Exports(root_host.run / "a b", root_host.links, run_program, "loop")
    with pytest.raises(UsageError, match="is not a kind"):
        Exports(root_host.run, root_host.links, run_program, "floppy")
    with pytest.raises(UsageError, match="too long for a socket"):
        Exports(Path("/tmp/" + "x" * 70), root_host.links, run_program, "loop").state(str(uuid.uuid4()))


def test_sockets_and_folders_are_private(host: Host) -> None:
    volume, image = host.volume()
    host.exports.attach(volume, image)
    assert stat.S_IMODE(host.run.stat().st_mode) == 0o700
    folder = host.run / volume
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("control", "monitor"):
        assert stat.S_IMODE((folder / name).stat().st_mode) & 0o077 == 0
        assert (folder / name).stat().st_uid == host.uid


def test_changes_of_one_volume_wait_for_each_other(host: Host) -> None:
    """Other processes start the same volume at the same moment; one daemon and one device come of it."""
    volume, image = host.volume()
    others = [Remote(host.run, host.links, host.uid) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        links = list(pool.map(lambda other: other.attach(volume, image), others))
    for other in others:
        other.close()
    assert links == [host.links / volume] * 3
    assert len(host.devices()) == 1


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
