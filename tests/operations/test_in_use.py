"""What is in use is refused by name, whatever uses it: images, raw files, devices, targets, backing files."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import ImageInUseError, IslandError, RefusedError
from island_fast.images import qcow2_source
from island_fast.images.backing import Backing, Chain
from island_fast.images.unchanged import Unchanged
from island_fast.operations.unpin import unpin
from island_fast.qcow2.image import Image
from island_fast.qemu import open_files
from island_fast.qemu.programs import ProgramResult, run_program
from island_fast.qemu.qmp import Qmp
from tests.support import qemu
from tests.support.daemon import StorageDaemon, needs_storage_daemon

MIB = 1 << 20

pytestmark = qemu.needs_qemu

HOLD = """
import mmap, os, sys
file = open(sys.argv[1], "r+b")
if sys.argv[2] == "mapped":
    memory = mmap.mmap(file.fileno(), 0)
    file.close()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(path: Path, how: str) -> Iterator[str]:
    """Have something use `path` for writing; yields what an error must say of it."""
    if how in ("descriptor", "mapped"):
        words = [sys.executable, "-c", HOLD, path, how]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout
            process.stdout.readline()
            yield f"open in process {process.pid}"
            assert process.stdin
            process.stdin.close()
        return
    if how == "inherited":
        with path.open("r+b"):
            yield "open for writing in this process"
        return
    device = make_loop(path)
    try:
        if how == "loop":
            yield f"in use by {device}; detach"
            return
        qemu.run("mkfs.ext4", "-q", device)
        folder = path.with_name("mounted")
        folder.mkdir()
        qemu.run("mount", device, folder)
        try:
            if how == "mounted":
                yield f"in use by {device}, mounted at {folder}; detach"
            else:
                with elsewhere_only(folder):
                    yield f"in use by {device}, mounted at .* \\(as process [0-9]+ sees it\\)"
        finally:
            subprocess.run(["umount", folder], capture_output=True, check=False)
            folder.rmdir()
    finally:
        qemu.run("losetup", "--detach", device)


@contextmanager
def elsewhere_only(folder: Path) -> Iterator[None]:
    """Leave a mount to another mount namespace."""
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo held; read line"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        qemu.run("umount", folder)
        yield
        assert process.stdin
        process.stdin.close()


def make_loop(path: Path, *options: str) -> str:
    if os.geteuid() or not Path("/dev/loop-control").exists():
        pytest.skip("a loop device needs root and /dev/loop-control")
    return qemu.run("losetup", "--find", "--show", *options, path).strip()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(MIB) + bytes(15 * MIB))
    return path


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "_PATIENCE", 0.3)


WAYS = ["descriptor", "mapped", "inherited", "loop", "mounted", "mounted elsewhere"]


@pytest.mark.parametrize("how", WAYS)
def test_a_raw_image_in_use_is_refused_by_name(repository: Repository, raw: Path, how: str) -> None:
    with held(raw, how) as told, pytest.raises(ImageInUseError, match=told) as caught:
        repository.snapshot(raw, volume="vol", image_format="raw")
    assert str(caught.value).startswith(str(raw))
    assert repository.snapshot(raw, volume="vol", image_format="raw").rule == "full-scan"


@pytest.mark.parametrize("how", ["descriptor", "mapped", "loop"])
def test_a_qcow2_that_something_else_than_qemu_writes_to_is_refused(
    repository: Repository, tmp_path: Path, how: str
) -> None:
    image = qemu.create(tmp_path / "disk.qcow2", 4 * MIB)
    with held(image, how) as told, pytest.raises(ImageInUseError, match=told):
        repository.snapshot(image)
    repository.snapshot(image)


@pytest.mark.parametrize("how", ["descriptor", "loop"])
def test_a_backing_file_in_use_is_refused(
    repository: Repository, raw: Path, tmp_path: Path, how: str
) -> None:
    top = tmp_path / "top.qcow2"
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", top)
    with held(raw, how) as told, pytest.raises(ImageInUseError, match=told):
        repository.snapshot(top, backing=[f"raw:{raw}"])
    repository.snapshot(top, backing=[f"raw:{raw}"])


# What is changed while it is read.


