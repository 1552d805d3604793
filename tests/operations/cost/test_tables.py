"""How many L2 tables are read to find where an image has data, and what changed."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from island_fast.bench.synthetic_image import SyntheticImage
from island_fast.images.inspect import map_image
from island_fast.qcow2.changes import find_allocated, find_changed
from island_fast.qcow2.extents import DATA
from island_fast.qcow2.image import Image
from tests.support import qemu

GIB = 1 << 30
TABLES = 200
RUNS = 3000


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> SyntheticImage:
    """Make a volume of which 1 % of the tables differ between two snapshots."""
    path = tmp_path_factory.mktemp("mapped") / "image"
    return SyntheticImage.make(path, TABLES * GIB // 2, 3 * GIB, RUNS, seed=1, tables=0.01)


def test_a_diff_reads_the_tables_that_differ(image: SyntheticImage) -> None:
    with Image.open(image.path) as opened:
        old, new = (opened.point_at(opened.find_named(name)) for name in "ab")
        scanned: list[int] = []
        found = find_allocated(opened, new, progress=lambda done, total: scanned.append(done))
        diff = find_changed(opened, old, new)
    assert (scanned[-1], image.tables_moved) == (TABLES, TABLES // 100)
    assert diff.tables_read == 2 * image.tables_moved
    assert 20 * diff.tables_read <= scanned[-1]
    assert diff.map.count() == image.moved
    assert diff.map & found == diff.map


def test_a_map_reads_each_table_once_and_is_that_of_qemu(
    image: SyntheticImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        count = real(fd, buffers, offset)
        read += count
        return count

    with monkeypatch.context() as patch:
        patch.setattr("os.preadv", preadv)
        parts = list(map_image(image.path))
    assert read <= (TABLES + 4) * 65536
    ours: list[list[int]] = []
    for part in parts:
        data = part.kind == DATA
        ours += np.stack([part.start[data], (part.start + part.length)[data]], axis=1).tolist()
    mapped = json.loads(qemu.run("qemu-img", "map", "-f", "qcow2", "--output=json", image.path))
    theirs: list[list[int]] = []
    for row in (row for row in mapped if row["data"]):
        if theirs and theirs[-1][1] == row["start"]:  # qemu splits what is not together in the file
            theirs[-1][1] += row["length"]
        else:
            theirs.append([row["start"], row["start"] + row["length"]])
    assert ours == theirs
    assert len(ours) == RUNS
