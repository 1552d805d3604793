"""A table diff only where it is sound: each condition broken gives a full scan, its reason, right data."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.qcow2.image import Image
from island_fast.repository.local_state import LocalState
from island_fast.results import SnapshotTaken
from tests.operations.conftest import let_any_image_in
from tests.support import qemu
from tests.support.memory_store import MemoryStore

MIB = 1 << 20
COPIED = 1 << 63


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "vol.qcow2", 16 * MIB, lazy_refcounts="on")
    qemu.io(path, qemu.write(0, 2 * MIB, 1), qemu.write(8 * MIB, MIB, 2))
    return path


def snapshot_and_check(repository: Repository, image: Path, folder: Path) -> SnapshotTaken:
    """A snapshot of the image, which must restore to what qemu reads."""
    taken = repository.snapshot(image, volume="vol")
    target = folder / "check.raw"
    repository.restore(taken.snapshot, target, image_format="raw")
    assert target.read_bytes() == qemu.content(image)
    target.unlink()
    return taken


def patch(path: Path, offset: int, layout: str, change: Callable[[int], int]) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        (value,) = struct.unpack(layout, file.read(struct.calcsize(layout)))
        file.seek(offset)
        file.write(struct.pack(layout, change(value)))


def pin_entry(path: Path) -> int:
    """Where the first entry of the snapshot table is."""
    data = path.read_bytes()[:72]
    return int(struct.unpack_from(">Q", data, 64)[0])


IDENTITY = {
    "seconds": (16, ">I", lambda v: v + 1),
    "nanoseconds": (20, ">I", lambda v: v ^ 1),
    "disk size": (48, ">Q", lambda v: v + 65536),
    "id": (56, "B", lambda v: v + 1),  # in the test below, where the id begins
}


@pytest.mark.parametrize("field", IDENTITY)
def test_a_base_with_another_identity_is_not_the_base(
    field: str, repository: Repository, image: Path, tmp_path: Path
) -> None:
    repository.snapshot(image)
    offset, layout, change = IDENTITY[field]
    entry = pin_entry(image)
    if field == "id":
        offset = 40 + struct.unpack_from(">I", image.read_bytes(), entry + 36)[0]
    patch(image, entry + offset, layout, change)
    qemu.io(image, qemu.write(MIB, MIB, 9))
    taken = snapshot_and_check(repository, image, tmp_path)
    assert taken.rule == "full-scan"
    assert "pinned base" in taken.reason
    assert taken.blocks_changed == 16


def test_an_entry_that_is_copied_and_yet_shared_is_noticed(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    """The evidence of a writer that changed a pinned cluster in place."""
    repository.snapshot(image)
    qemu.io(image, qemu.write(15 * MIB, 65536, 3))  # now the active L2 table is its own
    with Image.open(image) as opened:
        table = int(opened.read_l1(opened.active_point())[0]) & ((1 << 56) - 512)
    patch(image, table, ">Q", lambda entry: entry | COPIED)
    taken = repository.snapshot(image)
    assert taken.rule == "full-scan"
    assert "writable in place" in taken.reason


def test_an_l1_entry_that_is_copied_and_yet_shared_is_noticed(repository: Repository, image: Path) -> None:
    repository.snapshot(image)
    l1 = struct.unpack_from(">Q", image.read_bytes(), 40)[0]
    patch(image, l1, ">Q", lambda entry: entry | COPIED)
    taken = repository.snapshot(image)
    assert (taken.rule, "writable in place" in taken.reason) == ("full-scan", True)


def test_a_corrupt_image_is_scanned(repository: Repository, image: Path) -> None:
    """qemu opens such an image read-only, so it is stored as it is, without a new pin."""
    repository.snapshot(image)
    patch(image, 72, ">Q", lambda features: features | 2)
    taken = repository.snapshot(image, pin=False)
    assert taken.rule == "full-scan"


def test_a_resize_stays_a_table_diff(repository: Repository, image: Path, tmp_path: Path) -> None:
    repository.snapshot(image)
    for size in (24 * MIB, 9 * MIB, 12 * MIB + 512):
        qemu.run("qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", image, size)
        taken = snapshot_and_check(repository, image, tmp_path)
        assert (taken.rule, taken.volume_size) == ("table-diff", size)


def test_a_revert_stays_a_table_diff(repository: Repository, image: Path, tmp_path: Path) -> None:
    qemu.snapshot_create(image, "before")
    repository.snapshot(image)
    qemu.io(image, qemu.write(0, MIB, 7))
    repository.snapshot(image)
    qemu.snapshot_apply(image, "before")
    qemu.io(image, qemu.write(4 * MIB, 65536, 7))
    taken = snapshot_and_check(repository, image, tmp_path)
    assert taken.rule == "table-diff"
    assert taken.blocks_changed == 17


def test_a_restored_and_a_copied_file_stay_table_diffs(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    first = repository.snapshot(image)
    restored, copied = tmp_path / "restored.qcow2", tmp_path / "copied.qcow2"
    repository.restore(first.snapshot, restored)
    qemu.run("cp", image, copied)
    for path in (restored, copied):
        let_any_image_in(repository)
        qemu.io(path, qemu.write(3 * MIB, 65536, 4))
        taken = snapshot_and_check(repository, path, tmp_path)
        assert (taken.rule, taken.parent, taken.blocks_candidate) == ("table-diff", first.snapshot, 1)


def test_internal_snapshots_of_others_may_come_and_go(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    repository.snapshot(image)
    qemu.snapshot_create(image, "users")
    qemu.io(image, qemu.write(0, MIB, 7))
    assert snapshot_and_check(repository, image, tmp_path).blocks_changed == 16
    qemu.snapshot_delete(image, "users")
    qemu.io(image, qemu.write(MIB, MIB, 7))
    taken = snapshot_and_check(repository, image, tmp_path)
    assert (taken.rule, taken.blocks_changed) == ("table-diff", 16)


def test_a_raw_image_is_scanned_and_sends_only_what_differs(repository: Repository, tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"\1" * MIB)
    with open(raw, "r+b") as file:
        file.truncate(9 * MIB + 5)
        file.seek(8 * MIB)
        file.write(b"\2" * 100)
    first = repository.snapshot(raw, image_format="raw")
    again = repository.snapshot(raw, image_format="raw")
    assert (first.blocks_changed, again.blocks_changed, again.objects_written) == (17, 0, 2)
    with open(raw, "r+b") as file:
        file.seek(4096)
        file.write(b"\3")
    third = repository.snapshot(raw, image_format="raw")
    assert (third.rule, third.blocks_changed, third.parent) == ("full-scan", 1, again.snapshot)
    assert "raw" in third.reason
    assert third.bytes_read < 2 * MIB, "holes are not read"
    target = tmp_path / "back.raw"
    repository.restore(third.snapshot, target, image_format="raw")
    assert target.read_bytes() == raw.read_bytes()


def test_a_raw_image_asks_the_store_for_no_data(tmp_path: Path) -> None:
    """Unchanged blocks are known by the digests in the packs' indexes, cached here or fetched."""
    store = MemoryStore()
    raw = tmp_path / "disk.raw"
    raw.write_bytes(random.Random(1).randbytes(4 * MIB))
    Repository(store, LocalState(tmp_path / "one"), create=True).snapshot(raw, image_format="raw")
    for state, index_reads in (("one", 0), ("two", 1)):
        repository = Repository(store, LocalState(tmp_path / state))
        repository.adopt("disk")
        store.calls.clear()
        store.received = 0
        taken = repository.snapshot(raw, volume="disk", image_format="raw")
        assert (taken.blocks_candidate, taken.blocks_changed) == (64, 0)
        assert store.calls["get_ranges"] == index_reads
        assert store.received < 65536


