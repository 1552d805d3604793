"""Root's program for loop devices: what whoever is cinder-volume may ask of it, and what it does not do."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from island_fast.cinder.attach import exercise, loop_root
from island_fast.cinder.attach.daemon import Daemon
from island_fast.cinder.attach.exercise import SIZE as EXERCISED
from island_fast.cinder.attach.exercise import VOLUME as SELFTEST
from island_fast.cinder.attach.exports import Exports
from island_fast.cinder.attach.process_lookup import find_listener, is_alive
from island_fast.qemu.programs import run_program
from tests.live.actor import USER
from tests.live.conftest import Host

LOOP_CLR_FD = 0x4C01


@pytest.fixture
def served(root_host: Host) -> Daemon:
    """A daemon with its export, and no device."""
    volume, image = root_host.volume()
    Exports(root_host.run, root_host.links, run_program, "loop").serve(volume, image)
    daemon = Daemon(root_host.run / volume, run_program)
    daemon.export()
    return daemon


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[Path]:
    """A file that only root can read."""
    path = tmp_path / "secret"
    path.write_bytes(b"S" * (1 << 20))
    path.chmod(0o600)
    yield path
    assert path.read_bytes() == b"S" * (1 << 20)
    assert not [p for p in Path("/sys/block").glob("loop*/loop/backing_file") if str(path) in p.read_text()]


def refused(file: Path, capsys: pytest.CaptureFixture[str], command: str = "attach") -> str:
    """What the program says when it refuses; fails if it makes a device."""
    capsys.readouterr()
    assert loop_root.main([command, str(file)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert loop_root.devices_over(file) == []
    return said.err


def folder_of(tmp_path: Path) -> Path:
    folder = tmp_path / str(uuid.uuid4())
    folder.mkdir(0o700)
    return folder


def test_a_link_is_not_followed(tmp_path: Path, secret: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither in the place of the file, nor in that of any folder on the way, nor to an export."""
    folder = folder_of(tmp_path)
    (folder / "disk").symlink_to(secret)
    assert "symbolic link" in refused(folder / "disk", capsys)
    real = folder_of(tmp_path)
    os.link(secret, real / "disk")
    other = tmp_path / str(uuid.uuid4())
    other.symlink_to(real)
    assert "symbolic link" in refused(other / "disk", capsys)
    (tmp_path / "way").symlink_to(tmp_path)
    assert "symbolic link" in refused(tmp_path / "way" / real.name / "disk", capsys)


def test_a_link_to_an_export_is_not_followed(
    served: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path)
    (folder / "disk").symlink_to(served.disk)
    assert "symbolic link" in refused(folder / "disk", capsys)


