"""Opening images, and images that lie: one clear sentence, never a wrong byte."""

import os
import struct

import numpy as np
import pytest

from island_fast.dirtymap import BLOCK_SIZE
from island_fast.errors import (
    DamagedImageError,
    IslandError,
    NotFoundError,
    RefusedError,
    UnsupportedImageError,
)
from island_fast.qcow2.block_reader import PointReader
from island_fast.qcow2.changes import count_shared_copied, find_allocated, find_changed
from island_fast.qcow2.image import Image
from tests.support import qemu

COPIED = 1 << 63


@pytest.fixture
def image_path(tmp_path):
    """64 KiB clusters, blocks 0 to 31 hold data, one internal snapshot, then block 3 changed."""
    path = qemu.create(tmp_path / "a.qcow2", 1 << 30)
    qemu.io(path, qemu.write(0, 2 << 20, 5))
    qemu.snapshot_create(path, "one")
    qemu.io(path, qemu.write(3 << 16, 65536, 6))
    return path


def u64(path, offset):
    return struct.unpack(">Q", path.read_bytes()[offset : offset + 8])[0]


def put64(path, offset, value):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(">Q", value))


def table_of(path):
    """Where the active L1 and its first L2 table are."""
    l1 = u64(path, 40)
    return l1, u64(path, l1) & 0x00FFFFFFFFFFFE00


def read(path, blocks=32):
    with Image.open(path) as image:
        out = np.full((blocks, BLOCK_SIZE), 0xEE, np.uint8)
        PointReader(image, image.active_point()).read(np.arange(blocks), out)
        return out


