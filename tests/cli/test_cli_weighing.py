"""`island retain`, `diff` and `usage`: what people read, and the whole JSON."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.conftest import MIB, Island
from tests.support import qemu

pytestmark = qemu.needs_qemu

BLOCK = 65536


@pytest.fixture
def taken(island: Island, disk: Path) -> list[str]:
    """Three snapshots of `disk`: 48 blocks, two of them changed, and one of these zeroed."""
    snapshots = [island.json("snapshot", disk, "--label", "first\n\x1b[2J")["snapshot"]]
    qemu.noise(disk, MIB, 2 * BLOCK, 5)
    snapshots.append(island.json("snapshot", disk)["snapshot"])
    qemu.io(disk, qemu.discard(MIB, BLOCK))
    return [*snapshots, island.json("snapshot", disk)["snapshot"]]


def test_retain_tells_what_stays_and_why(island: Island, taken: list[str]) -> None:
    words = ("retain", "--keep-last", 1, "--keep-yearly", 2)
    (would,) = island.json(*words, "--dry-run")
    frees = would["bytes_freed"]
    created = [one["created"] for one in would["snapshots"]]
    unneeded = would["snapshots"][1]["bytes_unreferenced"]
    assert 0 < frees <= unneeded
    empty = {"bytes_unreferenced": 0, "bytes_freed": 0}
    assert would == {
        "volume": "disk", "kept": 2, "deleted": 1, "bytes_unreferenced": unneeded, "bytes_freed": frees,
        "snapshots": [
            {"snapshot": taken[0], "created": created[0], "label": "first\n\x1b[2J", "kept": True,
             "reasons": ["oldest yearly"], **empty},
            {"snapshot": taken[1], "created": created[1], "label": "", "kept": False, "reasons": [],
             "bytes_unreferenced": unneeded, "bytes_freed": frees},
            {"snapshot": taken[2], "created": created[2], "label": "", "kept": True,
             "reasons": ["last", "yearly"], **empty},
        ],
    }  # fmt: skip
    rules, header, *rows, told = island.text(*words, "--dry-run").splitlines()
    assert rules == "Rules: keep-last 1 (command line), keep-yearly 2 (command line)."
    assert re.split(r"  +", header) == ["ACTION", "SNAPSHOT", "CREATED", "FREES", "KEPT AS", "LABEL"]
    assert [re.split(r"  +", row) for row in rows] == [
        ["keep", taken[0][:12], created[0], "oldest yearly", "first\\n\\x1b[2J"],
        ["delete", taken[1][:12], created[1], f"{frees / 1024:.1f} KiB" if frees >= 1024 else f"{frees} B"],
        ["keep", taken[2][:12], created[2], "last, yearly"],
    ]
    would_be = r"1 would be deleted; 'island sweep' would then free \S+ \S+\."
    assert re.fullmatch(rf"Volume disk: 2 of 3 snapshots kept, {would_be}", told)
    assert len(island.json("list")) == 3, "a dry run deletes nothing"
    done = island.text(*words).splitlines()
    assert done[:-1] == [rules, header, *rows]
    assert done[-1] == told.replace("would be deleted", "deleted").replace("would then free", "will free")
    assert [one["snapshot"] for one in island.json("list")] == [taken[0], taken[2]]
    assert island.json("sweep")[0]["bytes_freed"] == frees
    assert island.text(*words).splitlines()[-1] == "Volume disk: all 2 snapshots kept."
    assert island.text(*words, "--quiet") == ""


def test_retain_refuses_what_would_keep_nothing(island: Island, taken: list[str]) -> None:
    for words in ([], ["--dry-run"], ["--keep-daily", "0"]):
        assert "give one, such as --keep-daily 7" in island.fails(2, "retain", *words)
    assert "--keep-daily" in island.fails(2, "retain", "--keep-daily", "-1")
    assert "--keep-last" in island.fails(2, "retain", "--keep-last", "all")
    assert "no snapshots" in island.fails(3, "retain", "--keep-last", "1", "--volume", "other")
    assert len(island.json("list")) == 3


def test_retain_on_a_host_that_owns_nothing(
    island: Island, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISLAND_STATE", f"{island.state}2")
    told = island.fails(4, "retain", "--keep-last", "1")
    assert "because other hosts or users own its volumes (disk)" in told, "so that a timer shows it"
    assert "island adopt disk" in island.fails(4, "retain", "--keep-last", "1", "--volume", "disk")
    assert len(island.json("list")) == 3


def test_diff_tells_extents_and_their_sum(island: Island, taken: list[str]) -> None:
    found = island.json("diff", taken[0], taken[2])
    assert found == {
        "volume": "disk", "since": taken[0], "snapshot": taken[2], "since_size": 64 * MIB,
        "volume_size": 64 * MIB, "bytes_changed": 2 * BLOCK, "bytes_data": BLOCK, "bytes_zero": BLOCK,
        "extents": [
            {"start": MIB, "length": BLOCK, "kind": "zero"},
            {"start": MIB + BLOCK, "length": BLOCK, "kind": "data"},
        ],
    }  # fmt: skip
    header, *rows, told = island.text("diff", f"disk@{taken[0][:8]}", "disk@latest").splitlines()
    assert header.split() == ["START", "B", "LENGTH", "B", "KIND"]
    assert [row.split() for row in rows] == [
        [str(MIB), str(BLOCK), "zero"],
        [str(MIB + BLOCK), str(BLOCK), "data"],
    ]
    assert told == ("Volume disk: 128.0 KiB can differ in 2 extents, 64.0 KiB of data and 64.0 KiB of zeros.")
    same = island.text("diff", "disk@latest", taken[2])
    assert same == "Volume disk: 0 B can differ in 0 extents, 0 B of data and 0 B of zeros.\n"
    assert island.text("diff", taken[0], taken[1], "--quiet") == ""


def test_diff_of_other_sizes_and_other_volumes(island: Island, taken: list[str], disk: Path) -> None:
    qemu.resize(disk, 65 * MIB)
    island("snapshot", disk)
    told = island.text("diff", taken[2], "disk@latest").splitlines()[-1]
    assert told.endswith(" of zeros; its size went from 64.0 MiB to 65.0 MiB.")
    island("snapshot", disk, "--no-pin", "--volume", "other")
    assert "give two snapshots of one volume" in island.fails(2, "diff", "disk@latest", "other@latest")
    assert "there is no snapshot" in island.fails(3, "diff", "disk@latest", "f" * 32)


def test_usage_tells_each_volume_and_all(island: Island, taken: list[str], disk: Path) -> None:
    def occupied(kind: str, volume: str) -> int:
        paths = (island.repository / volume / kind).rglob("*")
        return sum(path.stat().st_size for path in paths if path.is_file())

    island("snapshot", disk, "--no-pin", "--volume", "other")
    island("delete", taken[1])
    used = island.json("usage")
    disks, others = used["volumes"]
    stored = occupied("packs", "disk") + occupied("manifests", "disk")
    dead = disks["bytes_dead"]
    assert BLOCK <= dead < 2 * BLOCK, "the block that only the deleted snapshot held, and its manifest"
    assert disks == {
        "volume": "disk", "snapshots": 2, "bytes_logical": (48 + 47) * BLOCK, "bytes_distinct": 49 * BLOCK,
        "bytes_shared": 46 * BLOCK, "bytes_stored": stored, "bytes_dead": dead,
        "bytes_freed": island.json("sweep", "--dry-run")[0]["bytes_freed"],
        "compression": 49 * BLOCK / (stored - dead),
    }  # fmt: skip
    assert (others["bytes_logical"], others["bytes_shared"]) == (47 * BLOCK, 0)
    assert used["total"]["bytes_stored"] == stored + others["bytes_stored"]
    assert used["total"].keys() == disks.keys()
    assert used["total"]["volume"] is None
    header, *rows = island.text("usage").splitlines()
    assert re.split(r"  +", header) == [
        *["VOLUME", "SNAPSHOTS", "LOGICAL", "DISTINCT", "SHARED", "STORED", "DEAD", "SWEEP FREES", "RATIO"]
    ]
    cells = [re.split(r"  +", row) for row in rows]
    assert [row[:2] for row in cells] == [["disk", "2"], ["other", "1"], ["(all)", "3"]]
    assert [row[2] for row in cells] == ["5.9 MiB", "2.9 MiB", "8.9 MiB"]
    assert cells[0][8] == f"{disks['compression']:.2f}"
    assert len(island.text("usage", "--volume", "disk").splitlines()) == 2, "one volume needs no sum"
    assert island.json("usage", "--volume", "disk")["volumes"] == [disks]
    assert island.text("usage", "--quiet") == ""


def test_usage_of_nothing(island: Island, disk: Path) -> None:
    assert "does not exist" in island.fails(3, "usage")
    island.json("snapshot", disk)
    (island.repository / "disk").rename(island.repository.parent / "away")
    assert island("usage").err == f"island: there are no volumes in {island.repository}\n"
    assert island("usage", "--json").code == 0
