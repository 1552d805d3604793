"""Each verb, in its human and its JSON form, on a real image and a directory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import MIB, Island, pins
from tests.support import qemu
from tests.support.daemon import StorageDaemon, needs_storage_daemon

pytestmark = qemu.needs_qemu

ROW = [
    *["snapshot", "lineage", "parent", "volume", "label", "created", "volume_size", "bytes_stored"],
    "keep",
]
KEYS = {
    "snapshot": [
        *["snapshot", "lineage", "parent", "volume", "label", "volume_size", "rule", "reason"],
        *["blocks_candidate", "blocks_changed", "blocks_kept", "blocks_sampled", "bytes_read"],
        "bytes_stored",
        *["objects_written", "attempt", "seconds", "notes"],
    ],
    "list": ROW,
    "show": [*ROW, "bytes_unreferenced", "bytes_freed", "consistency", "domain", "disk", "group"],
    "restore": [
        *["snapshot", "target", "format", "volume_size"],
        *["bytes_read", "bytes_written", "objects_read", "seconds"],
    ],
    "restore --onto": [
        *["snapshot", "target", "format", "volume_size", "target_size", "bytes_compared"],
        *["bytes_written", "bytes_zeroed", "bytes_read", "objects_read", "seconds"],
    ],
    "delete": ["snapshot", "volume", "bytes_unreferenced", "bytes_freed"],
    "sweep": [
        *["volume", "objects_removed", "packs_repacked"],
        *["bytes_removed", "bytes_rewritten", "bytes_kept", "bytes_freed"],
        *["objects_unknown", "bytes_unknown", "objects_waiting", "bytes_waiting"],
        "steps",
    ],
    "copy": [
        *["snapshot", "volume", "parent", "label", "volume_size", "copied", "blocks_sent", "blocks_kept"],
        *["bytes_read", "bytes_stored", "objects_written", "seconds", "deleted"],
    ],
    "keep": ["snapshot", "volume", "keep"],
    "retain": ["volume", "kept", "deleted", "bytes_unreferenced", "bytes_freed", "snapshots"],
    "diff": [
        *["volume", "since", "snapshot", "since_size", "volume_size"],
        *["bytes_changed", "bytes_data", "bytes_zero", "extents"],
    ],
    "usage": ["volumes", "total"],
    "adopt": ["volume", "snapshots", "epoch"],
    "unpin": ["image", "pins", "bytes_freed"],
}


def test_the_keys_of_every_answer_are_those_promised(island: Island, disk: Path, tmp_path: Path) -> None:
    taken = island.json("snapshot", disk)
    listed = island.json("list")
    shown = island.json("show", "disk@latest")
    restored = island.json("restore", "disk@latest", tmp_path / "out.qcow2")
    onto = island.json("restore", "disk@latest", "--onto", tmp_path / "out.qcow2")
    copied = island.json("copy", "--all", "--to", tmp_path / "far")
    kept = island.json("keep", "disk@latest")
    island("keep", "--release", "disk@latest")
    retained = island.json("retain", "--keep-last", 1)
    diff = island.json("diff", "disk@latest", "disk@latest")
    usage = island.json("usage")
    deleted = island.json("delete", "disk@latest")
    swept = island.json("sweep")
    adopted = island.json("adopt", "disk")
    unpinned = island.json("unpin", disk)
    found = [taken, *listed, shown, restored, onto, *deleted, *swept, *copied]
    found += [*kept, *retained, diff, usage, adopted, unpinned]
    assert [list(one) for one in found] == list(KEYS.values())
    assert listed == [{key: shown[key] for key in ROW}]
    assert [list(step) for step in swept[0]["steps"]] == [["action", "object", "bytes", "reason"]] * 2
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", shown["created"])


def test_snapshot_tells_its_rule_and_its_work(island: Island, disk: Path, tmp_path: Path) -> None:
    first = island.json("snapshot", disk, "--label", "before")
    assert (first["rule"], first["blocks_changed"], first["bytes_read"]) == ("full-scan", 48, 3 * MIB)
    assert (first["volume"], first["label"], first["parent"]) == ("disk", "before", None)
    qemu.noise(disk, 10 * MIB, 128 << 10)
    text = island.text("snapshot", disk)
    found = dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines())
    assert list(found) == ["snapshot", "volume", "parent", "rule", "blocks", "read", "stored", "time"]
    assert found["volume"] == "disk, 64.0 MiB"
    assert found["parent"] == first["snapshot"]
    assert found["rule"] == f"table-diff: compared with the pinned base of snapshot {first['snapshot']}"
    assert found["blocks"] == "2 changed, of 2 that could have; 64 KiB each"
    assert re.fullmatch(r"[0-9.]+ [KM]iB; [0-9]+ unchanged blocks compared", found["read"])
    assert re.fullmatch(r"12\d\.\d KiB; 3 objects written", found["stored"])
    assert re.fullmatch(r"\d+\.\d\d? s", found["time"])
    assert len(pins(disk)) == 1
    assert island.text("snapshot", disk, "--quiet") == ""
    assert len(island.json("list")) == 3


def test_snapshot_options(island: Island, disk: Path) -> None:
    qemu.snapshot_create(disk, "monday")
    before = disk.read_bytes()
    one = island.json("snapshot", disk, "--at", "monday", "--volume", "other")
    two = island.json("snapshot", disk, "--no-pin", "--volume", "third")
    assert disk.read_bytes() == before, "neither --at nor --no-pin writes to the image"
    assert (one["volume"], two["volume"]) == ("other", "third")
    island("snapshot", disk)
    full = island.json("snapshot", disk, "--full")
    assert (full["rule"], full["reason"]) == ("full-scan", "a full scan was requested")
    assert (full["bytes_read"], full["blocks_changed"]) == (3 * MIB, 0)


def test_a_raw_image_is_taken_as_one(island: Island, disk: Path, tmp_path: Path) -> None:
    raw = qemu.convert(disk, tmp_path / "raw.img", target_format="raw")
    assert "--format raw" in island.fails(4, "snapshot", raw)
    taken = island.json("snapshot", raw, "--format", "raw")
    assert (taken["rule"], taken["blocks_changed"]) == ("full-scan", 48)
    island("restore", "raw@latest", tmp_path / "out.qcow2")
    qemu.compare(tmp_path / "out.qcow2", raw)


@needs_storage_daemon
def test_an_image_in_use_needs_its_socket(island: Island, disk: Path) -> None:
    with StorageDaemon(disk) as daemon:
        sentence = island.fails(4, "snapshot", disk)
        assert "--qmp" in sentence
        daemon.write(20 * MIB, 65536, 7)
        taken = island.json("snapshot", disk, "--qmp", daemon.qmp_socket)
    assert taken["blocks_changed"] == 49
    qemu.check(disk)


def test_list_is_a_table_that_programs_can_read_too(island: Island, disk: Path) -> None:
    first = island.json("snapshot", disk, "--label", "a\x1b[31m\nb ü")
    second = island.json("snapshot", disk)
    header, *rows = island.text("list").splitlines()
    assert header.split() == ["SNAPSHOT", "VOLUME", "CREATED", "SIZE", "STORED", "PARENT", "LABEL"]
    cells = [re.split(r"  +", row) for row in rows]
    assert [row[0] for row in cells] == [first["snapshot"][:12], second["snapshot"][:12]]
    assert [row[5] for row in cells] == ["none", first["snapshot"][:12]]
    assert cells[0][6] == "a\\x1b[31m\\nb ü", "a label cannot steer a terminal, nor break a row"
    assert island.json("list")[0]["label"] == "a\x1b[31m\nb ü"
    assert island.text("list", "--volume", "disk").splitlines()[1:] == rows
    assert island.text("list", "-q").split() == [first["snapshot"], second["snapshot"]]


def test_an_empty_list_is_a_list(island: Island, disk: Path) -> None:
    island("delete", island.json("snapshot", disk)["snapshot"])
    assert island("list", "--json").out == "[]\n"
    done = island("list")
    assert (done.code, done.out) == (0, "")
    assert done.err == f"island: there are no snapshots in {island.repository}\n"
    assert island("list", "--quiet").err == ""


def test_show_by_every_kind_of_name(island: Island, disk: Path) -> None:
    taken = island.json("snapshot", disk)["snapshot"]
    for name in (taken, taken[:6], f"disk@{taken}", f"disk@{taken[:4]}", "disk@latest"):
        assert island.json("show", name)["snapshot"] == taken
    assert island.text("show", taken).splitlines()[0] == f"snapshot  {taken}"


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_restore_gives_the_volume(island: Island, disk: Path, tmp_path: Path, image_format: str) -> None:
    taken = island.json("snapshot", disk)
    text = island.text("restore", "disk@latest", tmp_path / "out", "--format", image_format)
    assert f"target    {tmp_path / 'out'}, {image_format}\n" in text
    assert "written   3.0 MiB\n" in text
    qemu.compare(disk, tmp_path / "out", other_format=image_format)
    if image_format == "qcow2":
        qemu.check(tmp_path / "out")
        (tmp_path / "out").rename(disk)
        again = island.json("snapshot", disk)
        assert (again["rule"], again["parent"]) == ("table-diff", taken["snapshot"])
    assert island.text("restore", "disk@latest", tmp_path / "quiet", "-q") == ""
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_delete_and_sweep(island: Island, disk: Path, tmp_path: Path) -> None:
    first = island.json("snapshot", disk)["snapshot"]
    qemu.noise(disk, MIB, 2 * MIB)
    island("snapshot", disk)
    (would,) = island.json("delete", first, "--dry-run")
    text = island.text("delete", first, "--dry-run")
    assert text.startswith(f"Would delete snapshot {first} of volume disk: ")
    assert len(island.json("list")) == 2, "a dry run deletes nothing"
    assert island.text("delete", first[:8]).startswith(f"Deleted snapshot {first} of volume disk: ")
    (plan,) = island.json("sweep", "--dry-run")
    assert plan["bytes_freed"] == would["bytes_freed"]
    *steps, last = island.text("sweep", "--dry-run").splitlines()
    assert re.match(r"Volume disk: would remove \d objects? \(", last)
    assert re.fullmatch(
        rf"rewrite +\d\.\d MiB  disk/packs/{first}/0-00000000: no snapshot needs \d\d % of it\n"
        rf"remove +\d+ B  disk/manifests/{first}-0: its snapshot was deleted",
        "\n".join(steps),
    )
    assert len(steps) == len(plan["steps"]) == plan["objects_removed"]
    before = occupied(island.repository / "disk/packs") + occupied(island.repository / "disk/manifests")
    text = island.text("sweep", "--grace", "0")
    after = occupied(island.repository / "disk/packs") + occupied(island.repository / "disk/manifests")
    assert before - after == plan["bytes_freed"]
    assert re.fullmatch(r"Volume disk: removed \d objects? \(.* [KM]iB\).*; freed .*iB\.\n", text)
    assert island.text("sweep") == "Volume disk: nothing to remove.\n"
    assert island.text("sweep", "--quiet") == ""


def occupied(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "grace, kept", [("24h", True), ("90m", True), ("3600s", True), ("7d", True), ("0", False)]
)
def test_grace(island: Island, disk: Path, grace: str, kept: bool) -> None:
    island("delete", island.json("snapshot", disk)["snapshot"])
    (swept,) = island.json("sweep", "--dry-run", "--grace", grace)
    assert (swept["objects_removed"] == 0) == kept


def test_grace_is_compared_in_its_unit(island: Island, disk: Path) -> None:
    island("delete", island.json("snapshot", disk)["snapshot"])
    assert island.json("sweep", "--dry-run", "--grace", "0.001s")[0]["objects_removed"] > 0
    assert island.json("sweep", "--dry-run", "--grace", "0.001d")[0]["objects_removed"] == 0


def test_adopt_lets_another_host_go_on(island: Island, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = island.json("snapshot", disk)["snapshot"]
    monkeypatch.setenv("ISLAND_STATE", str(island.state) + "2")
    assert "island adopt disk" in island.fails(4, "snapshot", disk)
    assert "because other hosts or users own its volumes (disk)" in island.fails(4, "sweep")
    assert island.text("adopt", "disk") == "This host now owns volume disk with 1 snapshot (epoch 1).\n"
    assert island.json("snapshot", disk)["parent"] == first


def test_common_options_before_or_after_the_verb(
    island: Island, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    island("-r", elsewhere, "snapshot", disk)
    assert not island.repository.exists(), "-r goes before the environment"
    monkeypatch.delenv("ISLAND_REPOSITORY")
    before = island.text("--json", "--repository", elsewhere, "list")
    assert len(json.loads(before)) == 1
    assert island.text("list", "--json", "-r", elsewhere) == before
    assert island.text("-r", "/nowhere", "list", "-r", elsewhere, "--json") == before, "the last one counts"


def test_names_that_are_not_utf8(island: Island, disk: Path, tmp_path: Path) -> None:
    strange = os.path.join(os.fsencode(tmp_path), b"d\xff.qcow2")
    os.rename(disk, strange)
    name = os.fsdecode(strange)
    assert "--volume" in island.fails(2, "snapshot", name)
    assert "UTF-8" in island.fails(2, "snapshot", disk.parent, "--label", "\udcff")
    assert island.json("snapshot", name, "--volume", "d")["blocks_changed"] == 48
    assert island.json("snapshot", name)["rule"] == "table-diff"
    target = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"t\xfe"))
    assert island.json("restore", "d@latest", target)["target"] == target
    assert "t\\udcfe already exists" in island.fails(4, "restore", "d@latest", target)


def test_as_a_process_and_as_a_console_script(island: Island, disk: Path) -> None:
    for words in (["snapshot", disk], ["list"], ["show", "disk@latest"]):
        process = island.start(*words, "--json")
        out, err = process.communicate()
        assert (process.returncode, err) == (0, b"")
        assert json.loads(out)
    script = Path(sys.executable).with_name("island")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"island \d+\.\d+\.\d+, digests by (libxxhash|python-xxhash).*\n", done.stdout)


def test_unpin_drops_the_pins_of_every_repository_and_nothing_else(island: Island, disk: Path) -> None:
    qemu.snapshot_create(disk, "mine")
    island.json("snapshot", disk)
    island.json("snapshot", disk, "-r", f"{island.repository}2")
    assert len(pins(disk)) == 3
    before = qemu.content(disk)
    answer = island.json("unpin", disk)
    assert (len(answer["pins"]), pins(disk)) == (2, ["mine"])
    assert qemu.content(disk) == before
    qemu.check(disk)
    assert island.json("snapshot", disk)["rule"] == "full-scan"
    assert island.text("unpin", disk).startswith("Dropped 1 pin from ")
    assert island.text("unpin", disk) == f"There is no pin in {disk}.\n"


def test_unpin_of_orphans_keeps_what_a_table_diff_can_use(island: Island, disk: Path) -> None:
    taken = island.json("snapshot", disk)
    orphan = pins(disk)[0].replace(taken["snapshot"], "0" * 32)
    stranger = "island-00000000.disk-" + "0" * 32
    for name in (orphan, stranger):
        qemu.snapshot_create(disk, name)
    told = island.text("unpin", disk, "--orphans")
    assert told.startswith(f"Dropped 1 pin from {disk}: ")
    assert told.endswith("; other pins stay.\n")
    told = island.text("unpin", disk, "--orphans")
    assert told == f"No interrupted snapshot left a pin in {disk}; other pins stay.\n"
    assert orphan not in pins(disk)
    assert stranger in pins(disk)
    island.json("delete", "disk@latest")
    assert island.json("unpin", disk, "--orphans")["pins"] == []
    qemu.noise(disk, 10 * MIB, MIB)
    assert island.json("snapshot", disk)["blocks_changed"] > 0


@needs_storage_daemon
def test_unpin_of_a_volume_in_use(island: Island, disk: Path) -> None:
    with StorageDaemon(disk) as daemon:
        island.json("snapshot", disk, "--qmp", daemon.qmp_socket)
        daemon.write(MIB, MIB, 9)
        assert island.json("unpin", disk, "--qmp", daemon.qmp_socket)["bytes_freed"] >= 0
    assert pins(disk) == []
    qemu.check(disk)


def test_restore_without_a_pin_is_as_one_never_snapshotted(
    island: Island, disk: Path, tmp_path: Path
) -> None:
    island.json("snapshot", disk)
    copy = tmp_path / "copy.qcow2"
    island.json("restore", "disk@latest", copy, "--no-pin")
    assert pins(copy) == []
    qemu.check(copy)
    qemu.compare(disk, copy, other_format="qcow2")
    assert island.json("snapshot", copy, "--volume", "copy")["parent"] is None


def test_progress_as_lines_of_json(island: Island, disk: Path) -> None:
    done = island.start("snapshot", disk, "--json", "--json-progress")
    output, complaints = done.communicate()
    assert json.loads(output)["bytes_read"] == 3 * MIB
    told = [json.loads(line) for line in complaints.splitlines()]
    assert [list(line) for line in told] == [["phase", "done", "total"]] * len(told)
    sent = [line for line in told if line["phase"] == "send"]
    assert sent[-1]["done"] == sent[-1]["total"] == 3 * MIB
    assert told[-1]["phase"] == "commit"
