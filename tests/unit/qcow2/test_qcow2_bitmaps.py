"""Persistent bitmaps: listed with what they are worth; a bad one never hides the volume."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from island_fast.dirtymap import BLOCK_SIZE
from island_fast.qcow2.bitmaps import Bitmap, BitmapState, read_bitmaps
from island_fast.qcow2.block_reader import PointReader
from island_fast.qcow2.image import Image
from tests.support import qemu
from tests.support.handmade import extension, header

CLUSTER = 65536


@pytest.fixture
def path(tmp_path):
    """An image with data in block 0 and the bitmaps "first" (recording) and "second" (disabled)."""
    path = qemu.create(tmp_path / "a.qcow2", 4 << 20)
    qemu.io(path, qemu.write(0, 65536, 5))
    qemu.run(qemu.QEMU_IMG, "bitmap", "--add", "-f", "qcow2", path, "first")
    qemu.run(qemu.QEMU_IMG, "bitmap", "--add", "--disable", "-g", "4096", "-f", "qcow2", path, "second")
    return path


def listed(path):
    with Image.open(path) as image:
        found = read_bitmaps(image)
        row = np.zeros((1, BLOCK_SIZE), np.uint8)
        PointReader(image, image.active_point()).read(np.array([0]), row)
        assert np.all(row == 5)
    return found


def patch(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def directory_of(path):
    """Where the extension's fields and the directory are."""
    data = path.read_bytes()
    at = data.index(struct.pack(">II", 0x23852875, 24)) + 8
    return at, struct.unpack_from(">Q", data, at + 16)[0]


@qemu.needs_qemu
def test_states(path):
    first, second = Bitmap("first", 65536, BitmapState.USABLE), Bitmap("second", 4096, BitmapState.DISABLED)
    assert listed(path).listed == (first, second)
    assert listed(path).trouble is None
    _, directory = directory_of(path)
    patch(path, directory + 12, struct.pack(">I", 3))
    assert [b.state for b in listed(path).listed] == ["in use", "disabled"]
    patch(path, 88, bytes(8))
    assert [b.state for b in listed(path).listed] == ["inconsistent", "inconsistent"]


@qemu.needs_qemu
def test_no_bitmaps(tmp_path):
    path = qemu.create(tmp_path / "a", 1 << 20)
    qemu.io(path, qemu.write(0, 65536, 5))
    assert listed(path).listed == ()
    assert listed(path).trouble is None


ENTRY_DAMAGE = {
    "table offset not aligned": (0, struct.pack(">Q", 0x60200)),
    "table at 0": (0, bytes(8)),
    "table past the end": (0, struct.pack(">Q", 1 << 40)),
    "table of no entries": (8, bytes(4)),
    "table over the limit": (8, struct.pack(">I", (1 << 27) + 1)),
    "unknown flag": (12, struct.pack(">I", 6)),
    "unknown type": (16, b"\2"),
    "granularity 8": (17, b"\x08"),
    "granularity 32": (17, b"\x20"),
    "granularity 255": (17, b"\xff"),
}


@qemu.needs_qemu
@pytest.mark.parametrize("damage", ENTRY_DAMAGE)
def test_a_damaged_entry_is_told_and_the_next_one_listed(path, damage):
    _, directory = directory_of(path)
    at, value = ENTRY_DAMAGE[damage]
    patch(path, directory + at, value)
    found = listed(path)
    assert [(b.name, b.state) for b in found.listed] == [("first", "damaged"), ("second", "disabled")]
    assert found.trouble is None


DIRECTORY_DAMAGE = {
    "no bitmaps": (0, bytes(4), 0),
    "too many bitmaps": (0, struct.pack(">I", 65536), 0),
    "reserved": (4, b"\1", 0),
    "directory over the limit": (8, struct.pack(">Q", (8 << 20) + 1), 0),
    "directory past the end": (8, struct.pack(">Q", 8 << 20), 0),
    "directory not aligned": (16, struct.pack(">Q", 0x60200), 0),
    "directory at 0": (16, bytes(8), 0),
    "directory beyond int64": (16, struct.pack(">Q", (1 << 64) - CLUSTER), 0),
    "one bitmap more than there are": (0, struct.pack(">I", 3), 2),
    "directory cut inside the second entry": (8, struct.pack(">Q", 40), 1),
}


@qemu.needs_qemu
@pytest.mark.parametrize("damage", DIRECTORY_DAMAGE)
def test_a_damaged_directory_is_trouble_told(path, damage):
    fields, _ = directory_of(path)
    at, value, kept = DIRECTORY_DAMAGE[damage]
    patch(path, fields + at, value)
    found = listed(path)
    assert "bitmap" in found.trouble
    assert len(found.listed) == kept


@qemu.needs_qemu
@pytest.mark.parametrize(
    "at, value", [(18, b"\0\0"), (18, b"\xff\xff"), (20, b"\0\0\0\1"), (20, b"\xff" * 4)]
)
def test_lengths_that_lie(path, at, value):
    _, directory = directory_of(path)
    patch(path, directory + at, value)
    found = listed(path)
    assert found.trouble or found.listed[0].state == "damaged"


@given(directory=st.binary(max_size=200), count=st.integers(0, 70000), size=st.integers(0, 1 << 24))
def test_noise_is_a_state_and_never_an_error(tmp_path_factory, directory, count, size):
    path = tmp_path_factory.getbasetemp() / "noise.qcow2"
    fields = struct.pack(">IIQQ", count, 0, size, 0x40000)
    data = header(autoclear=1, extensions=extension(0x23852875, fields)).ljust(0x40000, b"\0") + directory
    path.write_bytes(data.ljust(0x40000 + min(size, 400), b"\0"))
    with Image.open(path) as image:
        found = read_bitmaps(image)
    assert found.trouble or len(found.listed) == count
