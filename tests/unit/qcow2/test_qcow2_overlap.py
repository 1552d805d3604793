"""Places in the file: what meets a table, what a file can hold; and images that claim more."""

import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from island_fast.dirtymap import BLOCK_SIZE, merge_intervals
from island_fast.errors import DamagedImageError, UnsupportedImageError
from island_fast.qcow2.block_reader import PointReader
from island_fast.qcow2.changes import find_allocated, find_changed
from island_fast.qcow2.header import parse_header
from island_fast.qcow2.image import Image
from island_fast.qcow2.overlap import Claims, overlaps, table_spans
from tests.support import qemu
from tests.support.handmade import header

GIB = 1 << 30


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=6),
    st.lists(st.integers(0, 70), max_size=9),
    st.integers(1, 12),
)
def test_meets_as_one_by_one(spans, offsets, length):
    rows = merge_intervals(np.array([(start, start + size) for start, size in spans], np.int64))
    taken = {byte for start, size in spans for byte in range(start, start + size)}
    wanted = [bool(taken & set(range(offset, offset + length))) for offset in offsets]
    assert overlaps(np.array(offsets, np.int64), length, rows).tolist() == wanted


def test_spans_of_all_tables():
    parsed = parse_header(header(snapshots=2000, snapshots_offset=0x50000), 1 << 20)
    # Header and reference counts touch; 2000 entries of at least 40 bytes take two clusters.
    spans = table_spans(parsed, 0x80000, 9000)
    assert spans.tolist() == [[0, 0x20000], [0x30000, 0x40000], [0x50000, 0x70000], [0x80000, 0xA0000]]
    assert len(table_spans(parsed, (1 << 64) - 65536, 0)) == 3


def test_claims():
    parsed = parse_header(header(), 1 << 20)
    # 1 GiB of file: 16384 clusters, one that reaches past its end, and the slack of 64.
    assert Claims(parsed, GIB, GIB).add(16384 + 65, 0)
    assert not Claims(parsed, GIB, GIB).add(16384 + 66, 0)
    # All in a hole: no byte to hold a compressed stream, but what the slack allows.
    fits = (4 << 20) * 1032 // 65536
    assert Claims(parsed, GIB, 0).add(fits, fits)
    assert not Claims(parsed, GIB, 0).add(fits + 1, fits + 1)
    claims = Claims(parsed, GIB, GIB)
    assert claims.add(16000, 0)
    assert not claims.add(16000, 0)


def put64(path, offset, value):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(">Q", value))


@qemu.needs_qemu
@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_what_compresses_best_is_still_read(tmp_path, kind):
    (tmp_path / "raw").write_bytes(b"\1" * (200 << 20))
    path = qemu.convert(
        tmp_path / "raw", tmp_path / "image", source_format="raw", compress=True, compression_type=kind,
        cluster_size=2 << 20,
    )  # fmt: skip
    with Image.open(path) as image:
        assert image.file_size < 13 << 20
        assert find_allocated(image, image.active_point()).count() == 3200


@qemu.needs_qemu
@pytest.mark.parametrize("kind", ["normal", "zlib", "zstd"])
def test_a_small_file_does_not_become_terabytes(tmp_path, kind):
    """2 MiB of entries of one cluster: 512 GiB if they were believed."""
    packed = kind != "normal"
    options = {"compression_type": kind} if packed else {}
    path = qemu.create(tmp_path / "a", 512 << 30, cluster_size=2 << 20, **options)
    qemu.io(path, qemu.write(0, 2 << 20, 1, compressed=packed))
    with open(path, "r+b") as file:
        data = file.read(4 << 20)
        l1 = struct.unpack_from(">Q", data, 40)[0]
        file.seek(l1)
        l2 = struct.unpack(">Q", file.read(8))[0] & ~(1 << 63)
        file.seek(l2)
        entry = file.read(8)
        file.seek(l2)
        file.write(entry * (256 << 10))
    with Image.open(path) as image, pytest.raises(UnsupportedImageError, match="claim more data than a file"):
        find_allocated(image, image.active_point())


@qemu.needs_qemu
def test_a_zero_flag_in_version_2_is_damage_for_the_tables_too(tmp_path):
    path = qemu.create(tmp_path / "a", 1 << 20, compat="0.10")
    qemu.io(path, qemu.write(0, 65536, 1))
    qemu.snapshot_create(path, "one")
    qemu.io(path, qemu.write(0, 65536, 2))
    with Image.open(path) as image:
        active, one = image.active_point(), image.point_at(image.snapshots[0])
        put64(path, int(image.read_l1(active)[0]) & ~(1 << 63) | 8, 1)
        for use in (lambda: find_allocated(image, active), lambda: find_changed(image, one, active)):
            with pytest.raises(DamagedImageError, match="zero flag, which version 2"):
                use()


@qemu.needs_qemu
@pytest.mark.parametrize("cluster_bits", [16, 21])
def test_a_volume_of_64_tib(tmp_path, cluster_bits):
    size, cluster = 64 << 40, 1 << cluster_bits
    path = qemu.create(tmp_path / "a", size, cluster_size=cluster)
    for offset in (0, (40 << 40) + 512, size - 512):
        qemu.io(path, qemu.write(offset, 512, 7))
    with Image.open(path) as image:
        point = image.active_point()
        found = find_allocated(image, point)
        per_cluster = cluster // BLOCK_SIZE
        assert point.blocks == size // BLOCK_SIZE
        assert found.count() == 3 * per_cluster
        blocks = np.array([0, (40 << 40) // BLOCK_SIZE, point.blocks - 1])
        out = np.ones((3, BLOCK_SIZE), np.uint8)
        PointReader(image, point).read(blocks, out)
        assert [np.flatnonzero(row).tolist() for row in out] == [
            list(range(512)), list(range(512, 1024)), list(range(BLOCK_SIZE - 512, BLOCK_SIZE)),
        ]  # fmt: skip
    assert os.stat(path).st_blocks * 512 < 64 << 20
