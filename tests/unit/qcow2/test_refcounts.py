"""Whether reference counts leave room for a pin: known before qemu fails, in every width that qcow2 has."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from island_fast.qcow2.image import Image
from island_fast.qcow2.refcounts import reason_no_room
from tests.support import qemu

MIB = 1 << 20

pytestmark = qemu.needs_qemu


def has_room(path: Path) -> bool:
    with Image.open(path) as image:
        return reason_no_room(image) is None


@pytest.mark.parametrize("bits, most", [(1, 0), (2, 2), (4, 14)])
@pytest.mark.parametrize("cluster", [512, 65536])
def test_the_last_snapshot_that_fits_is_the_last_that_is_tried(
    tmp_path: Path, bits: int, most: int, cluster: int
) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 4 * MIB, refcount_bits=bits, cluster_size=cluster)
    qemu.io(path, qemu.write(MIB, 70000, 1))
    for number in range(most):
        assert has_room(path)
        qemu.snapshot_create(path, f"s{number}")
    assert not has_room(path)
    with pytest.raises(AssertionError, match="Invalid argument"):
        qemu.snapshot_create(path, "one more")


def test_compressed_clusters_that_share_one_count_together(tmp_path: Path) -> None:
    source = qemu.create(tmp_path / "source.qcow2", 16 * MIB)
    qemu.io(source, qemu.write(0, 16 * MIB, 1))
    path = qemu.convert(source, tmp_path / "disk.qcow2", compress=True, refcount_bits=8, cluster_size=65536)
    assert not has_room(path), "qemu puts as many clusters into one as its count takes"
    with pytest.raises(AssertionError, match="Invalid argument"):
        qemu.snapshot_create(path, "one")


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_wide_counts_are_not_read(tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 4 * MIB, refcount_bits=bits)
    monkeypatch.setattr("island_fast.qcow2.refcounts._highest_count", None)
    assert has_room(path)


def test_a_hostile_table_of_counts_costs_no_more_than_the_file(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 4 * MIB, refcount_bits=1)
    data = bytearray(path.read_bytes())
    (table,) = struct.unpack_from(">Q", data, 48)
    data[table : table + 65536] = struct.pack(">Q", (1 << 63) + (1 << 40)) * 8192
    struct.pack_into(">Q", data, table, 1 << 62)
    path.write_bytes(data)
    reads: list[int] = []
    with Image.open(path) as image:
        real = image.read
        image.read = lambda offset, length: reads.append(length) or real(offset, length)  # type: ignore[assignment, func-returns-value]
        assert reason_no_room(image) is None
    assert sum(reads) <= path.stat().st_size


@pytest.mark.parametrize("where", ["one place", "holes"])
def test_a_small_file_that_claims_to_be_huge_costs_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Its table names a block of counts for each 16 MiB of 8 TiB: one for all, or ones not stored."""
    image = qemu.create(tmp_path / "huge.qcow2", 1 << 20, refcount_bits=8, cluster_size=4096)
    blocks, clusters = 1 << 19, 1 << 10
    places = np.full(blocks, 4096) if where == "one place" else (np.arange(blocks) + (1 << 20)) * 4096
    with image.open("r+b") as file:
        table = -(-image.stat().st_size // 4096) * 4096
        file.seek(table)
        file.write(places.astype(">u8").tobytes())
        file.truncate(8 << 40)
        file.seek(48)
        file.write(struct.pack(">QI", table, clusters))
    read, real = [], Image.read

    def count(self: Image, offset: int, length: int) -> bytes:
        read.append(length)
        return real(self, offset, length)

    monkeypatch.setattr(Image, "read", count)
    with Image.open(image) as opened:
        reason_no_room(opened)
    assert sum(read) < 16 << 20
