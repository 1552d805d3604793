"""Every image that qemu makes is read as qemu reads it, at every point."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from island_fast.dirtymap import BLOCK_SIZE
from island_fast.qcow2.bitmaps import read_bitmaps
from island_fast.qcow2.block_reader import PointReader
from island_fast.qcow2.changes import find_allocated
from island_fast.qcow2.extents import DATA, iter_extents
from island_fast.qcow2.image import Image
from tests.images.interop.images import RECIPES, Made
from tests.support import qemu

pytestmark = qemu.needs_qemu


def whole(image, point):
    """The volume at a point, every block read."""
    out = np.full((point.blocks, BLOCK_SIZE), 0xA5, np.uint8)
    PointReader(image, point).read(np.arange(point.blocks), out)
    data = out.tobytes()
    assert not any(data[point.disk_size :])
    return data[: point.disk_size]


def from_allocated(image, point):
    """The volume from the blocks that hold data, the rest zeros: as a full scan stores it."""
    out = np.zeros((point.blocks, BLOCK_SIZE), np.uint8)
    reader = PointReader(image, point)
    for blocks in find_allocated(image, point).batches(7):
        rows = np.empty((len(blocks), BLOCK_SIZE), np.uint8)
        reader.read(blocks, rows)
        out[blocks] = rows
    return out.tobytes()[: point.disk_size]


def from_extents(image, point, truth):
    """The truth with everything that no extent calls data made zero."""
    out = bytearray(len(truth))
    for window in iter_extents(image, point):
        rows = zip(window.start.tolist(), window.length.tolist(), window.kind.tolist(), strict=True)
        for start, length, kind in rows:
            if kind == DATA:
                out[start : start + length] = truth[start : start + length]
    return bytes(out)


def test_there_are_enough_images():
    assert len(RECIPES) >= 100
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_point_of(recipe, images):
    made: Made = images[recipe.name]
    with Image.open(made.path) as image:
        points = {None: image.active_point()} | {s.name: image.point_at(s) for s in image.snapshots}
        assert set(points) == set(made.contents)
        for name, truth in made.contents.items():
            point = points[name]
            assert whole(image, point) == truth, name
            assert from_allocated(image, point) == truth, name
            assert from_extents(image, point, truth) == truth, name
        kind = recipe.choices["kind"]
        assert [b.state for b in read_bitmaps(image).listed] == (
            ["usable", "disabled"] if kind == "bitmaps" else []
        )
        assert image.header.corrupt == (kind == "corrupt")
        assert image.header.dirty == (kind == "dirty")


def test_qemu_still_reads_the_marked_ones_alike(images):
    """The bits set by hand are what qemu takes them for."""
    recipes = [r for r in RECIPES if r.choices["kind"] in ("dirty", "corrupt", "bitmaps")][:6]
    for made in (images[recipe.name] for recipe in recipes):
        raw = made.path.with_suffix(".raw")
        command = [qemu.QEMU_IMG, "convert", "-f", "qcow2", "-O", "raw", made.path, raw]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        assert raw.read_bytes() == made.contents[None]
