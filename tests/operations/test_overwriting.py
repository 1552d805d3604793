"""A snapshot restored onto an image that is there: what differs is written, and nothing else."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from island_fast.api import Repository
from island_fast.errors import (
    DamagedObjectError,
    ImageInUseError,
    IslandError,
    NotFoundError,
    RefusedError,
    StoreError,
)
from island_fast.images import target as target_module
from island_fast.operations import restore
from island_fast.qemu import qemu_nbd
from island_fast.qemu.image_lock import ImageLock
from island_fast.repository.local_state import LocalState
from island_fast.results import RestoredOnto
from tests.operations.conftest import PACK, check
from tests.support import qemu
from tests.support.daemon import StorageDaemon, needs_storage_daemon
from tests.support.memory_store import MemoryStore

pytestmark = [
    qemu.needs_qemu,
    pytest.mark.usefixtures("small_packs"),
    pytest.mark.skipif(not shutil.which("qemu-nbd"), reason="qemu-nbd (qemu-utils) is not installed"),
]

BLOCK = 65536
SIZE = 8 << 20
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "vol.qcow2", SIZE, lazy_refcounts="on")
    qemu.noise(path, 0, 2 * PACK * BLOCK, 1)
    return path


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """`loop(file)`: a loop device on a file."""
    made: list[str] = []

    def attach(file: Path) -> Path:
        if os.geteuid() or not Path("/dev/loop-control").exists():
            pytest.skip("a loop device needs root and /dev/loop-control")
        made.append(qemu.run("losetup", "--find", "--show", file).strip())
        return Path(made[-1])

    yield attach
    for device in made:
        subprocess.run(["losetup", "--detach", device], check=False)


@pytest.fixture
def left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What killed processes leave in the folder for temporary files goes afterwards."""
    with tempfile.TemporaryDirectory(prefix="i-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield


def both(repository: Repository, snapshot: str, target: Path, image_format: str) -> RestoredOnto:
    """Restore onto `target` after a dry run that must change nothing and tell what is then written."""
    before = target.read_bytes()
    told = repository.restore_onto(snapshot, target, image_format=image_format, dry_run=True)
    assert target.read_bytes() == before
    done = repository.restore_onto(snapshot, target, image_format=image_format)
    assert (told.bytes_written, told.bytes_zeroed) == (done.bytes_written, done.bytes_zeroed)
    assert told.bytes_compared == done.bytes_compared
    again = repository.restore_onto(snapshot, target, image_format=image_format)
    assert (again.bytes_written, again.bytes_zeroed) == (0, 0), "nothing differs any more"
    return done


def differing_bytes(wanted: bytes, there: bytes) -> int:
    """Bytes of those blocks that differ, what is behind the end of `wanted` being zero."""
    wanted = wanted.ljust(len(there), b"\0")
    blocks = range(0, len(there), BLOCK)
    return sum(
        len(there[at : at + BLOCK]) for at in blocks if wanted[at : at + BLOCK] != there[at : at + BLOCK]
    )


def spoil(content: bytes, chance: random.Random, size: int) -> bytes:
    """`content` at another size, and otherwise in some places: noise, zeros, a byte."""
    there = bytearray(content[:size].ljust(size, b"\0"))
    for _ in range(12):
        at = chance.randrange(size)
        length = min(size - at, chance.choice([1, 512, BLOCK, 5 * BLOCK]))
        there[at : at + length] = chance.choice([chance.randbytes(length), bytes(length)])
    return bytes(there)


# seed, size of the volume, how much larger the target is
SHAPES = [(1, SIZE, 0), (2, SIZE - 3 * 512, 0), (3, SIZE - 3 * 512, 7 * 512), (4, SIZE - 512, 40 * BLOCK)]


@pytest.mark.parametrize("seed, size, more", SHAPES)
@pytest.mark.parametrize("kind", ["qcow2", "raw", "device"])
def test_a_target_that_differs_at_random(
    repository: Repository, tmp_path: Path, kind: str, seed: int, size: int, more: int,
    loop: Callable[[Path], Path],
) -> None:  # fmt: skip
    chance = random.Random(seed)
    volume = tmp_path / "vol.qcow2"
    qemu.create_with_history(volume, seed, size, snapshots=1)
    taken = repository.snapshot(volume)
    truth = qemu.content(volume)
    there = spoil(truth, chance, size + more)
    target = tmp_path / "target"
    target.write_bytes(there)
    if kind == "qcow2":
        raw = target.rename(tmp_path / "raw")
        options = {"cluster_size": chance.choice([512, 4096, 65536, 1 << 20])}
        qemu.convert(raw, target, source_format="raw", target_format="qcow2", **options)
        qemu.snapshot_create(target, "kept")
    elif kind == "device":
        target = loop(target)
    done = both(repository, taken.snapshot, target, "qcow2" if kind == "qcow2" else "raw")
    assert done.bytes_written + done.bytes_zeroed == differing_bytes(truth, there)
    assert (done.volume_size, done.target_size) == (size, size + more)
    whole = tmp_path / "whole.raw"
    whole.write_bytes(truth.ljust(size + more, b"\0"))
    qemu.compare(target, whole, one_format="qcow2" if kind == "qcow2" else "raw")
    if kind == "qcow2":
        qemu.check(target)
        assert qemu.content(target, "kept") == there, "its internal snapshots stay as they were"


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_the_last_block_ends_where_the_target_does(repository: Repository, tmp_path: Path, kind: str) -> None:
    volume = qemu.create(tmp_path / "vol.qcow2", SIZE - 3 * 512)
    qemu.noise(volume, SIZE - 2 * BLOCK, 2 * BLOCK - 3 * 512)
    taken = repository.snapshot(volume)
    for more in (0, 512):
        target = tmp_path / f"target{more}"
        if kind == "qcow2":
            qemu.create(target, SIZE - 3 * 512 + more, cluster_size=512)
        else:
            target.write_bytes(b"x" * (SIZE - 3 * 512 + more))
        done = both(repository, taken.snapshot, target, kind)
        assert done.bytes_written == 2 * BLOCK - 3 * 512 + more
    qemu.compare(tmp_path / "target0", volume, one_format=kind, other_format="qcow2")


def test_only_what_differs_is_fetched_and_each_pack_once(
    repository: Repository, store: MemoryStore, image: Path
) -> None:
    """Of two packs of 8 blocks one block is fetched; into nothing, both packs whole and no index."""
    taken = repository.snapshot(image)
    qemu.noise(image, 3 * BLOCK, BLOCK, 2)
    repository.restore_onto(taken.snapshot, image, dry_run=True)  # the indexes are in the cache now
    store.calls.clear()
    before = store.received
    done = repository.restore_onto(taken.snapshot, image)
    assert (done.bytes_written, done.bytes_zeroed) == (BLOCK, 0)
    assert store.calls["get_ranges"] == 1
    assert store.received - before < 2 * BLOCK
    empty = qemu.create(image.with_name("empty.qcow2"), SIZE)
    store.calls.clear()
    done = repository.restore_onto(taken.snapshot, empty)
    assert (done.bytes_compared, done.bytes_written) == (0, 2 * PACK * BLOCK)
    assert done.objects_read == 1 + 2
    assert not store.calls["get_ranges"]


def test_zeros_take_no_space_in_the_target(repository: Repository, image: Path) -> None:
    taken = repository.snapshot(image)
    raw = image.with_name("full.raw")
    raw.write_bytes(os.urandom(SIZE))
    repository.restore_onto(taken.snapshot, raw, image_format="raw")
    assert raw.stat().st_blocks * 512 == 2 * PACK * BLOCK
    full = qemu.create(image.with_name("full.qcow2"), SIZE)
    qemu.noise(full, 0, SIZE, 7)
    repository.restore_onto(taken.snapshot, full)
    (data,) = [one for one in _map(full) if one["data"]]
    assert (data["start"], data["length"]) == (0, 2 * PACK * BLOCK)


def _map(path: Path) -> list[dict[str, int]]:
    found: list[dict[str, int]] = json.loads(
        qemu.run("qemu-img", "map", "-f", "qcow2", "--output=json", path)
    )
    return found


# The next snapshot.


def test_the_next_snapshot_after_going_back(repository: Repository, image: Path, tmp_path: Path) -> None:
    first = repository.snapshot(image)
    truth = qemu.content(image)
    qemu.noise(image, 3 * BLOCK, BLOCK, 2)
    qemu.noise(image, 100 * BLOCK, BLOCK, 2)
    second = repository.snapshot(image)
    latest = qemu.content(image)
    repository.restore_onto(first.snapshot, image)
    third = repository.snapshot(image)
    assert (third.rule, third.parent) == ("table-diff", second.snapshot)
    assert third.blocks_changed == 2
    check(repository, third.snapshot, truth, tmp_path)
    repository.restore_onto(second.snapshot, image)
    fourth = repository.snapshot(image)
    assert (fourth.rule, fourth.parent) == ("table-diff", third.snapshot)
    check(repository, fourth.snapshot, latest, tmp_path)
    check(repository, first.snapshot, truth, tmp_path)
    found = repository.verify(fourth.snapshot, against=image)
    assert found.damages == ()
    qemu.check(image)


def test_the_next_snapshot_where_the_newest_was_deleted(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    """Its pin is still in the image, and stands for its parent."""
    first = repository.snapshot(image)
    truth = qemu.content(image)
    qemu.noise(image, 0, 5 * BLOCK, 2)
    second = repository.snapshot(image)
    repository.delete([second.snapshot])
    repository.restore_onto(first.snapshot, image)
    third = repository.snapshot(image)
    assert (third.rule, third.parent) == ("table-diff", first.snapshot)
    check(repository, third.snapshot, truth, tmp_path)


def test_the_next_snapshot_of_a_mix(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot of what a restore has left half written is of that, and the restore can still go on."""
    first = repository.snapshot(image)
    truth = qemu.content(image)
    qemu.noise(image, 0, 30 * BLOCK, 2)
    second = repository.snapshot(image)
    latest = qemu.content(image)
    store.downloads = 1
    with monkeypatch.context() as patch:
        fail_after(1, patch, StoreError("the store is away"))
        with pytest.raises(StoreError):
            repository.restore_onto(first.snapshot, image)
    mix = qemu.content(image)
    assert mix not in (truth, latest)
    third = repository.snapshot(image)
    assert (third.rule, third.parent) == ("table-diff", second.snapshot)
    check(repository, third.snapshot, mix, tmp_path)
    check(repository, second.snapshot, latest, tmp_path)
    repository.restore_onto(first.snapshot, image)
    check(repository, repository.snapshot(image).snapshot, truth, tmp_path)


def test_the_next_snapshot_of_another_volumes_content(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    """An image stays the volume that its pin tells, whatever is written onto it."""
    other = qemu.create(tmp_path / "other.qcow2", SIZE)
    qemu.noise(other, BLOCK, 20 * BLOCK, 5)
    foreign = repository.snapshot(other)
    mine = repository.snapshot(image)
    repository.restore_onto(foreign.snapshot, image)
    after = repository.snapshot(image)
    assert (after.volume, after.parent, after.rule) == ("vol", mine.snapshot, "table-diff")
    check(repository, after.snapshot, qemu.content(other), tmp_path)


def test_the_next_snapshot_of_a_raw_image(repository: Repository, image: Path, tmp_path: Path) -> None:
    raw = qemu.convert(image, tmp_path / "raw.img", target_format="raw")
    first = repository.snapshot(raw, image_format="raw")
    truth = raw.read_bytes()
    raw.write_bytes(os.urandom(SIZE))
    repository.snapshot(raw, image_format="raw")
    repository.restore_onto(first.snapshot, raw, image_format="raw")
    third = repository.snapshot(raw, image_format="raw")
    check(repository, third.snapshot, truth, tmp_path)


# Ended early.


def fail_after(writes: int, patch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the store fail when so many packs were fetched."""
    real, left = MemoryStore.get, [writes]

    def get(store: MemoryStore, name: str, **how: Any) -> memoryview:
        if "/packs/" in name:
            left[0] -= 1
            if left[0] < 0:
                raise error
        return real(store, name, **how)

    patch.setattr(MemoryStore, "get", get)


@pytest.mark.parametrize(
    "error", [StoreError("the store is away"), KeyboardInterrupt()], ids=["error", "key"]
)
@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_what_ends_early_goes_on(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path, kind: str, error: BaseException,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    repository.snapshot(image)
    qemu.noise(image, 0, 2 * PACK * BLOCK, 5)
    qemu.noise(image, 50 * BLOCK, BLOCK, 5)
    taken = repository.snapshot(image)
    truth = qemu.content(image)
    target = tmp_path / "target"
    if kind == "qcow2":
        qemu.noise(qemu.create(target, SIZE), 5 * BLOCK, 40 * BLOCK, 6)
    else:
        target.write_bytes(os.urandom(SIZE))
    all_of_it = repository.restore_onto(taken.snapshot, target, image_format=kind, dry_run=True)
    store.downloads = 1
    with monkeypatch.context() as patch:
        fail_after(1, patch, error)
        with pytest.raises(type(error)):
            repository.restore_onto(taken.snapshot, target, image_format=kind)
    command = f"run 'island restore {taken.snapshot} --onto {target}{' --format raw' * (kind == 'raw')}'"
    assert (command in caplog.text) == isinstance(error, IslandError)
    if kind == "qcow2":
        qemu.check(target)  # which also shows that nobody holds it any more
    left = repository.restore_onto(taken.snapshot, target, image_format=kind)
    assert left.bytes_zeroed == 0
    assert 0 < left.bytes_written < all_of_it.bytes_written
    qemu.compare(target, image, one_format=kind, other_format="qcow2")
    assert qemu.content(image) == truth


def test_a_qemu_that_is_killed_in_the_middle(
    repository: Repository, store: MemoryStore, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = repository.snapshot(image)
    target = qemu.create(image.with_name("target.qcow2"), SIZE, lazy_refcounts="on")
    qemu.noise(target, BLOCK, 40 * BLOCK, 6)
    store.downloads = 1
    started: list[subprocess.Popen[bytes]] = []
    start, write = subprocess.Popen, target_module.ExistingImage.write

    def popen(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(start(*arguments, **options))
        return started[-1]

    def write_and_kill(self: target_module.ExistingImage, blocks: Any, rows: Any) -> None:
        write(self, blocks, rows)
        started[0].kill()
        started[0].wait()

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", popen)
        patch.setattr(target_module.ExistingImage, "write", write_and_kill)
        with pytest.raises(IslandError, match=f"{target} cannot be written by qemu-nbd"):
            repository.restore_onto(taken.snapshot, target)
    repository.restore_onto(taken.snapshot, target)
    qemu.check(target)
    qemu.compare(target, image, other_format="qcow2")


def test_a_file_system_without_holes(
    repository: Repository, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = repository.snapshot(image)
    raw = image.with_name("full.raw")
    raw.write_bytes(os.urandom(SIZE + 1000))
    monkeypatch.setattr(target_module, "punch_hole", lambda *_: False)
    done = both(repository, taken.snapshot, raw, "raw")
    assert done.bytes_zeroed == SIZE + 1000 - 2 * PACK * BLOCK
    assert raw.read_bytes() == qemu.content(image) + bytes(1000)


KILLED = r"""
import os, signal, sys
from island_fast.images import target as target_module
from island_fast.repository import pack_reader
from island_fast.api import Repository
url, target, image_format = sys.argv[1:]
pack_reader.BATCH = 8
real, left = target_module.ExistingImage.write, [3]
def write(self, blocks, rows):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, blocks, rows)
target_module.ExistingImage.write = write
with Repository.open(url) as repository:
    repository.restore_onto("vol@latest", target, image_format=image_format)
"""


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_what_was_killed_in_the_middle_goes_on(
    image: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, left_behind: None
) -> None:
    """A process that dies leaves no qemu-nbd behind, a qcow2 that is sound, and the rest to be written."""
    monkeypatch.setenv("ISLAND_STATE", str(tmp_path / "state"))
    qemu.noise(image, 0, 5 * PACK * BLOCK, 3)
    target = tmp_path / "target"
    if kind == "qcow2":
        qemu.snapshot_create(qemu.create(target, SIZE), "kept")
        qemu.noise(target, 2 * BLOCK, 60 * BLOCK, 6)
    else:
        target.write_bytes(os.urandom(SIZE))
    url = str(tmp_path / "repository")
    with Repository.open(url, create=True) as repository:
        repository.snapshot(image)
        all_of_it = repository.restore_onto("vol@latest", target, image_format=kind, dry_run=True)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, url, target, kind], cwd=ROOT, capture_output=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        deadline = time.monotonic() + 30
        while kind == "qcow2" and _in_use(target):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if kind == "qcow2":
            qemu.check(target)
        left = repository.restore_onto("vol@latest", target, image_format=kind)
    assert 0 < left.bytes_written < all_of_it.bytes_written
    assert left.bytes_zeroed == 0
    qemu.compare(target, image, one_format=kind, other_format="qcow2")


EARLY = r"""
import os, signal, sys, time
from island_fast.qemu import qemu_nbd
from island_fast.api import Repository
def die(image, process, where, said):
    while not where.exists():
        time.sleep(0.001)
    time.sleep(0.2)  # it opens the image
    os.kill(os.getpid(), signal.SIGKILL)
qemu_nbd._connect_client = die
with Repository.open(sys.argv[1]) as repository:
    repository.restore_onto("vol@latest", sys.argv[2])
"""


def test_what_was_killed_before_it_could_write(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_behind: None
) -> None:
    """A qemu-nbd that nobody has connected to yet ends with the process that has started it."""
    monkeypatch.setenv("ISLAND_STATE", str(tmp_path / "state"))
    url = str(tmp_path / "repository")
    with Repository.open(url, create=True) as repository:
        repository.snapshot(image)
    done = subprocess.run(
        [sys.executable, "-c", EARLY, url, image], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 30
    while _in_use(image):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _in_use(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return target_module.writer_present(fd)
    finally:
        os.close(fd)


def stand_in(folder: Path, patch: pytest.MonkeyPatch, script: str) -> None:
    """Have a shell script run as qemu-nbd."""
    folder.mkdir()
    program = folder / "qemu-nbd"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_qemu_that_fails_when_it_closes_the_image(
    repository: Repository, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    taken = repository.snapshot(image)
    target = qemu.create(tmp_path / "target.qcow2", SIZE)
    real = shutil.which("qemu-nbd")
    stand_in(tmp_path / "bin", monkeypatch, f'{real} "$@"; echo "qemu-nbd: the disk is gone" >&2; exit 1')
    with pytest.raises(IslandError, match=r"could not close .* may be half written: .*the disk is gone"):
        repository.restore_onto(taken.snapshot, target)
    assert f"run 'island restore {taken.snapshot} --onto {target}'" in caplog.text


def test_a_qemu_that_says_too_much_and_knows_no_credentials(
    repository: Repository, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = repository.snapshot(image)
    seen = tmp_path / "seen"
    monkeypatch.setenv("OS_PASSWORD", "secret")
    stand_in(
        tmp_path / "bin",
        monkeypatch,
        f"env >{seen}; echo first >&2; yes | head -c 3000000 >&2; echo the end >&2; exit 1",
    )
    texts = []
    monkeypatch.setattr(qemu_nbd, "error_text", lambda text: texts.append(text) or text[-300:])
    with pytest.raises(IslandError, match=r"(?s)could not open .* nothing was written: .*the end"):
        repository.restore_onto(taken.snapshot, image)
    assert texts[0].startswith("first\n")
    assert len(texts[0]) <= 2 * 4096
    names = {line.partition("=")[0] for line in seen.read_text().splitlines()}
    assert names <= {"PATH", "TMPDIR", "LC_ALL", "LD_LIBRARY_PATH", "PWD", "OLDPWD", "SHLVL", "_"}


@pytest.mark.parametrize("flags, what", [(os.O_RDONLY, "reading"), (os.O_RDWR, "writing")])
def test_a_target_that_cannot_be_opened_says_for_what(tmp_path: Path, flags: int, what: str) -> None:
    with pytest.raises(IslandError, match=f"none cannot be opened for {what}: .*; run as a user"):
        target_module._open_raw_target(tmp_path / "none", 9999, flags, False)


# What is refused.


def refused(repository: Repository, target: Path, error: type[IslandError], told: str, kind: str) -> None:
    """Both a dry run and a real one are refused by name, and the target is as it was."""
    before = target.read_bytes() if target.is_file() else b""
    for dry_run in (True, False):
        with pytest.raises(error, match=told) as caught:
            repository.restore_onto("vol@latest", target, image_format=kind, dry_run=dry_run)
        assert str(target) in str(caught.value)
    assert (target.read_bytes() if target.is_file() else b"") == before


@needs_storage_daemon
def test_a_qcow2_that_is_no_target(repository: Repository, image: Path, tmp_path: Path) -> None:
    repository.snapshot(image)
    small = qemu.create(tmp_path / "small.qcow2", SIZE - 512)
    refused(repository, small, RefusedError, "make it larger", "qcow2")
    with StorageDaemon(image):
        refused(repository, image, ImageInUseError, "open in another process", "qcow2")
    with StorageDaemon(image, read_only=True):
        refused(repository, image, ImageInUseError, "open in another process", "qcow2")
    with ImageLock(image):
        refused(repository, image, RefusedError, "another snapshot of image", "qcow2")
    over = tmp_path / "over.qcow2"
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", over)
    refused(repository, over, RefusedError, "backing file", "qcow2")
    corrupt = tmp_path / "corrupt.qcow2"
    shutil.copy(image, corrupt)
    with corrupt.open("r+b") as file:
        file.seek(79)  # the corrupt bit of the incompatible features
        file.write(b"\x02")
    refused(repository, corrupt, RefusedError, "marked corrupt", "qcow2")
    refused(repository, tmp_path, RefusedError, "not a regular file", "qcow2")
    refused(repository, tmp_path / "none", NotFoundError, "check the path", "qcow2")


@needs_storage_daemon
def test_a_raw_target_that_is_none(
    repository: Repository, image: Path, tmp_path: Path, loop: Callable[[Path], Path]
) -> None:
    repository.snapshot(image)
    small, raw = tmp_path / "small", tmp_path / "raw"
    small.write_bytes(bytes(SIZE - 1))
    refused(repository, small, RefusedError, "make it larger", "raw")
    refused(repository, tmp_path, RefusedError, "not a regular file", "raw")
    large = qemu.create(tmp_path / "large.qcow2", SIZE)
    os.truncate(large, SIZE)
    refused(repository, large, RefusedError, "begins as a qcow2", "raw")
    raw.write_bytes(os.urandom(SIZE))
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", raw], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin
        assert holder.stdout
        holder.stdin.write(b"length\n")
        holder.stdin.flush()
        holder.stdout.readline()
        refused(repository, raw, ImageInUseError, "open in another process", "raw")
        holder.stdin.close()
    device = loop(raw)
    refused(repository, raw, ImageInUseError, "detach that first", "raw")
    link = tmp_path / "link"
    link.hardlink_to(raw)
    refused(repository, link, ImageInUseError, "detach that first", "raw")
    raw.unlink()
    refused(repository, link, ImageInUseError, "detach that first", "raw")
    refused(repository, device, RefusedError, "give --format raw", "qcow2")
    held = os.open(device, os.O_RDONLY | os.O_EXCL)
    try:
        refused(repository, device, ImageInUseError, "unmount it first", "raw")
    finally:
        os.close(held)


def test_a_raw_volume_in_which_a_guest_wrote_a_qcow2(repository: Repository, tmp_path: Path) -> None:
    """Its first bytes are data like any other, and an attempt after the first can go on."""
    raw = tmp_path / "disk.raw"
    inner = qemu.create(tmp_path / "inner.qcow2", SIZE).read_bytes()
    raw.write_bytes(inner.ljust(SIZE, b"\0"))
    taken = repository.snapshot(raw, image_format="raw")
    truth = raw.read_bytes()
    target = tmp_path / "target.raw"
    target.write_bytes(os.urandom(SIZE))
    both(repository, taken.snapshot, target, "raw")
    assert target.read_bytes() == truth


HOLDER = "import os, sys; os.open(sys.argv[1], int(sys.argv[2])); print(flush=True); sys.stdin.read()"


@contextmanager
def held_open(path: Path, flags: int) -> Iterator[int]:
    """Another process has the file open; its id."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path, str(flags)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin
        assert holder.stdout
        holder.stdout.readline()
        yield holder.pid
        holder.stdin.close()


def test_a_device_that_is_open_by_another_node(
    repository: Repository, image: Path, tmp_path: Path, loop: Callable[[Path], Path]
) -> None:
    """As by a qemu of libvirt's, whose /dev is its own: no lock on the node tells of it."""
    repository.snapshot(image)
    raw = tmp_path / "raw"
    raw.write_bytes(os.urandom(SIZE))
    device = loop(raw)
    number = os.stat(device).st_rdev
    other = tmp_path / "other"
    os.mknod(other, 0o600 | stat.S_IFBLK, number)
    try:
        os.close(os.open(other, os.O_RDONLY))
    except PermissionError:
        pytest.skip("the file system of temporary files is mounted with nodev")
    before = device.read_bytes()
    with held_open(other, os.O_RDWR) as pid:
        refused(repository, device, ImageInUseError, f"open in process {pid}", "raw")
        with pytest.raises(ImageInUseError, match=f"open in process {pid}"):
            repository.snapshot(device, image_format="raw")
    with held_open(other, os.O_RDONLY) as pid:
        refused(repository, device, ImageInUseError, f"open in process {pid}", "raw")
        assert device.read_bytes() == before
        repository.snapshot(device, image_format="raw")
    both(repository, "vol@latest", device, "raw")


def test_a_raw_file_that_another_program_writes_to(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    repository.snapshot(image)
    raw = tmp_path / "raw"
    raw.write_bytes(os.urandom(SIZE))
    with held_open(raw, os.O_WRONLY) as pid:
        refused(repository, raw, ImageInUseError, f"open in process {pid}", "raw")
    with held_open(raw, os.O_RDONLY):
        both(repository, "vol@latest", raw, "raw")


def test_a_target_that_is_opened_while_it_is_compared(
    repository: Repository, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.snapshot(image)
    raw = tmp_path / "raw"
    raw.write_bytes(os.urandom(SIZE))
    before = raw.read_bytes()
    compare = restore._compare_target
    with ExitStack() as stack:

        def opened_meanwhile(*arguments: Any) -> Any:
            plan = compare(*arguments)
            stack.enter_context(held_open(raw, os.O_WRONLY))
            return plan

        monkeypatch.setattr(restore, "_compare_target", opened_meanwhile)
        with pytest.raises(ImageInUseError, match="open in process"):
            repository.restore_onto("vol@latest", raw, image_format="raw")
    assert raw.read_bytes() == before


def test_damage_in_an_index_is_found_before_anything_is_written(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    taken = repository.snapshot(image)
    qemu.noise(image, 0, SIZE, 9)
    for name, stored in store.objects.items():
        if "/packs/" in name:
            store.objects[name] = type(stored)(bytes(len(stored.data)), stored.at)
    before = image.read_bytes()
    with pytest.raises(DamagedObjectError):
        Repository(store, LocalState(tmp_path / "other")).restore_onto(taken.snapshot, image, dry_run=True)
    with pytest.raises(DamagedObjectError):
        Repository(store, LocalState(tmp_path / "other")).restore_onto(taken.snapshot, image)
    assert image.read_bytes() == before
