"""A full scan reads what was written, however much of the image was allocated beforehand."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest

from island_fast.api import Repository
from island_fast.dirtymap import BLOCK_SIZE
from island_fast.files import punch_hole
from island_fast.qcow2.changes import find_allocated
from island_fast.qcow2.holes import FileData
from island_fast.qcow2.image import Image
from island_fast.repository.local_state import LocalState
from tests.support import qemu
from tests.support.memory_store import MemoryStore

pytestmark = qemu.needs_qemu

MIB = 1 << 20
SIZE = 256 * MIB
PLACES = [(0, MIB), (100 * MIB, MIB), (200 * MIB + 7 * BLOCK_SIZE, BLOCK_SIZE), (SIZE - MIB, MIB)]
WRITTEN = sum(length for _, length in PLACES)
SLACK = 4 * BLOCK_SIZE  # a write need not begin and end with the file system's blocks

KINDS = [
    {"cluster_size": 65536},
    {"cluster_size": 4096},
    {"cluster_size": 2 * MIB},
    {"cluster_size": 65536, "extended_l2": "on"},
    {"cluster_size": MIB, "extended_l2": "on"},
]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(MemoryStore(), LocalState(tmp_path / "state"), create=True)


def preallocated(path: Path, how: str, **options: object) -> Path:
    """An image with clusters for all of its volume, into which a guest wrote at four places."""
    qemu.create(path, SIZE, preallocation=how, **options)
    for number, (offset, length) in enumerate(PLACES):
        qemu.noise(path, offset, length, number)
    return path


def restores(repository: Repository, snapshot: str, image: Path) -> bool:
    """Whether it restores to that content.

    The image is not read: ext4 and xfs count what was only reserved as data while it is in the page cache.
    """
    target = image.with_name("restored.raw")
    repository.restore(snapshot, target, image_format="raw")
    expected = np.zeros(SIZE, np.uint8)
    for number, (offset, length) in enumerate(PLACES):
        expected[offset : offset + length] = np.frombuffer(random.Random(number).randbytes(length), np.uint8)
    same = np.array_equal(np.fromfile(target, np.uint8), expected)
    target.unlink()
    return same


@pytest.mark.parametrize("how", ["metadata", "falloc"])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_preallocated_image(
    repository: Repository, tmp_path: Path, how: str, options: dict[str, object]
) -> None:
    image = preallocated(tmp_path / "vol.qcow2", how, **options)
    first = repository.snapshot(image, pin=False)
    assert first.bytes_read <= WRITTEN + SLACK
    assert restores(repository, first.snapshot, image)
    again = repository.snapshot(image)
    assert (again.rule, again.blocks_changed) == ("full-scan", 0)
    assert again.bytes_read <= WRITTEN + SLACK
    onto = repository.restore_onto("vol@latest", image)
    assert (onto.bytes_written, onto.bytes_zeroed) == (0, 0)
    assert onto.bytes_compared <= WRITTEN + SLACK


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_clusters_in_a_hole_hide_what_lies_below(
    repository: Repository, tmp_path: Path, options: dict[str, object]
) -> None:
    """What is allocated in the image can be zero though the backing file has data at the same place."""
    below = preallocated(tmp_path / "base.qcow2", "metadata")
    image = tmp_path / "vol.qcow2"
    extra = ",".join(f"{name}={value}" for name, value in options.items())
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", extra, "-b", below, "-F", "qcow2", image)
    qemu.io(image, qemu.write(0, 512 << 10, 7), qemu.write(150 * MIB, MIB, 8))
    with Image.open(image, backed=True) as opened, open(image, "r+b") as file:
        entries = find_allocated(opened, opened.active_point()).count()
        offset = qemu_map(image)[0]
        assert punch_hole(file.fileno(), offset, 128 << 10)  # two blocks of zeros, which hide noise
        left = find_allocated(opened, opened.active_point(), skip_holes=True).count()
        assert entries - left in range(2, 25)
    taken = repository.snapshot(image, volume="vol", backing=[f"qcow2:{below}"])
    assert taken.bytes_read <= WRITTEN + 3 * MIB
    target = tmp_path / "restored.raw"
    repository.restore(taken.snapshot, target, image_format="raw")
    qemu.compare(image, target)
    assert not np.fromfile(target, np.uint8, 128 << 10).any()


def qemu_map(image: Path) -> list[int]:
    """Return where in the file the image's own extents of data lie."""
    rows = json.loads(qemu.run("qemu-img", "map", "-f", "qcow2", "--output=json", image))
    return [row["offset"] for row in rows if row["depth"] == 0 and row["data"]]


@pytest.mark.parametrize("written", [True, False])
def test_a_raw_file_that_was_reserved(repository: Repository, tmp_path: Path, written: bool) -> None:
    image = tmp_path / "vol.raw"
    with open(image, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
        if written:
            os.pwrite(file.fileno(), np.random.default_rng(1).bytes(MIB), 100 * MIB)
    taken = repository.snapshot(image, image_format="raw")
    assert taken.bytes_read == written * MIB
    target = tmp_path / "restored.raw"
    repository.restore(taken.snapshot, target, image_format="raw")
    subprocess.run(["cmp", image, target], check=True)


def test_holes_of_a_file(tmp_path: Path) -> None:
    """What can hold data, at the edges and past the end; in a file without holes, everything."""
    image = qemu.create(tmp_path / "vol.qcow2", SIZE, preallocation="metadata")
    with Image.open(image) as opened:
        data = FileData(opened)
        assert data.has_holes
        size = opened.file_size
        assert data.holds(np.array([0, size - 4096, size, 200 * MIB]), 4096).tolist() == [
            True, False, False, False,
        ]  # fmt: skip
        assert data.holds(np.array([[0], [200 * MIB]]), 1).tolist() == [[True], [False]]
    whole = qemu.create(tmp_path / "whole.qcow2", MIB)
    whole.write_bytes(whole.read_bytes())
    with Image.open(whole) as opened:
        assert not FileData(opened).has_holes