def once(work: Callable[[], object]) -> Callable[..., None]:
    """A progress callback that does something when the first blocks are sent."""
    done: list[bool] = []

    def progress(phase: str, *_: object) -> None:
        if phase == "send" and not done:
            done.append(True)
            work()

    return progress


def write_into(path: Path, offset: int, data: bytes = b"new") -> None:
    """Write and close at once; the times of writing stay, those of changing cannot."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def changed_while_read(repository: Repository, *words: object, told: str, **options: object) -> None:
    """Assert that a snapshot fails, that nothing of it is visible, and that the next one is good."""
    work: Callable[[], object] = options.pop("work")  # type: ignore[assignment]
    before = repository.snapshots()
    with pytest.raises(ImageInUseError, match=told):
        repository.snapshot(*words, progress=once(work), **options)  # type: ignore[arg-type]
    assert repository.snapshots() == before
    repository.snapshot(*words, **options)  # type: ignore[arg-type]


def test_a_raw_image_that_is_changed_while_it_is_read(repository: Repository, raw: Path) -> None:
    changed_while_read(
        repository, raw, volume="vol", image_format="raw",
        work=lambda: write_into(raw, 0), told=f"{raw} was changed while it was read",
    )  # fmt: skip


def test_an_image_without_a_pin_that_is_changed_while_it_is_read(
    repository: Repository, tmp_path: Path
) -> None:
    image = qemu.create(tmp_path / "disk.qcow2", 4 * MIB)
    qemu.io(image, qemu.write(0, 2 * MIB, 1))
    changed_while_read(
        repository, image, pin=False,
        work=lambda: write_into(image, image.stat().st_size - 512), told="was changed while it was read",
    )  # fmt: skip


def test_a_backing_file_that_is_changed_while_it_is_read(
    repository: Repository, raw: Path, tmp_path: Path
) -> None:
    top = overlay(tmp_path / "top.qcow2", raw, "raw")
    changed_while_read(
        repository, top, backing=[f"raw:{raw}"],
        work=lambda: write_into(raw, 0), told=f"{raw} was changed while it was read",
    )  # fmt: skip


def test_a_backing_file_of_which_nothing_was_read_may_change(
    repository: Repository, raw: Path, tmp_path: Path
) -> None:
    """Its owner, for example: libvirt sets it at each start of a guest that has the same base."""
    os.truncate(raw, 0)
    os.truncate(raw, 16 * MIB)
    top = overlay(tmp_path / "top.qcow2", raw, "raw")
    taken = repository.snapshot(top, backing=[f"raw:{raw}"], progress=once(lambda: raw.chmod(0o600)))
    assert (taken.rule, taken.blocks_changed) == ("full-scan", 1)


def test_what_cannot_be_asked_is_reported(
    repository: Repository, raw: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a lease, as on a network file system, and with processes that only root may look into."""
    monkeypatch.setattr(open_files, "_find_process", lambda *_: (None, 3))
    repository.snapshot(raw, volume="vol", image_format="raw")
    assert caplog.text == ""
    monkeypatch.setattr(open_files, "_no_writer_by_lease", lambda _: None)
    repository.snapshot(raw, volume="vol", image_format="raw")
    assert f"any of 3 processes of other users has {raw} open; run as root" in caplog.text


@pytest.mark.parametrize("which", ["own", "parent's"])
def test_a_pin_that_is_deleted_while_it_is_read(repository: Repository, tmp_path: Path, which: str) -> None:
    """Its clusters are free then, and the guest writes to them."""
    image = qemu.create(tmp_path / "disk.qcow2", 4 * MIB)
    qemu.io(image, qemu.write(0, 2 * MIB, 1))
    if which == "parent's":
        repository.snapshot(image)
        qemu.io(image, qemu.write(0, MIB, 2))

    def delete() -> None:
        with Image.open(image) as opened:
            pin = opened.snapshots[0 if which == "parent's" else -1]
        qemu.run("qemu-img", "snapshot", "-d", pin.name, image)
        qemu.io(image, qemu.write(0, 2 * MIB, 3))

    changed_while_read(repository, image, work=delete, told="was deleted or changed while it was read")
    taken = repository.snapshots()[-1]
    qemu.compare(image, restore(repository, taken.snapshot, tmp_path))


