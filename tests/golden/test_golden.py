"""A repository that an earlier version wrote is read by this one, and by a reader that is not ours.

`repository/` and `expected.json` were made by `make.py`, once. A test that fails here means that a change
of the code has made repositories of users unreadable: mend the code, and never these files.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from island_fast.api import Repository
from island_fast.formats.catalog import decode_record, encode_record
from island_fast.formats.keys import SnapshotNumbers
from island_fast.repository.local_state import LocalState
from tests.golden import make, reader
from tests.support import qemu

EXPECTED = json.loads(make.EXPECTED.read_text())
LINEAGES = list(EXPECTED["lineages"])
FORMAT = Path(__file__).parents[2] / "docs" / "format.md"

Live = dict[str, dict[str, Any]]


STATE = ("live", "dropped", "packs", "dead")


def live_of(lineage: str) -> Live:
    live: Live = EXPECTED["lineages"][lineage]["live"]
    return live


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The golden repository where it may be written to, its files as private as a store makes them."""
    target = tmp_path / "repository"
    shutil.copytree(make.REPOSITORY, target)
    for path in target.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return target


@pytest.fixture
def opened(copy: Path, tmp_path: Path) -> Repository:
    return Repository.open(str(copy), state=LocalState(tmp_path / "state"))


def assert_read_independently(root: Path, lineage: str, live: Live) -> None:
    """What reader.py finds in `lineage` is `live`, nothing more and nothing less."""
    state = reader.State(root, lineage)
    assert list(state.live) == list(live)
    for snapshot, expected in live.items():
        row = state.live[snapshot]
        assert {key: row[key] for key in ("parent", "label", "volume_size")} == {
            key: expected[key] for key in ("parent", "label", "volume_size")
        }
        assert sha256(reader.volume(root, lineage, state, snapshot)) == expected["sha256"]


def restored(repository: Repository, reference: str, target: Path) -> str:
    repository.restore(reference, target, image_format="raw")
    digest = sha256(target.read_bytes())
    target.unlink()
    return digest


@pytest.mark.parametrize("lineage", LINEAGES)
def test_the_independent_reader_decodes_every_snapshot(lineage: str) -> None:
    assert_read_independently(make.REPOSITORY, lineage, live_of(lineage))
    state = reader.State(make.REPOSITORY, lineage)
    assert state.epoch == EXPECTED["lineages"][lineage]["epoch"]
    for snapshot, expected in live_of(lineage).items():
        head, _ = reader.manifest(make.REPOSITORY, lineage, state.live[snapshot])
        assert head["properties"].items() >= expected["properties"].items()


@pytest.mark.parametrize("lineage", LINEAGES)
def test_the_independent_reader_finds_the_catalog_consistent(lineage: str) -> None:
    """Checkpoints equal the records before them, and no live snapshot needs a slot that is dead."""
    state = reader.State(make.REPOSITORY, lineage)
    replayed = reader.State(make.REPOSITORY, lineage, from_the_first=True)
    for name in STATE:
        assert getattr(state, name) == getattr(replayed, name)
    assert list(state.live) == list(replayed.live)
    for row in state.live.values():
        _, runs = reader.manifest(make.REPOSITORY, lineage, row)
        needed = {(key, slot + i) for _, length, key, slot in runs for i in range(length)}
        assert not needed & state.dead


def test_the_golden_repository_holds_what_it_is_there_for() -> None:
    """A checkpoint behind record 0, both codecs, a repack, a pack swept away, dead slots, a branch."""
    root = make.REPOSITORY
    state = reader.State(root, "vol-1")
    assert state.epoch == 1
    assert state.last > 32
    assert state.dead
    assert state.dropped
    assert any(suffix for _, suffix, *_ in state.packs.values())
    assert {number for _, number in state.packs} == {0, 1}
    parents = [row["parent"] for row in state.live.values()]
    assert len(parents) > len(set(parents))
    names = [str(p.relative_to(root)) for p in (root / "vol-1" / "catalog").glob("*-0*")]
    records = [reader.meta(reader.sections(root, name, b"ISLANDCR")[0]) for name in names]
    assert {record["event"] for record in records} == {"owner", "snapshot", "delete", "sweep"}
    assert any(record["rows_32"] for record in records)
    codecs = set()
    for path in (root / "vol-1" / "packs").rglob("?-*"):
        found, _ = reader.sections(root, str(path.relative_to(root)), b"ISLANDPK")
        codecs |= {row[2] for row in reader.INDEX.iter_unpack(found[2])}
    assert codecs == {0, 1, 255}
    assert sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) < 300_000


