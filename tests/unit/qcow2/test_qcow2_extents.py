"""Extents: what `qemu-img map` says, merged as far as it goes, and what changed between two points."""

import itertools
import json
import subprocess
import tracemalloc

import numpy as np
import pytest

from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.errors import DamagedImageError
from island_fast.qcow2.changes import find_changed
from island_fast.qcow2.extents import DATA, HOLE, KINDS, ZERO, iter_extents
from island_fast.qcow2.image import Image
from tests.support import qemu

pytestmark = qemu.needs_qemu

CASES = {
    "512": {"cluster_size": 512, "size": 3 << 20},
    "4k zstd": {"cluster_size": 4096, "size": 9 << 20, "compression_type": "zstd"},
    "64k": {"cluster_size": 65536, "size": (30 << 20) + 1536, "resizes": True},
    "64k old": {"cluster_size": 65536, "size": (30 << 20) + 512, "compat": "0.10"},
    "64k metadata": {"cluster_size": 65536, "size": 25 << 20, "preallocation": "metadata"},
    "2M": {"cluster_size": 2 << 20, "size": (50 << 20) + 4608, "resizes": True},
    "16k subclusters": {"cluster_size": 16384, "size": 9 << 20, "extended_l2": "on", "resizes": True},
    "128k subclusters": {"cluster_size": 131072, "size": (25 << 20) + 512, "extended_l2": "on"},
    "2M subclusters": {"cluster_size": 2 << 20, "size": 40 << 20, "extended_l2": "on"},
}  # fmt: skip


def told_by_qemu(path):
    """(start, length, kind) of the active volume."""
    rows = []
    for row in json.loads(qemu.run(qemu.QEMU_IMG, "map", "-f", "qcow2", "--output=json", path)):
        # A preallocated cluster is data to qcow2 and a hole of the file: data and zero at once.
        kind = DATA if row["data"] else ZERO if row["present"] else HOLE
        if rows and rows[-1][2] == kind:
            rows[-1][1] += row["length"]
        else:
            rows.append([row["start"], row["length"], kind])
    return rows


def found(image, point, since=None):
    windows = list(iter_extents(image, point, since))
    assert all(len(w.start) and w.start.dtype == w.length.dtype == np.int64 for w in windows)
    columns = [np.concatenate([getattr(w, name) for w in windows]) for name in ("start", "length", "kind")]
    flags = np.concatenate([w.changed for w in windows])
    rows = [list(row) for row in zip(*(c.tolist() for c in columns), flags.tolist(), strict=True)]
    assert rows[0][0] == 0
    assert sum(row[1] for row in rows) == point.disk_size
    for before, after in itertools.pairwise(rows):
        assert before[0] + before[1] == after[0]
        assert before[2:] != after[2:]
    return rows


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def past(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("map") / "image.qcow2"
    case = dict(CASES[request.param])
    return path, qemu.create_with_history(path, request.param, case.pop("size"), **case)


@pytest.mark.parametrize("window", [1, 1 << 18])
def test_every_point_as_qemu_maps_it(past, window, tmp_path, monkeypatch):
    monkeypatch.setattr("island_fast.qcow2.extents._WINDOW_UNITS", window)
    path, names = past
    with Image.open(path) as image:
        rows = [row[:3] for row in found(image, image.active_point())]
        assert rows == told_by_qemu(path)
        for snapshot in image.snapshots:
            copy = tmp_path / snapshot.name
            qemu.run("cp", path, copy)
            qemu.snapshot_apply(copy, snapshot.name)
            assert [row[:3] for row in found(image, image.point_at(snapshot))] == told_by_qemu(copy)
        assert {s.name for s in image.snapshots} == set(names)


def test_changes_are_those_of_the_table_diff(past, monkeypatch):
    path, _ = past
    with Image.open(path) as image:
        points = [image.active_point(), *map(image.point_at, image.snapshots)]
        for old in points:
            for new in points:
                rows = found(image, new, old)
                ours = DirtyMap(new.blocks)
                for start, length, _, flag in rows:
                    if flag:
                        ours.set_range(start // BLOCK_SIZE, -(-(start + length) // BLOCK_SIZE))
                assert ours == find_changed(image, old, new).map
                plain = found(image, new)
                assert not any(row[3] for row in plain)
                assert old != new or rows == plain


def test_only_what_changed_is_read(tmp_path, monkeypatch):
    path = qemu.create(tmp_path / "a", 3 << 30)
    qemu.io(path, *[qemu.write(n << 29, 1 << 20, 1) for n in range(6)])
    qemu.snapshot_create(path, "one")
    qemu.io(path, qemu.write((1 << 30) + 70000, 4096, 2), qemu.discard(0, 65536))
    with Image.open(path) as image:
        one, active = image.point_at(image.snapshots[0]), image.active_point()
        rows = [row for row in found(image, active, one) if row[3]]
        second = (1 << 30) + 65536
        assert rows == [[0, 65536, ZERO, True], [second, 65536, DATA, True]]
        assert [KINDS[kind] for kind in (HOLE, ZERO, DATA)] == ["hole", "zero", "data"]


def test_a_wide_and_empty_volume_costs_nothing(tmp_path):
    path = qemu.create(tmp_path / "a", 64 << 40, cluster_size=2 << 20)
    qemu.io(path, qemu.write((33 << 40) + 512, 512, 1))
    with Image.open(path) as image:
        tracemalloc.start()
        rows = found(image, image.active_point())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    begin = 33 << 40
    end = begin + (2 << 20)
    assert rows == [
        [0, begin, HOLE, False], [begin, 2 << 20, DATA, False], [end, (64 << 40) - end, HOLE, False],
    ]  # fmt: skip
    assert peak < 32 << 20


def test_an_empty_volume_has_no_extents(tmp_path):
    path = qemu.create(tmp_path / "a", 0)
    with Image.open(path) as image:
        assert list(iter_extents(image, image.active_point())) == []


def test_an_invalid_entry_is_damage_inside_the_volume_only(tmp_path):
    path = qemu.create(tmp_path / "a", 4 << 20)
    qemu.io(path, qemu.write(0, 1 << 20, 1))
    data = bytearray(path.read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 + 1 : l1 + 8], "big")
    data[l2 + 8 * 64 : l2 + 8 * 65] = (0x60200).to_bytes(8, "big")
    path.write_bytes(data)
    with Image.open(path) as image:
        assert found(image, image.active_point())[0] == [0, 1 << 20, DATA, False]
    data[l2 + 8 * 63 : l2 + 8 * 64] = (0x60200).to_bytes(8, "big")
    path.write_bytes(data)
    with Image.open(path) as image, pytest.raises(DamagedImageError, match="cluster 63 in the volume"):
        list(iter_extents(image, image.active_point()))
    assert subprocess.run([qemu.QEMU_IMG, "map", path], capture_output=True, check=False).returncode