@needs_storage_daemon
def test_a_pin_that_the_guest_s_process_deletes_while_it_is_read(
    repository: Repository, tmp_path: Path
) -> None:
    image = qemu.create(tmp_path / "disk.qcow2", 4 * MIB)
    qemu.noise(image, 0, 2 * MIB)
    with StorageDaemon(image) as daemon:

        def delete() -> None:
            with Image.open(image) as opened, Qmp(daemon.qmp_socket) as qmp:
                pin = opened.snapshots[-1]
                qmp.snapshot_delete(qmp.find_node(image), pin.id, pin.name)
            daemon.write(0, MIB, 3)

        changed_while_read(
            repository, image, qmp=daemon.qmp_socket, work=delete, told="deleted or changed while it was read"
        )


def test_a_device_that_is_taken_while_it_is_read(repository: Repository, raw: Path) -> None:
    device = Path(make_loop(raw))
    holding = contextlib.ExitStack()
    try:
        with pytest.raises(ImageInUseError, match="is open in process"), holding:
            repository.snapshot(
                device, volume="vol", image_format="raw",
                progress=once(lambda: holding.enter_context(held(device, "descriptor"))),
            )  # fmt: skip
        assert repository.snapshots() == []
    finally:
        qemu.run("losetup", "--detach", device)


def test_a_backing_file_that_is_changed_within_the_step_of_its_times(
    repository: Repository, tmp_path: Path
) -> None:
    """Old ext4, as ext3 and FAT, counts whole seconds."""
    disk, folder = tmp_path / "fs", tmp_path / "mounted"
    disk.write_bytes(bytes(32 * MIB))
    qemu.run("mkfs.ext4", "-q", "-I", "128", disk)
    device = make_loop(disk)
    folder.mkdir()
    qemu.run("mount", device, folder)
    try:
        base = folder / "base"
        base.write_bytes(b"1" * 4 * MIB)
        top = overlay(tmp_path / "top.qcow2", base, "raw")
        wait_for_a_new_second()
        write_into(base, 3 * MIB, b"2")
        repository.snapshot(top, volume="vol", backing=[f"raw:{base}"])
        write_into(base, 3 * MIB, b"3")
        taken = repository.snapshot(top, volume="vol", backing=[f"raw:{base}"])
        assert (taken.rule, taken.blocks_changed) == ("full-scan", 1)
        assert repository.snapshot(top, volume="vol", backing=[f"raw:{base}"]).rule == "table-diff"
    finally:
        qemu.run("umount", folder)
        qemu.run("losetup", "--detach", device)


def wait_for_a_new_second() -> None:
    time.sleep(1.005 - time.time() % 1)


def test_a_time_in_the_future_shows_no_later_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    with file.open("rb") as opened:
        assert Unchanged(file, opened.fileno()).settled
        monkeypatch.setattr(time, "time_ns", lambda: file.stat().st_ctime_ns - 10**10)
        assert not Unchanged(file, opened.fileno()).settled


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize("how", ["descriptor", "mapped", "loop"])
def test_a_target_that_is_taken_while_it_is_compared(
    repository: Repository, tmp_path: Path, kind: str, how: str
) -> None:
    target = tmp_path / "target"
    qemu.run("qemu-img", "create", "-q", "-f", kind, target, 4 * MIB)
    qemu.run("qemu-io", "-f", kind, "-c", "write -q -P 1 0 2M", target)
    taken = repository.snapshot(target, volume="vol", image_format=kind)
    qemu.run("qemu-io", "-f", kind, "-c", "write -q -P 2 0 1M", target)
    before = target.read_bytes()
    holding: list[AbstractContextManager[str]] = []
    told: list[str] = []

    def take(phase: str, *_: object) -> None:
        if phase == "compare" and not holding:
            holding.append(held(target, how))
            told.append(holding[0].__enter__())

    with pytest.raises(ImageInUseError) as caught:
        repository.restore_onto(taken.snapshot, target, image_format=kind, progress=take)
    assert told[0].partition(";")[0] in str(caught.value)
    assert target.read_bytes() == before
    holding[0].__exit__(None, None, None)
    repository.restore_onto(taken.snapshot, target, image_format=kind)
    qemu.compare(target, restore(repository, taken.snapshot, tmp_path), one_format=kind)


