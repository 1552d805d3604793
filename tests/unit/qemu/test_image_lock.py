from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from island_fast.errors import ImageInUseError, IslandError, NotFoundError, RefusedError
from island_fast.qemu.image_lock import ImageLock, writer_present
from tests.support.daemon import StorageDaemon, create_qcow2, needs_qemu, needs_storage_daemon, qemu_io

SIZE = 16 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"any regular file will do")
    return path


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    return create_qcow2(tmp_path / "disk.qcow2", SIZE)


def is_writer_present(path: Path) -> bool:
    with path.open("rb") as file:
        return writer_present(file.fileno())


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_a_second_snapshot_of_an_image_is_refused_until_the_first_ends(image: Path) -> None:
    running = pytest.raises(RefusedError, match=r"another snapshot of image .*disk.qcow2.* is running")
    with ImageLock(image), running:
        ImageLock(image).__enter__()
    with ImageLock(image):
        pass


def test_another_process_is_refused_and_its_end_frees_the_lock(image: Path) -> None:
    script = (
        "import sys; from island_fast.qemu.image_lock import ImageLock\n"
        "with ImageLock(sys.argv[1]): print('held', flush=True); sys.stdin.read(); sys.exit(9)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RefusedError), ImageLock(image):
            pass
        holder.kill()
        holder.wait()
    with ImageLock(image):
        pass


def test_the_lock_is_on_the_file_and_not_on_its_name(image: Path) -> None:
    link, other = image.with_name("link"), image.with_name("hard")
    link.symlink_to(image)
    other.hardlink_to(image)
    with ImageLock(image):
        for name in (link, other):
            with pytest.raises(RefusedError), ImageLock(name):
                pass


def test_the_descriptor_reads_and_is_closed_at_the_end(image: Path) -> None:
    before = descriptors()
    lock = ImageLock(image)
    assert lock.fd == -1
    with lock:
        assert os.pread(lock.fd, 3, 0) == b"any"
        assert not os.get_inheritable(lock.fd)
        with pytest.raises(OSError) as caught:
            os.write(lock.fd, b"x")
        assert caught.value.errno == errno.EBADF
        with pytest.raises(RefusedError, match="already held"):
            lock.__enter__()
    assert lock.fd == -1
    assert descriptors() == before
    with lock:
        assert lock.fd >= 0


def test_a_file_replaced_between_open_and_lock_is_refused(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors()
    flock = fcntl.flock

    def replace_then_lock(fd: int, operation: int) -> None:
        os.replace(image.with_name("new"), image)
        flock(fd, operation)

    image.with_name("new").write_bytes(b"restored meanwhile")
    monkeypatch.setattr(fcntl, "flock", replace_then_lock)
    with pytest.raises(RefusedError, match="was replaced"), ImageLock(image):
        pass
    assert descriptors() == before


def test_only_regular_files_are_locked(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe, Path("/dev/null")):
        with pytest.raises(RefusedError, match="not a regular file"), ImageLock(path):
            pass
    with pytest.raises(NotFoundError, match="there is no image"), ImageLock(tmp_path / "none"):
        pass


def test_a_file_that_may_not_be_read_gives_one_sentence(image: Path) -> None:
    image.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(IslandError, match=r"cannot be opened .*Permission denied") as caught:
            ImageLock(image).__enter__()
    finally:
        os.seteuid(user)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("hold_off", [False, True])
def test_a_read_only_file_can_be_locked(image: Path, hold_off: bool) -> None:
    image.chmod(0o444)
    with ImageLock(image, hold_off_writers=hold_off) as lock:
        assert not writer_present(lock.fd)


@pytest.fixture
def read_only(image: Path) -> Iterator[Path]:
    """The folder of `image`, mounted a second time and read-only."""
    again = image.parent / "again"
    again.mkdir()
    bound = subprocess.run(["mount", "--bind", image.parent, again], capture_output=True)
    if bound.returncode:
        pytest.skip("a bind mount needs root")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", again], check=True)
        yield again
    finally:
        subprocess.run(["umount", again], check=True)


@pytest.mark.parametrize("hold_off", [False, True])
def test_an_image_on_a_read_only_file_system_can_be_locked(read_only: Path, hold_off: bool) -> None:
    with pytest.raises(OSError) as caught:
        (read_only / "new").touch()
    assert caught.value.errno == errno.EROFS
    with ImageLock(read_only / "disk.qcow2", hold_off) as lock:
        assert not writer_present(lock.fd)
        with pytest.raises(RefusedError), ImageLock(read_only.parent / "disk.qcow2"):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_gives_one_sentence(
    image: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", fail)
    with image.open("rb") as file, pytest.raises(IslandError, match=r"cannot determine.*local file system"):
        writer_present(file.fileno())
    with pytest.raises(IslandError, match="cannot be locked"), ImageLock(image, True):
        pass
    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(IslandError, match="cannot be locked"), ImageLock(image):
        pass


@needs_storage_daemon
def test_a_daemon_that_serves_the_image_is_seen(qcow2: Path) -> None:
    assert not is_writer_present(qcow2)
    with StorageDaemon(qcow2):
        assert is_writer_present(qcow2)
        with ImageLock(qcow2) as lock:
            assert writer_present(lock.fd)
    assert not is_writer_present(qcow2)


@needs_storage_daemon
def test_writers_cannot_be_held_off_while_one_writes(qcow2: Path) -> None:
    before = descriptors()
    with StorageDaemon(qcow2) as daemon:
        with pytest.raises(ImageInUseError, match="open for writing"), ImageLock(qcow2, True):
            pass
        daemon.write(0, 65536, 7)
    assert descriptors() == before
    qemu_io(qcow2, "write -q -P 8 0 65536")  # nothing of the refused lock stayed


@needs_storage_daemon
def test_a_reader_is_no_writer(qcow2: Path) -> None:
    with StorageDaemon(qcow2, read_only=True) as daemon:
        daemon.io("read -q -P 0 0 65536")
        with ImageLock(qcow2, True) as lock:
            assert not writer_present(lock.fd)
            daemon.io("read -q -P 0 0 65536")


@needs_qemu
def test_qemu_cannot_write_while_writers_are_held_off_and_can_read(qcow2: Path) -> None:
    qemu_io(qcow2, "write -q -P 1 0 65536")
    before = qcow2.read_bytes()
    with ImageLock(qcow2, hold_off_writers=True) as lock:
        with pytest.raises(subprocess.CalledProcessError) as caught:
            qemu_io(qcow2, "write -q -P 2 0 65536")
        assert 'Failed to get "write" lock' in caught.value.stderr
        snapshot = subprocess.run(["qemu-img", "snapshot", "-c", "x", qcow2], capture_output=True, text=True)
        assert 'Failed to get "write" lock' in snapshot.stderr
        qemu_io(qcow2, "read -q -P 1 0 65536", read_only=True)
        assert not writer_present(lock.fd)
    assert qcow2.read_bytes() == before
    qemu_io(qcow2, "write -q -P 2 0 65536")


@needs_storage_daemon
def test_a_daemon_cannot_start_while_writers_are_held_off(qcow2: Path) -> None:
    daemon = StorageDaemon(qcow2)
    ended = pytest.raises(AssertionError, match="ended with status")
    with ImageLock(qcow2, hold_off_writers=True), ended as caught:
        daemon.start()
    assert any('Failed to get "write" lock' in note for note in caught.value.__notes__)


@needs_qemu
def test_a_plain_lock_leaves_writers_alone(qcow2: Path) -> None:
    with ImageLock(qcow2):
        qemu_io(qcow2, "write -q -P 2 0 65536")