@pytest.mark.parametrize("cluster_size", [4096, 65536, 2 * MIB])
def test_a_rewritten_cluster_sends_the_blocks_that_differ(
    cluster_size: int, repository: Repository, tmp_path: Path
) -> None:
    image = qemu.create(tmp_path / "large.qcow2", 16 * MIB, cluster_size=cluster_size, lazy_refcounts="on")
    qemu.io(image, qemu.write(0, 8 * MIB, 1))
    repository.snapshot(image, volume="vol")
    qemu.io(image, qemu.write(3 * MIB + 100, 10, 2))
    taken = snapshot_and_check(repository, image, tmp_path)
    assert (taken.rule, taken.blocks_changed) == ("table-diff", 1)
    assert taken.blocks_candidate == max(1, cluster_size // 65536)


def loop_device(path: Path) -> str:
    """A loop device over a file; skips where the kernel or the user has none."""
    done = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop device to be had: {done.stderr.strip()}")
    return done.stdout.strip()


def test_a_block_device_is_a_raw_image(repository: Repository, tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(random.Random(2).randbytes(2 * MIB) + bytes(2 * MIB))
    device = loop_device(raw)
    try:
        first = repository.snapshot(device, volume="vol", image_format="raw")
        assert (first.volume_size, first.blocks_changed) == (4 * MIB, 32)
        with open(device, "r+b") as file:
            file.seek(3 * MIB)
            file.write(b"x" * 512)
        second = repository.snapshot(device, volume="vol", image_format="raw")
        assert second.blocks_changed == 1
        target = tmp_path / "back.raw"
        repository.restore(second.snapshot, target, image_format="raw")
        assert target.read_bytes() == raw.read_bytes()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