def restore(repository: Repository, snapshot: str, folder: Path) -> Path:
    path = folder / "restored.raw"
    repository.restore(snapshot, path, image_format="raw")
    return path


def test_without_a_lease_the_processes_are_asked(
    repository: Repository, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a user who does not own the file, or on a network file system."""
    monkeypatch.setattr(open_files, "_no_writer_by_lease", lambda _: None)
    for how in ("descriptor", "mapped", "inherited", "loop"):
        with held(raw, how) as told, pytest.raises(ImageInUseError, match=told):
            repository.snapshot(raw, volume="vol", image_format="raw")
    repository.snapshot(raw, volume="vol", image_format="raw")


def test_a_user_that_no_process_shows_is_refused_by_the_lease_alone(
    repository: Repository, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for the kernel's own users, such as a swap file or an exported disk."""
    monkeypatch.setattr(open_files, "_find_process", lambda *_: (None, 3))
    with held(raw, "descriptor"), pytest.raises(ImageInUseError, match="in use by the kernel"):
        repository.snapshot(raw, volume="vol", image_format="raw")


def test_a_reader_is_no_trouble(repository: Repository, raw: Path) -> None:
    device = make_loop(raw, "--read-only")
    try:
        with raw.open("rb"):
            repository.snapshot(raw, volume="vol", image_format="raw")
            with pytest.raises(ImageInUseError, match=device):
                repository.restore_onto("vol@latest", raw, image_format="raw")
    finally:
        qemu.run("losetup", "--detach", device)


def test_a_swap_file_is_named(
    repository: Repository, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc = tmp_path / "proc"
    proc.mkdir()
    name = str(raw).replace(" ", "\\040")
    (proc / "swaps").write_text(f"Filename Type Size Used Priority\n{name} file 1 0 -2\n")
    find = open_files._find_swap
    wanted = open_files._Wanted.of(raw.stat())
    monkeypatch.setattr(open_files, "_PROC", proc)
    assert find(wanted) == str(raw)
    assert find(open_files._Wanted.of(tmp_path.stat())) is None


def test_a_disk_is_in_use_with_its_partition_and_a_loop_device_on_it(
    repository: Repository, tmp_path: Path
) -> None:
    file = tmp_path / "disk"
    entry = struct.pack(
        "<8B2I", 0, 0, 0, 0, 0x83, 0, 0, 0, 2048, 32768
    )  # of a master boot record: one partition
    file.write_bytes(bytes(446) + entry + bytes(48) + b"\x55\xaa" + bytes(32 * MIB - 512))
    disk = make_loop(file, "--partscan")
    part = tmp_path / "part"
    try:
        numbers = open_files.read_sysfs(Path("/sys/block", Path(disk).name, f"{Path(disk).name}p1/dev"))
        if not numbers:
            pytest.skip("the kernel makes no partitions of loop devices")
        os.mknod(part, stat.S_IFBLK | 0o600, os.makedev(*map(int, numbers.split(":"))))
        for one, other in ((Path(disk), part), (part, Path(disk))):
            with held(one, "descriptor") as told, pytest.raises(ImageInUseError, match=told):
                repository.snapshot(other, volume="vol", image_format="raw")
        with held(part, "loop") as told, pytest.raises(ImageInUseError, match=told):
            repository.snapshot(disk, volume="vol", image_format="raw")
        with file.open("r+b"), pytest.raises(ImageInUseError, match="in this process"):
            repository.snapshot(disk, volume="vol", image_format="raw")
        repository.snapshot(disk, volume="vol", image_format="raw")
    finally:
        qemu.run("losetup", "--detach", disk)


@pytest.mark.parametrize("kind", ["snapshot", "restore"])
@pytest.mark.parametrize("below", ["loop device", "file"])
def test_a_device_is_in_use_with_what_it_stands_on(
    repository: Repository, raw: Path, below: str, kind: str
) -> None:
    """A loop device over a loop device over a file."""
    lower = Path(make_loop(raw))
    try:
        upper = Path(make_loop(lower))
        try:
            work = {
                "snapshot": lambda: repository.snapshot(upper, volume="vol", image_format="raw"),
                "restore": lambda: repository.restore_onto("vol@latest", upper, image_format="raw"),
            }
            work["snapshot"]()
            place = raw if below == "file" else lower
            for how in ("descriptor", "mapped") if below == "file" else ("descriptor",):
                with held(place, how) as told, pytest.raises(ImageInUseError, match=told):
                    work[kind]()
            for options in ([], ["--read-only"]) if kind == "restore" else ([],):
                other = make_loop(place, *options)
                with pytest.raises(ImageInUseError, match=f"in use by {other}"):
                    work[kind]()
                qemu.run("losetup", "--detach", other)
            work[kind]()
        finally:
            qemu.run("losetup", "--detach", upper)
    finally:
        qemu.run("losetup", "--detach", lower)


def test_a_device_is_in_use_with_what_is_mounted_below_it(
    repository: Repository, raw: Path, tmp_path: Path
) -> None:
    lower = Path(make_loop(raw))
    try:
        upper = Path(make_loop(lower))
        folder = tmp_path / "mounted"
        folder.mkdir()
        qemu.run("mkfs.ext4", "-q", lower)
        qemu.run("mount", lower, folder)
        try:
            with pytest.raises(ImageInUseError, match=f"{upper} is on a device that is mounted at {folder}"):
                repository.snapshot(upper, volume="vol", image_format="raw")
        finally:
            qemu.run("umount", folder)
            repository.snapshot(upper, volume="vol", image_format="raw")
            qemu.run("losetup", "--detach", upper)
    finally:
        qemu.run("losetup", "--detach", lower)


def test_a_loop_device_over_a_file_whose_name_is_gone(repository: Repository, raw: Path) -> None:
    one, other = make_loop(raw), make_loop(raw)
    raw.unlink()
    try:
        with pytest.raises(ImageInUseError, match=f"in use by {other}"):
            repository.snapshot(one, volume="vol", image_format="raw")
    finally:
        for device in (one, other):
            qemu.run("losetup", "--detach", device)


def test_the_devices_below_a_device_mapper_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """253:1 on 253:0 on the partition 8:1 of 8:0, which 253:2 is on, too."""
    monkeypatch.setattr(open_files, "SYSFS_DEVICES", tmp_path)
    for name in ("253:0/dm", "253:1/dm", "253:2/dm", "8:0/sda1", "253:0/slaves/sda1", "253:1/slaves/dm-0"):
        (tmp_path / name).mkdir(parents=True)
    for place, number in (("8:0/sda1", "8:1"), ("253:0/slaves/sda1", "8:1"), ("253:1/slaves/dm-0", "253:0")):
        (tmp_path / place / "dev").write_text(f"{number}\n")
    (tmp_path / "8:0/dev").write_text("8:0\n")
    (tmp_path / "8:0/sda1/partition").write_text("1\n")
    (tmp_path / "8:1").symlink_to("8:0/sda1")
    status = os.stat_result((stat.S_IFBLK, *[0] * 9), {"st_rdev": os.makedev(253, 1)})
    wanted = open_files._Wanted.of(status)
    assert wanted.devices == {(253, 1)}
    assert wanted.below == {(253, 0), (8, 1), (8, 0)}
    disk = os.stat_result((stat.S_IFBLK, *[0] * 9), {"st_rdev": os.makedev(8, 0)})
    assert wanted.is_hit(disk)
    assert not wanted.is_hit(disk, near=True)  # who only reads the disk changes nothing


# What a name leads to.


def test_qemu_img_gets_the_file_that_was_locked(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = qemu.create(tmp_path / "mine.qcow2", 4 * MIB)
    victim = qemu.create(tmp_path / "victim.qcow2", 4 * MIB)
    before = victim.read_bytes()

    def swap(command: list[str], **how: object) -> ProgramResult:
        image.rename(tmp_path / "away.qcow2")
        image.symlink_to(victim)
        return run_program(command, **how)  # type: ignore[arg-type]

    real = qcow2_source.QemuImg
    monkeypatch.setattr(qcow2_source, "QemuImg", lambda fd, path: real(fd, path, swap))
    repository.snapshot(image, volume="vol")
    assert victim.read_bytes() == before
    with Image.open(tmp_path / "away.qcow2") as opened:
        assert len(opened.snapshots) == 1


def test_qemu_nbd_gets_the_file_that_was_locked(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = qemu.create(tmp_path / "target.qcow2", 4 * MIB)
    qemu.io(target, qemu.write(0, MIB, 1))
    taken = repository.snapshot(target, volume="vol")
    victim = qemu.create(tmp_path / "victim.qcow2", 4 * MIB)
    before = victim.read_bytes()
    qemu.io(target, qemu.write(0, MIB, 2))
    away = tmp_path / "away.qcow2"
    folder = tmp_path / "bin"
    folder.mkdir()
    real = qemu.run("which", "qemu-nbd").strip()
    (folder / "qemu-nbd").write_text(
        f'#!/bin/sh\nmv {target} {away}; ln -s {victim} {target}\nexec {real} "$@"\n'
    )
    (folder / "qemu-nbd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    with pytest.raises(RefusedError, match="was replaced"):
        repository.restore_onto(taken.snapshot, target)
    assert victim.read_bytes() == before


# Backing files.


def overlay(path: Path, backing: Path, kind: str) -> Path:
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", backing, "-F", kind, path)
    qemu.io(path, qemu.write(MIB, 65536, 7))
    return path


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_backing_file_with_other_content_and_the_old_times(
    repository: Repository, tmp_path: Path, kind: str
) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    for number, path in enumerate((base, other), 1):
        qemu.run("qemu-img", "create", "-q", "-f", kind, path, 4 * MIB)
        qemu.run("qemu-io", "-f", kind, "-c", f"write -q -P {number} 2M 1M", path)
        os.utime(path, (1_700_000_000, 1_700_000_000))
    top = overlay(tmp_path / "top.qcow2", base, kind)
    listed = [f"{kind}:{base}"]
    repository.snapshot(top, volume="vol", backing=listed)
    base.write_bytes(other.read_bytes())
    os.utime(base, (1_700_000_000, 1_700_000_000))
    taken = repository.snapshot(top, volume="vol", backing=listed)
    assert (taken.rule, taken.blocks_changed) == ("full-scan", 16)
    assert "backing files" in taken.reason
    qemu.compare(top, restore(repository, taken.snapshot, tmp_path))
    assert repository.snapshot(top, volume="vol", backing=listed).rule == "table-diff"


def test_a_device_as_backing_file_is_always_read(repository: Repository, raw: Path, tmp_path: Path) -> None:
    device = make_loop(raw)
    try:
        top = overlay(tmp_path / "top.qcow2", Path(device), "raw")
        repository.snapshot(top, volume="vol", backing=[f"raw:{device}"])
        with open(device, "r+b") as file:
            file.seek(3 * MIB)
            file.write(b"x" * 512)
        taken = repository.snapshot(top, volume="vol", backing=[f"raw:{device}"])
        assert (taken.rule, taken.blocks_changed) == ("full-scan", 1)
        assert f"{device} is a block device" in taken.reason
        identities = set()
        for _ in range(2):
            with contextlib.closing(Chain([Backing("raw", Path(device))], None)) as chain:
                identities.add(chain.identity)
        assert len(identities) == 1  # or nothing could be compared with the snapshot
    finally:
        qemu.run("losetup", "--detach", device)


# The monitor, and images that cannot be pinned.


@needs_storage_daemon
def test_the_monitor_is_free_while_data_is_sent(repository: Repository, tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "disk.qcow2", 4 * MIB)
    qemu.noise(image, 0, 2 * MIB)
    greetings: list[bytes] = []
    with StorageDaemon(image) as daemon:

        def greet(phase: str, *_: object) -> None:
            if phase in ("scan", "send"):
                with socket.socket(socket.AF_UNIX) as other:
                    other.settimeout(5)
                    other.connect(str(daemon.qmp_socket))
                    greetings.append(other.recv(100))

        repository.snapshot(image, qmp=daemon.qmp_socket, progress=greet)
        daemon.write(0, 65536, 1)
        taken = repository.snapshot(image, qmp=daemon.qmp_socket, progress=greet)
        assert (taken.rule, taken.notes) == ("table-diff", ())
        assert len(greetings) > 2
        assert all(b"QMP" in one for one in greetings)


@needs_storage_daemon
def test_a_monitor_that_is_taken_at_the_end_leaves_the_old_pin(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("island_fast.qemu.qmp._HANDSHAKE_TIMEOUT", 0.5)
    image = qemu.create(tmp_path / "disk.qcow2", 4 * MIB)
    with StorageDaemon(image) as daemon, contextlib.ExitStack() as stack:
        repository.snapshot(image, qmp=daemon.qmp_socket)

        def take(phase: str, *_: object) -> None:
            if phase == "commit":
                other = stack.enter_context(socket.socket(socket.AF_UNIX))
                other.connect(str(daemon.qmp_socket))
                other.recv(100)

        taken = repository.snapshot(image, qmp=daemon.qmp_socket, progress=take)
        assert "the old pin" in taken.notes[0]
        stack.close()
        last = repository.snapshot(image, qmp=daemon.qmp_socket)
        assert (last.rule, last.parent, last.notes) == ("table-diff", taken.snapshot, ())
    with Image.open(image) as opened:
        assert len(opened.snapshots) == 1


def test_an_image_whose_counts_are_full_is_stored_without_a_pin(
    repository: Repository, tmp_path: Path
) -> None:
    image = qemu.create(tmp_path / "disk.qcow2", 4 * MIB, refcount_bits=2)
    qemu.io(image, qemu.write(0, MIB, 1))
    qemu.snapshot_create(image, "one")
    first = repository.snapshot(image)  # the last that fits
    assert "first snapshot" in first.reason
    qemu.io(image, qemu.write(0, 65536, 2))
    second = repository.snapshot(image)
    assert (second.rule, second.parent, second.blocks_changed) == ("full-scan", first.snapshot, 1)
    assert "refcount_bits=16" in second.reason
    assert "island unpin" in second.notes[0]
    qemu.io(image, qemu.write(65536, 65536, 3))
    third = repository.snapshot(image)
    assert (third.parent, third.blocks_changed) == (second.snapshot, 1)
    qemu.check(image)
    unpin(image)
    qemu.run("qemu-img", "amend", "-f", "qcow2", "-o", "refcount_bits=16", image)
    assert repository.snapshot(image).notes == ()
    assert repository.snapshot(image).rule == "table-diff"


@needs_storage_daemon
def test_pins_are_dropped_from_images_that_could_hold_none(tmp_path: Path, repository: Repository) -> None:
    image = qemu.create(tmp_path / "disk.qcow2", 4 * MIB)
    repository.snapshot(image)
    qemu.run("qemu-img", "amend", "-f", "qcow2", "-o", "compat=0.10", image)
    with StorageDaemon(image) as daemon:
        with pytest.raises(IslandError, match="version 2"):
            repository.snapshot(image, qmp=daemon.qmp_socket)
        assert len(unpin(image, daemon.qmp_socket).pins) == 1
    qemu.run("qemu-img", "resize", "-q", "-f", "qcow2", image, 8 * MIB)


def test_a_lease_does_not_end_who_asks(tmp_path: Path) -> None:
    """Others who open the file at that very moment must neither kill this process nor wait."""
    file = tmp_path / "file"
    file.write_bytes(bytes(MIB))
    stop = threading.Event()

    def open_and_close() -> None:
        script = "import sys\nfor _ in range(3000): open(sys.argv[1], 'r+b').close()"
        subprocess.run([sys.executable, "-c", script, file], check=True, timeout=60)
        stop.set()

    others = [threading.Thread(target=open_and_close) for _ in range(2)]
    for thread in others:
        thread.start()
    answers: set[bool | None] = set()
    with file.open("rb") as opened:
        while not stop.is_set():
            answers.add(open_files._no_writer_by_lease(opened.fileno()))
    for thread in others:
        thread.join()
    assert answers <= {True, False}
    assert True in answers
