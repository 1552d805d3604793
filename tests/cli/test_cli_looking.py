"""`island map` and `island info`: what they show is what qemu-img shows, and they change nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support import qemu
from tests.support.daemon import StorageDaemon

MIB = 1 << 20
INFO = {
    "image", "format", "version", "volume_size", "file_size", "cluster_size", "compression", "backing_file",
    "features", "in_use", "internal_snapshots", "bitmaps", "bitmap_trouble", "volume", "pinned_base",
    "next_rule", "next_reason", "refuses_overwrites",
}  # fmt: skip


def merged(rows: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Neighbours of one kind joined."""
    found: list[tuple[int, int, str]] = []
    for start, length, kind in rows:
        if found and found[-1][2] == kind and found[-1][0] + found[-1][1] == start:
            found[-1] = (found[-1][0], found[-1][1] + length, kind)
        else:
            found.append((start, length, kind))
    return found


def qemu_map(image: Path) -> list[tuple[int, int, str]]:
    told = json.loads(qemu.run("qemu-img", "map", "-f", "qcow2", "--output=json", image))
    kinds = {(True, False): "data", (False, True): "zero"}
    rows = []
    for row in told:
        kind = kinds[row["data"], row["zero"]]
        rows.append((row["start"], row["length"], "hole" if kind == "zero" and not row["present"] else kind))
    return merged(rows)


@pytest.mark.parametrize("cluster_size", [4096, 65536, 1 << 20])
def test_map_is_qemus(island, tmp_path, cluster_size):
    image = qemu.create(tmp_path / "m.qcow2", 100 * MIB + 512, cluster_size=cluster_size)
    qemu.io(image, qemu.write(MIB, 3 * MIB, 1), qemu.zeroes(9 * MIB, MIB), qemu.zeroes(MIB, MIB, unmap=True))
    rows = [(r["start"], r["length"], r["kind"]) for r in island.json("map", image)]
    assert rows == merged(rows)
    assert rows == qemu_map(image)
    lines = island.text("map", image).splitlines()
    assert lines[0].split() == ["START", "B", "LENGTH", "B", "KIND"]
    assert [(int(a), int(n), k) for a, n, k in map(str.split, lines[1:])] == rows


def test_map_tells_what_changed_between_internal_snapshots(island, tmp_path):
    image = qemu.create(tmp_path / "m.qcow2", 16 * MIB)
    qemu.io(image, qemu.write(0, 4 * MIB, 1))
    qemu.snapshot_create(image, "sunday")
    qemu.io(image, qemu.write(MIB, 65536, 2), qemu.discard(2 * MIB, 65536))
    qemu.snapshot_create(image, "monday")
    qemu.io(image, qemu.write(0, MIB, 3))
    rows = island.json("map", image, "--snapshot", "monday", "--since", "sunday")
    changed = [(r["start"], r["length"], r["kind"]) for r in rows if r["changed"]]
    assert [(a, n) for a, n, _ in changed] == [(MIB, 65536), (2 * MIB, 65536)]
    assert "  yes" in island.text("map", image, "--snapshot", "monday", "--since", "sunday")
    assert "no internal snapshot" in island.fails(3, "map", image, "--snapshot", "nobody")


def test_map_of_a_raw_file(island, tmp_path):
    raw = tmp_path / "x.raw"
    with open(raw, "wb") as file:
        file.truncate(9 * MIB + 5)
        os.pwrite(file.fileno(), b"x" * MIB, 4 * MIB)
    rows = island.json("map", raw, "--format", "raw")
    assert [(r["start"], r["length"], r["kind"]) for r in rows] == [
        (0, 4 * MIB, "hole"), (4 * MIB, MIB, "data"), (5 * MIB, 4 * MIB + 5, "hole"),
    ]  # fmt: skip
    assert "raw" in island.fails(2, "map", raw, "--format", "raw", "--since", "x")
    assert "--format raw" in island.fails(4, "map", raw), "formats are never probed"


def test_info_says_what_the_next_snapshot_does(island, disk):
    before = disk.read_bytes()
    first = island.json("info", disk)
    assert first.keys() == INFO
    assert (first["next_rule"], first["pinned_base"]) == ("full-scan", None)
    assert not island.repository.exists(), "looking makes no repository"
    assert disk.read_bytes() == before
    taken = island.json("snapshot", disk)
    after = island.json("info", disk)
    assert (after["next_rule"], after["pinned_base"], after["volume"]) == (
        "table-diff", taken["snapshot"], "disk",
    )  # fmt: skip
    assert [one["pin_of"] for one in after["internal_snapshots"]] == [taken["snapshot"]]
    assert "table-diff" in island.text("info", disk)
    assert after["refuses_overwrites"] is True
    assert "refused by the store" in island.text("info", disk)
    other = qemu.create(disk.parent / "other.qcow2", MIB)
    assert "island adopt disk" in island.json("info", other, "--volume", "disk")["next_reason"]


def test_info_lists_features_bitmaps_and_use(island, tmp_path):
    image = qemu.create(tmp_path / "b.qcow2", MIB, lazy_refcounts="on", cluster_size=16384, extended_l2="on")
    qemu.run("qemu-img", "bitmap", "--add", "-g", "65536", "-f", "qcow2", image, "nightly")
    told = island.json("info", image)
    assert {"lazy refcounts", "extended L2"} <= set(told["features"])
    assert told["bitmaps"] == [{"name": "nightly", "granularity": 65536, "state": "usable"}]
    assert told["in_use"] is False
    with StorageDaemon(image):
        assert island.json("info", image)["in_use"] is True
        assert "--snapshot" in island.fails(4, "map", image)


def test_a_backing_file_is_stored_only_if_listed(island, tmp_path):
    base = qemu.create(tmp_path / "base.qcow2", MIB)
    qemu.io(base, qemu.write(0, MIB, 1))
    top = tmp_path / "top.qcow2"
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    assert "--backing" in island.fails(4, "snapshot", top)
    assert island.json("info", top, "--backing", f"qcow2:{base}")["backing_file"] == str(base)
    taken = island.json("snapshot", top, "--backing", f"qcow2:{base}")
    assert taken["blocks_changed"] == 16
    told = island.json("info", top)
    assert (told["backing_file"], told["next_rule"]) == (str(base), None)
    assert "--backing" in told["next_reason"]
    target = tmp_path / "flat.qcow2"
    island("restore", taken["snapshot"], target)
    assert qemu.content(target) == b"\1" * MIB