@pytest.mark.parametrize("content", [b"", b"Q", b"QFI\xfb", b"raw data" * 100, b"QFI\xfb\0\0\0\3"])
def test_not_an_image(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    expected = DamagedImageError if content.startswith(b"QFI\xfb") else UnsupportedImageError
    with pytest.raises(expected) as caught:
        Image.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_pipe_directory_and_device(tmp_path):
    with pytest.raises(NotFoundError, match="no image"):
        Image.open(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(RefusedError, match="not a regular file"):
            Image.open(path)
    with pytest.raises(IslandError, match="cannot open"):
        Image.open(tmp_path / ("n" * 300))


def test_refused_images_leave_no_descriptor_open(tmp_path):
    (tmp_path / "x").write_bytes(b"nothing")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UnsupportedImageError):
        Image.open(tmp_path / "x")
    assert len(os.listdir("/proc/self/fd")) == before


def test_descriptor_is_read_only_and_not_inherited(image_path):
    image = Image.open(image_path)
    assert not os.get_inheritable(image.fd)
    with pytest.raises(OSError):
        os.write(image.fd, b"x")
    image.close()
    image.close()
    assert image.fd == -1


@qemu.needs_qemu
@pytest.mark.parametrize(
    "options, words",
    [
        ({"data_file": "data.raw"}, "external data file"),
        ({"encrypt.format": "aes", "encrypt.key-secret": "k"}, "AES"),
        ({"backing_file": "base.qcow2", "backing_fmt": "qcow2"}, "backing file \\('base.qcow2'\\)"),
    ],
)
def test_what_qemu_makes_and_we_do_not_read(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    qemu.create("base.qcow2", 1 << 20)
    extra = ["-o", ",".join(f"{k}={v}" for k, v in options.items())]
    secret = ["--object", "secret,id=k,data=x"] if "encrypt.format" in options else []
    qemu.run(qemu.QEMU_IMG, "create", "-q", *secret, "-f", "qcow2", *extra, "x", 1 << 20)
    with pytest.raises(UnsupportedImageError, match=words):
        Image.open("x")


@qemu.needs_qemu
@pytest.mark.parametrize("keep", [65536, 70000, 3 << 16, (5 << 16) + 8, 0x60000])
def test_cut_image_is_refused_where_qemu_reads_zeros(image_path, keep):
    os.truncate(image_path, keep)
    with pytest.raises(DamagedImageError) as caught:
        read(image_path)
    assert str(image_path) in str(caught.value)


@qemu.needs_qemu
def test_last_cluster_may_be_cut(image_path):
    _, l2 = table_of(image_path)
    last = max(u64(image_path, l2 + 8 * n) & ~COPIED for n in range(32))
    os.truncate(image_path, last + 1000)
    row = next(n for n in range(32) if u64(image_path, l2 + 8 * n) & ~COPIED == last)
    out = read(image_path)
    assert np.all(out[row, :1000] != 0)
    assert np.all(out[row, 1000:] == 0)
    os.truncate(image_path, last)
    with pytest.raises(DamagedImageError):
        read(image_path)


@qemu.needs_qemu
@pytest.mark.parametrize("keep", [0x30000, 0x60000, 0x100000, 0x1FFFFF])
@pytest.mark.parametrize("old", [False, True], ids=["volume", "snapshot"])
def test_file_that_shrinks_while_it_is_open(image_path, keep, old):
    with Image.open(image_path) as image:
        # The snapshot's L2 table comes before its data, the volume's new one after it.
        reader = PointReader(image, image.point_at(image.snapshots[0]) if old else image.active_point())
        os.truncate(image_path, keep)
        with pytest.raises(DamagedImageError, match="cut"):
            reader.read(np.arange(32), np.empty((32, BLOCK_SIZE), np.uint8))


@qemu.needs_qemu
@pytest.mark.parametrize("cluster", [512, 4096, 65536, 2 << 20])
def test_bytes_behind_the_end_of_the_volume_are_not_shown(tmp_path, cluster):
    size = BLOCK_SIZE + 1536
    path = qemu.create(tmp_path / "a", 4 << 20, cluster_size=cluster)
    qemu.io(path, qemu.write(0, 4 << 20, 7))
    # A smaller size in the header alone: tables and clusters go on behind it.
    put64(path, 24, size)
    out = read(path, 2).reshape(-1)
    assert np.all(out[:size] == 7)
    assert not out[size:].any()
    if cluster < BLOCK_SIZE:
        behind = -(-size // cluster)
        l1, _ = table_of(path)
        table = u64(path, l1 + 8 * (behind // (cluster // 8))) & 0x00FFFFFFFFFFFE00
        put64(path, table + 8 * (behind % (cluster // 8)), 1 << 40)
        assert np.array_equal(read(path, 2).reshape(-1), out)


BAD_L1 = [
    0x60200, 1 << 40, 0x00FFFFFFFFFF0000, 0x4000000000060000, 0x60001, 0x7FFFFFFFFFFFFFFF,
]  # fmt: skip


@qemu.needs_qemu
@pytest.mark.parametrize("entry", [*BAD_L1, *(COPIED | e for e in BAD_L1)], ids=hex)
def test_bad_l1_entries(image_path, entry):
    l1, _ = table_of(image_path)
    put64(image_path, l1 + 8, entry)
    with Image.open(image_path) as image:
        active, one = image.active_point(), image.point_at(image.snapshots[0])
        for use in (
            lambda: find_allocated(image, active),
            lambda: find_changed(image, one, active),
            lambda: count_shared_copied(image, active, one),
            lambda: PointReader(image, active),
        ):
            with pytest.raises(DamagedImageError, match="L1 entry 1 of the volume"):
                use()


@qemu.needs_qemu
def test_l1_entries_behind_the_volume_are_not_looked_at(image_path):
    l1, _ = table_of(image_path)
    put64(image_path, l1 + 8, 1 << 40)
    put64(image_path, 24, 512 << 20)
    with Image.open(image_path) as image:
        active, one = image.active_point(), image.point_at(image.snapshots[0])
        assert find_allocated(image, active).count() == 32
        assert 3 in find_changed(image, one, active).map
        assert count_shared_copied(image, active, one) == 0
    assert np.all(read(image_path)[0] == 5)


@qemu.needs_qemu
def test_two_l1_entries_with_one_table(image_path):
    l1, l2 = table_of(image_path)
    put64(image_path, l1 + 8, l2)
    with Image.open(image_path) as image, pytest.raises(DamagedImageError, match="share one"):
        find_allocated(image, image.active_point())


BAD_L2 = [
    0x60200, 1 << 40, 0x00FFFFFFFFFF0000, 0x00FFFFFFFFFF0001, 0x60201, (1 << 62) | 1 << 50,
    0x7FFFFFFFFFFFFFFF,
]  # fmt: skip


@qemu.needs_qemu
@pytest.mark.parametrize("entry", [*BAD_L2, *(COPIED | e for e in BAD_L2)], ids=hex)
def test_bad_l2_entries(image_path, entry):
    _, l2 = table_of(image_path)
    put64(image_path, l2 + 8 * 7, entry)
    with pytest.raises(DamagedImageError, match="cluster 7 in the volume"):
        read(image_path)


@qemu.needs_qemu
def test_zero_flag_in_version_2(tmp_path):
    path = qemu.create(tmp_path / "a", 1 << 20, compat="0.10")
    qemu.io(path, qemu.write(0, 65536, 1))
    _, l2 = table_of(path)
    put64(path, l2 + 8, 1)
    with pytest.raises(DamagedImageError, match="cluster 1"):
        read(path, 16)


@qemu.needs_qemu
def test_compressed_garbage(tmp_path):
    path = qemu.create(tmp_path / "a", 1 << 20)
    qemu.io(path, qemu.write(0, 65536, 1, compressed=True))
    _, l2 = table_of(path)
    at = u64(path, l2) & (1 << 54) - 1
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 40)
    with pytest.raises(DamagedImageError, match=f"compressed cluster at {at} does not decode"):
        read(path, 16)


@qemu.needs_qemu
def test_bad_snapshot_tables(image_path):
    at = u64(image_path, 64)
    put64(image_path, at, 0x60200)
    with Image.open(image_path) as image, pytest.raises(DamagedImageError, match="snapshot 'one'"):
        image.point_at(image.snapshots[0])
    put64(image_path, at, u64(image_path, 40))
    with open(image_path, "r+b") as file:
        file.seek(at + 8)
        file.write(b"\xff\xff\xff\xff")
    with Image.open(image_path) as image, pytest.raises(DamagedImageError, match="over the limit"):
        image.point_at(image.snapshots[0])
    with open(image_path, "r+b") as file:
        file.seek(at + 8)
        file.write(b"\0\0\0\0")
        file.seek(at + 40 + 8)
        file.write(b"\x7f" + b"\xff" * 7)
    with Image.open(image_path) as image, pytest.raises(UnsupportedImageError, match="64 TiB"):
        image.point_at(image.snapshots[0])


@qemu.needs_qemu
def test_short_snapshot_l1_means_unallocated(image_path):
    at = u64(image_path, 64)
    with open(image_path, "r+b") as file:
        file.seek(at + 8)
        file.write(b"\0\0\0\0")
    with Image.open(image_path) as image:
        one = image.point_at(image.snapshots[0])
        out = np.ones((2, BLOCK_SIZE), np.uint8)
        PointReader(image, one).read(np.array([0, 16383]), out)
        assert not out.any()
        assert find_changed(image, one, image.active_point()).map.indices().tolist() == list(range(32))


@qemu.needs_qemu
def test_corrupt_bit_is_readable_and_told(image_path):
    with open(image_path, "r+b") as file:
        file.seek(79)
        file.write(b"\3")
    with Image.open(image_path) as image:
        assert image.header.corrupt
        assert image.header.dirty
    assert read(image_path).any()


@qemu.needs_qemu
def test_shared_and_yet_copied_entries_are_counted(image_path):
    l1, l2 = table_of(image_path)
    with Image.open(image_path) as image:
        active, one = image.active_point(), image.point_at(image.snapshots[0])
        assert count_shared_copied(image, active, one) == 0
        for block in (0, 31):
            put64(image_path, l2 + 8 * block, u64(image_path, l2 + 8 * block) | COPIED)
        assert count_shared_copied(image, active, one) == 2
        assert find_changed(image, one, active).shared_copied == 2
        # The same table under both, and marked as if only the volume had it.
        put64(image_path, l1, u64(image_path, one.l1_offset) | COPIED)
        assert count_shared_copied(image, active, one) == 1


@qemu.needs_qemu
def test_blocks_must_ascend_inside_the_volume(image_path):
    with Image.open(image_path) as image:
        reader = PointReader(image, image.active_point())
        out = np.empty((2, BLOCK_SIZE), np.uint8)
        for blocks in ([1, 1], [2, 1], [-1, 0], [0, 1 << 14], [0, 1 << 60]):
            with pytest.raises(ValueError):
                reader.read(np.array(blocks), out)
        with pytest.raises(ValueError):
            reader.read(np.arange(3), out)
        with pytest.raises(ValueError):
            reader.read(np.arange(2), np.empty((2, 2 * BLOCK_SIZE), np.uint8)[:, ::2])
        reader.read(np.empty(0, np.int64), np.empty((0, BLOCK_SIZE), np.uint8))