def test_this_version_lists_and_restores_every_snapshot(opened: Repository, tmp_path: Path) -> None:
    assert opened.id == EXPECTED["id"]
    listed = {(s.lineage, s.snapshot): s for s in opened.snapshots()}
    assert set(listed) == {(name, snapshot) for name in LINEAGES for snapshot in live_of(name)}
    for (lineage, snapshot), found in listed.items():
        expected = live_of(lineage)[snapshot]
        assert found.parent == expected["parent"]
        assert found.label == expected["label"]
        assert found.volume_size == expected["volume_size"]
        assert restored(opened, f"{lineage}@{snapshot}", tmp_path / "raw") == expected["sha256"]


@pytest.mark.parametrize("turn", [1, -1])
def test_this_version_deletes_and_sweeps_what_an_old_one_wrote(
    opened: Repository, copy: Path, tmp_path: Path, turn: int
) -> None:
    """Its snapshots are deleted one by one from either end; after each, both readers read the rest."""
    live = deepcopy(live_of("vol-1"))
    opened.adopt("vol-1")
    for snapshot in list(live)[::turn]:
        opened.delete([f"vol-1@{snapshot}"])
        gone = live.pop(snapshot)
        for row in live.values():
            if row["parent"] == snapshot:
                row["parent"] = gone["parent"]
        opened.sweep(grace=0)
        assert_read_independently(copy, "vol-1", live)
        for left, expected in live.items():
            assert restored(opened, f"vol-1@{left}", tmp_path / "raw") == expected["sha256"]
    assert not reader.State(copy, "vol-1").packs


@qemu.needs_qemu
def test_a_volume_restored_from_the_golden_repository_goes_on_as_a_branch(
    opened: Repository, copy: Path, tmp_path: Path
) -> None:
    opened.adopt("vol-1")
    snapshot, expected = list(live_of("vol-1").items())[-1]
    image = tmp_path / "again.qcow2"
    opened.restore(f"vol-1@{snapshot}", image)
    qemu.io(image, qemu.write(5 * 65536, 65536, 77))
    taken = opened.snapshot(image)
    assert (taken.lineage, taken.parent, taken.rule) == ("vol-1", snapshot, "table-diff")
    data = bytearray(reader.volume(copy, "vol-1", reader.State(copy, "vol-1"), snapshot))
    assert sha256(data) == expected["sha256"]
    data[5 * 65536 : 6 * 65536] = bytes([77]) * 65536
    assert reader.volume(copy, "vol-1", reader.State(copy, "vol-1"), taken.snapshot) == data


@qemu.needs_qemu
def test_what_this_version_makes_is_read_by_the_independent_reader(tmp_path: Path) -> None:
    """The whole history that made the golden repository, again and with the present code."""
    make.make(tmp_path / "repository", tmp_path / "expected.json")
    expected = json.loads((tmp_path / "expected.json").read_text())
    for lineage, contents in expected["lineages"].items():
        assert_read_independently(tmp_path / "repository", lineage, contents["live"])


@pytest.mark.parametrize("newest_first", [False, True])
def test_copies_of_what_an_old_version_wrote_are_read_by_the_independent_reader(
    opened: Repository, tmp_path: Path, newest_first: bool
) -> None:
    """Where the newest are copied first, the others come with checkpoints that give them their places."""
    root = tmp_path / "far"
    with Repository.open(str(root), state=opened.state, create=True) as far:
        if newest_first:
            opened.copy(far, [f"{lineage}@latest" for lineage in LINEAGES])
        opened.copy(far)
    for lineage in LINEAGES:
        state = reader.State(root, lineage)
        replayed = reader.State(root, lineage, from_the_first=True)
        assert [getattr(state, name) for name in STATE] == [getattr(replayed, name) for name in STATE]
        assert not state.dead
        live = live_of(lineage)
        if newest_first:
            live = {id_: row | {"parent": state.live[id_]["parent"]} for id_, row in live.items()}
        assert_read_independently(root, lineage, live)