@pytest.mark.parametrize("kind", ["file", "hard link", "folder", "pipe", "device"])
def test_what_is_no_export_is_refused(
    tmp_path: Path, secret: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder = folder_of(tmp_path)
    disk = folder / "disk"
    if kind == "file":
        disk.write_bytes(b"x" * 4096)
    elif kind == "hard link":
        os.link(secret, disk)
    elif kind == "folder":
        disk.mkdir()
    elif kind == "pipe":
        os.mkfifo(disk)  # to open it would wait for ever
    else:
        os.mknod(disk, 0o600 | 0o060000, os.makedev(7, 0))
    assert "is not the export of a volume's daemon" in refused(disk, capsys)


def test_a_file_that_is_mounted_in_the_place_of_an_export_is_refused(
    tmp_path: Path, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path)
    (folder / "disk").touch()
    subprocess.run(["mount", "--bind", secret, folder / "disk"], check=True)
    try:
        assert "is not the export" in refused(folder / "disk", capsys)
    finally:
        subprocess.run(["umount", folder / "disk"], check=True)


def test_another_user_s_export_is_refused(served: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    os.chown(served.folder, USER, USER)
    try:
        assert "by another user than the owner of its folder" in refused(served.disk, capsys)
    finally:
        os.chown(served.folder, 0, 0)


def test_a_folder_that_is_open_to_others_is_refused(
    served: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    served.folder.chmod(0o770)
    try:
        assert "is not a private folder" in refused(served.disk, capsys)
    finally:
        served.folder.chmod(0o700)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["attach"],
        ["attach", "{file}", "4096"],
        ["attach", "/dev/loop0"],
        ["attach", "{file}/../../{file}"],
        ["release", "/dev/loop0"],
        ["grow", "relative{file}"],
        ["chown", "{file}"],
        ["exercise", "{file}"],
        ["digest", "{file}"],
        ["bench", "{file}", "-c", "1", "-d", "1", "-s", "1", "-S", "1"],
    ],
)
def test_it_takes_nothing_else(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What overwrites a device above all, but on the self-test's own volume."""
    file = f"/run/island/{uuid.uuid4()}/disk"
    assert loop_root.main([word.format(file=file) for word in words]) == 2
    assert capsys.readouterr().err.startswith("usage: island-loop")


def test_it_says_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert loop_root.main(["--help"]) == 0
    assert "The Cinder driver runs this command as root" in capsys.readouterr().out


def test_a_device_is_made_once_and_goes_when_nobody_has_it_open(
    served: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when an earlier release was killed between its two steps."""
    assert loop_root.main(["attach", str(served.disk)]) == 0
    device = Path(capsys.readouterr().out.strip())
    with device.open("rb", buffering=0) as guest:
        assert loop_root.main(["release", str(served.disk)]) == loop_root.HELD
        other = os.open(device, os.O_RDONLY)
        fcntl.ioctl(other, LOOP_CLR_FD)  # it is to go with its last user
        os.close(other)
        assert loop_root.main(["attach", str(served.disk)]) == 0
        assert capsys.readouterr().out.strip() == str(device)
        assert guest.read(4096) == bytes(4096)
    assert loop_root.devices_over(served.disk) == [device.name]  # the guest has gone, and it has not
    assert loop_root.main(["release", str(served.disk)]) == 0
    assert loop_root.devices_over(served.disk) == []
    assert loop_root.main(["release", str(served.disk)]) == 0


@pytest.mark.parametrize("command", ["release", "abandon"])
@pytest.mark.parametrize("place", ["open folder", "private folder", "below an export"])
def test_a_device_over_another_file_of_that_name_stays(
    served: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, command: str
) -> None:
    """Such as one that root has over /var/lib/nova/instances/<uuid>/disk."""
    folder = folder_of(tmp_path)
    if place == "open folder":
        folder.chmod(0o755)
    disk = folder / "disk"
    disk.write_bytes(bytes(1 << 20))
    device = subprocess.check_output(["losetup", "--find", "--show", disk], text=True).strip()
    try:
        if place == "below an export":
            subprocess.run(["mount", "--bind", served.disk, disk], check=True)
        assert loop_root.devices_over(disk) == [Path(device).name]
        status = loop_root.main([command, str(disk)])
        assert status == (1 if place == "open folder" else 0)
        assert loop_root.devices_over(disk) == [Path(device).name]
        assert Path("/sys/block", Path(device).name, "loop/autoclear").read_text() == "0\n"
    finally:
        if place == "below an export":
            subprocess.run(["umount", disk], check=True)
        subprocess.run(["losetup", "--detach", device], check=True)


def test_devices_of_a_daemon_that_was_killed_are_abandoned(
    served: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert loop_root.main(["attach", str(served.disk)]) == 0
    pid = find_listener(served.control)
    assert pid
    os.kill(pid, signal.SIGKILL)
    while is_alive(pid):
        time.sleep(0.01)
    assert loop_root.devices_over(served.disk)
    assert loop_root.main(["abandon", str(served.disk)]) == 0
    assert loop_root.devices_over(served.disk) == []


def test_a_free_device_that_another_program_takes_first(
    served: Daemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "other").write_bytes(bytes(1 << 20))
    real, taken = fcntl.ioctl, []

    def ioctl(fd: int, request: int, *argument: object) -> object:
        if request == 0x4C0A and not taken:
            name = Path(os.readlink(f"/proc/self/fd/{fd}"))
            taken.append(name)
            subprocess.run(["losetup", name, tmp_path / "other"], check=True)
        return real(fd, request, *argument)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    try:
        assert loop_root.main(["attach", str(served.disk)]) == 0
        assert Path(capsys.readouterr().out.strip()) not in taken
    finally:
        for device in taken:
            subprocess.run(["losetup", "--detach", device], check=True)
        loop_root.main(["release", str(served.disk)])


def test_while_a_device_is_exercised_its_number_is_not_given_to_another_file(
    root_host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or whoever asks for both could have root overwrite what root attaches meanwhile."""
    image = root_host.images / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(EXERCISED)], check=True)
    device = root_host.exports.attach(SELFTEST, image).readlink()
    disk = root_host.run / SELFTEST / "disk"
    (tmp_path / "other").write_bytes(bytes(1 << 20))

    def meddle(path: Path) -> list[str]:
        assert loop_root.main(["abandon", str(disk)]) == 0
        made = subprocess.check_output(["losetup", "--find", "--show", tmp_path / "other"], text=True).strip()
        subprocess.run(["losetup", "--detach", made], check=True)
        return [str(path), made]

    monkeypatch.setattr(exercise, "exercise", meddle)
    assert loop_root.main(["exercise", str(disk)]) == 0
    seen, made = capsys.readouterr().out.split()
    assert seen == str(device) != made


def test_an_openat2_that_the_kernel_lacks_is_an_error(
    served: Daemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from island_fast.cinder.attach import fuse_export

    monkeypatch.setattr(fuse_export, "_OPENAT2", 100_000)
    assert os.strerror(errno.ENOSYS) in refused(served.disk, capsys)


def test_whoever_is_cinder_reads_no_file_of_root_s(secret: Path, tmp_path: Path) -> None:
    """The whole way: another user, rootwrap with the filters that are shipped, the program as installed."""
    from tests.live.test_rootwrap import FILTERS

    conf, own = tmp_path / "rootwrap.conf", tmp_path / "own"
    own.mkdir()
    folder = folder_of(own)
    for place in (own, folder):
        os.chown(place, USER, USER)
    (folder / "disk").symlink_to(secret)
    directories = os.environ["PATH"].replace(":", ",")
    conf.write_text(f"[DEFAULT]\nfilters_path={FILTERS}\nexec_dirs={directories}\nuse_syslog=False\n")
    rootwrap = [Path(sys.executable).parent / "oslo-rootwrap", conf]
    for words, status in (
        (["island-loop", "attach", folder / "disk"], 1),
        (["losetup", "--find", "--show", "--nooverlap", "--direct-io=off", folder / "disk"], 99),
        (["chown", f"{USER}:{USER}", "/dev/loop0"], 99),
    ):
        done = subprocess.run([*rootwrap, *words], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