def test_the_golden_repository_is_never_made_again(tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in make.REPOSITORY.rglob("*")}
    with pytest.raises(SystemExit, match="never made again"):
        make.make(make.REPOSITORY, tmp_path / "expected.json")
    assert before == {path: path.stat().st_mtime_ns for path in make.REPOSITORY.rglob("*")}


def test_the_reader_is_small_and_independent() -> None:
    source = Path(reader.__file__).read_text()
    assert len(source.splitlines()) < 150
    nodes = list(ast.walk(ast.parse(source)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported <= {*sys.stdlib_module_names, "xxhash", "zstandard"}


@pytest.mark.parametrize("damage", ["flip", "cut", "swap"])
def test_the_reader_notices_damage(copy: Path, damage: str) -> None:
    snapshot = list(live_of("vol-1"))[-1]
    state = reader.State(copy, "vol-1")
    packs = sorted((copy / "vol-1" / "packs" / snapshot).iterdir())
    data = bytearray(packs[0].read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "cut":
        del data[-1]
    else:
        other = next(p for p in (copy / "vol-1" / "packs").rglob("0-*") if p != packs[0])
        data = bytearray(other.read_bytes())
    packs[0].write_bytes(data)
    with pytest.raises(AssertionError):
        reader.volume(copy, "vol-1", state, snapshot)


def read_dumps() -> list[bytes]:
    """Return the objects that the document shows as hex dumps."""
    parts = re.findall(r"^```\n(0000  .*?)^```", FORMAT.read_text(), re.MULTILINE | re.DOTALL)
    rows = [re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} {1,2}){1,16})", part, re.MULTILINE) for part in parts]
    return [bytes.fromhex("".join(found)) for found in rows]


def put_dump(root: Path, name: str, data: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True)
    path.write_bytes(data)


def test_the_examples_in_the_document_are_real_objects(tmp_path: Path) -> None:
    stop, manifest = read_dumps()
    name = "vol/catalog/000000-stop"
    put_dump(tmp_path, name, stop)
    found, _ = reader.sections(tmp_path, name, b"ISLANDST")
    assert reader.meta(found) == {
        "writer": "00112233445566778899aabbccddeeff",
        "epoch": 0,
        "time": 1700000000000000000,
    }
    parent, snapshot = "00112233445566778899aabbccddeeff", "9a0c4bb3ac4a4d0d8d3e5d0c6a4b2f10"
    put_dump(tmp_path, f"v/manifests/{snapshot}-1", manifest)
    row = {"id": snapshot, "attempt": 1, "checksum": "f3c456806bd1d4b08dec3b8f360188ff"}
    head, runs = reader.manifest(tmp_path, "v", row)
    assert runs == [(0, 4, (parent, 300), 0), (7, 1, (snapshot, 0), 2), (8, 1, (parent, 300), 8)]
    assert head["volume_size"] == 600000
    assert head["snapshots"] == [parent, snapshot]


def test_the_other_examples_in_the_document_hold() -> None:
    assert reader.columns({0: bytes([1, 2, 3, 0, 0, 2])}, 0, 1, 3) == [(1,), (2,), (515,)]
    assert [reader.unzigzag(n) for n in range(5)] == [0, -1, 1, -2, 2]


def test_the_sections_that_docstrings_point_to_exist() -> None:
    headings = set(re.findall(r"^## (.*)$", FORMAT.read_text(), re.MULTILINE))
    sources = [path.read_text() for path in (Path(__file__).parents[2] / "island_fast").rglob("*.py")]
    named = [re.findall(r'docs/format\.md,\s+"([^"]+)"', source) for source in sources]
    wanted = {" ".join(name.split()) for names in named for name in names}
    assert len(wanted) > 5
    assert wanted <= headings


def test_every_record_is_written_with_the_bytes_that_were_read() -> None:
    records = [path for path in make.REPOSITORY.glob("*/catalog/*") if not path.name.endswith("-stop")]
    assert len(records) > 32
    for path in records:
        name, numbers = path.relative_to(make.REPOSITORY).as_posix(), SnapshotNumbers()
        record, _ = decode_record(name, path.read_bytes(), numbers)
        assert encode_record(name, record, numbers)[0] == path.read_bytes(), name
