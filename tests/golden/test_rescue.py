"""docs/rescue.py, the second implementation of the format, on both golden repositories, whole and damaged.

Whatever is lost, it writes what the snapshot held, or says what it could not write; never anything else.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from island_fast.api import Repository
from island_fast.repository.local_state import LocalState
from tests.golden import make, make_second
from tests.support import qemu

SCRIPT = Path(__file__).parents[2] / "docs" / "rescue.py"
BLOCK = 65536

_spec = importlib.util.spec_from_file_location("rescue", SCRIPT)
assert _spec
assert _spec.loader
rescue = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(rescue)

FIRST = {name: one["live"] for name, one in json.loads(make.EXPECTED.read_text())["lineages"].items()}
SECOND = json.loads(make_second.EXPECTED.read_text())
GOLDEN = [(make.REPOSITORY, name, rows) for name, rows in FIRST.items()]
GOLDEN += [(make_second.REPOSITORY, name, rows) for name, rows in SECOND.items()]
NAMES = [f"{root.parent.name}-{name}" for root, name, _ in GOLDEN]

Rows = Mapping[str, Mapping[str, Any]]


def hash_file(path: Path, *, sparse: bool) -> str:
    """Return what `expected.json` has for a volume; with `sparse` as `make_second.hash_blocks` does."""
    if not sparse:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    blocks = {}
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        at = 0
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // BLOCK * BLOCK
            except OSError:  # no more data
                break
            file.seek(at)
            blocks[at // BLOCK] = file.read(BLOCK)
            at += BLOCK
    return make_second.hash_blocks(blocks)


def assert_rescued(root: Path, name: str, live: Rows, folder: Path, use_catalog: bool) -> None:
    """What rescue.py finds in a volume is `live`; without a catalog, there can be more."""
    found = rescue.Volume(root, name, use_catalog)
    if use_catalog:
        assert not found.lost_catalog
        assert list(found.live) == list(live)
        keys = ("parent", "label", "volume_size")
        assert [[row[key] for key in keys] for row in found.live.values()] == [
            [row[key] for key in keys] for row in live.values()
        ]
    for snapshot, expected in live.items():
        attempts = found.manifests[snapshot]
        digests = set()
        for key in [snapshot] if use_catalog or len(attempts) == 1 else [f"{snapshot}-{n}" for n in attempts]:
            target = folder / "rescued.raw"
            assert rescue.restore(root, name, key, target, use_catalog) == 0
            assert target.stat().st_size == expected["volume_size"]
            digests.add(hash_file(target, sparse=root.parent.name == "second"))
            target.unlink()
        assert expected["sha256"] in digests


@pytest.mark.parametrize("use_catalog", [True, False], ids=["catalog", "manifests"])
@pytest.mark.parametrize("root, name, live", GOLDEN, ids=NAMES)
def test_it_lists_and_restores_every_snapshot(
    root: Path, name: str, live: Rows, tmp_path: Path, use_catalog: bool
) -> None:
    assert_rescued(root, name, live, tmp_path, use_catalog)


def test_what_an_interrupted_attempt_left_is_restored_as_it_was(tmp_path: Path) -> None:
    """Packs of several attempts have one number: each manifest means the newest one that it can know."""
    (first, *_) = SECOND["attempts"]
    target = tmp_path / "rescued.raw"
    assert rescue.restore(make_second.REPOSITORY, "attempts", f"{first}-2", target, False) == 0
    content = target.read_bytes()
    for block, tag in {
        0: "two",
        3: "one",
        30: "two",
        31: "zero",
        40: "zero",
        60: "zero",
        89: "zero",
        95: "one",
    }.items():
        assert content[block * BLOCK :].startswith(f"block {block}, {tag}\n".encode()), block
    assert not any(content[BLOCK : 3 * BLOCK])


def test_the_second_repository_holds_what_it_is_there_for() -> None:
    root = make_second.REPOSITORY
    widths, numbers, attempts, groups, checkpoints = set(), set(), set(), [], []
    for path in root.glob("*/manifests/*"):
        frame = rescue.Frame(root, str(path.relative_to(root)), b"ISLANDMF")
        head = frame.meta()
        widths |= {len(frame.section(number)) // head["runs"] for number in (32, 33, 34, 35)}
        numbers |= {rescue.unzigzag(delta) for (delta,) in frame.table(18, 1, head["packs"])}
        attempts.add(head["attempt"])
        groups.append(head["group"])
    for path in root.glob("*/catalog/*-0*"):
        frame = rescue.Frame(root, str(path.relative_to(root)), b"ISLANDCR")
        head = frame.meta()
        widths |= {len(frame.section(19)) // head["rows_16"]} if head["rows_16"] else set()
        if head["event"] == "snapshot" and head["checkpoint"]:
            checkpoints.append(head["number"])
    assert {1, 2, 4, 8} <= widths
    assert min(numbers) < 0
    assert {0, 2, 3} <= attempts
    assert max(attempts) > 2**32  # a copy's
    assert sorted(map(groups.count, filter(None, groups))) == [2, 2]
    assert 32 in checkpoints
    assert [number for number in checkpoints if number % 32]
    names = [path.name for path in root.glob("attempts/packs/*/*")]
    assert sorted(name for name in names if name.endswith(("-00000001", "-00000002"))) == [
        "0-00000001", "1-00000001", "1-00000002", "2-00000002",
    ]  # fmt: skip
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) < 200_000


def test_this_version_lists_and_restores_the_second_repository(tmp_path: Path) -> None:
    root = copy_of(make_second.REPOSITORY, tmp_path)
    with Repository.open(str(root), state=LocalState(tmp_path / "state")) as opened:
        for name, live in SECOND.items():
            assert [one.snapshot for one in opened.snapshots(name)] == list(live)
            for snapshot, expected in live.items():
                target = tmp_path / "restored.raw"
                opened.restore(f"{name}@{snapshot}", target, image_format="raw")
                assert hash_file(target, sparse=True) == expected["sha256"]
                target.unlink()
        assert opened.verify(sample=1.0).damages == ()


@qemu.needs_qemu
def test_every_stage_of_the_first_history_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The present code makes it again; its snapshots are read after each one that is taken or deleted."""
    root = tmp_path / "first" / "repository"
    root.parent.mkdir()
    stages = 0

    def then_check(change: Callable[..., object]) -> Callable[..., object]:
        def changed(lineage: make.Lineage, *args: object, **more: object) -> object:
            nonlocal stages
            stages += 1
            answer = change(lineage, *args, **more)
            if stages < 14 or stages > 40:  # in between nothing changes
                assert_rescued(root, lineage.name, lineage.live, tmp_path, stages % 3 > 0)
            return answer

        return changed

    for verb in ("take", "delete"):
        monkeypatch.setattr(make.Lineage, verb, then_check(getattr(make.Lineage, verb)))
    make.make(root, tmp_path / "expected.json")
    assert stages > 44


@qemu.needs_qemu
def test_every_stage_of_the_second_history_is_read(tmp_path: Path) -> None:
    """The present code makes it again; each stage is read at once, with and without the catalog."""
    root = tmp_path / "second" / "repository"
    root.parent.mkdir()
    stages = 0

    def check(lineages: list[make_second.Lineage]) -> None:
        nonlocal stages
        stages += 1
        for use_catalog in (True, False):
            one = lineages[-1]
            assert_rescued(root, one.name, one.live, tmp_path, use_catalog)

    make_second.make(root, tmp_path / "expected.json", check)
    assert stages > 15


@qemu.needs_qemu
def test_the_same_code_makes_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for number in "12":
        root = tmp_path / number
        make_second.make(root, tmp_path / f"{number}.json")
        made.append({path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()})
    assert made[0] == made[1]


# What is lost.


def copy_of(repository: Path, folder: Path) -> Path:
    """A copy that may be changed, its files as private as a store makes them."""
    target = folder / repository.parent.name / "repository"
    shutil.copytree(repository, target)
    for path in target.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return target


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return copy_of(make.REPOSITORY, tmp_path)


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return copy_of(make_second.REPOSITORY, tmp_path)


def test_the_object_repository_is_not_needed(first: Path, tmp_path: Path) -> None:
    (first / "repository").unlink()
    assert_rescued(first, "vol-1", FIRST["vol-1"], tmp_path, True)


def test_stop_objects_are_not_needed(first: Path, tmp_path: Path) -> None:
    """Steps that look for the first epoch without a stop would find a state of the former owner's."""
    (first / "vol-1/catalog/000000-stop").unlink()
    assert_rescued(first, "vol-1", FIRST["vol-1"], tmp_path, True)


@pytest.mark.parametrize("which", ["first", "second"])
def test_without_a_catalog_manifests_are_listed_and_restored(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(which)
    for name, live in (FIRST if which == "first" else SECOND).items():
        shutil.rmtree(root / name / "catalog")
        assert name in rescue.list_volumes(root)
        assert rescue.Volume(root, name).lost_catalog
        assert_rescued(root, name, live, tmp_path, False)
    assert rescue.list_snapshots(root, True) == 6


@pytest.mark.parametrize("lost", ["000001-00000034", "000001-00000032", "000001-*", "flip"])
def test_a_lost_record_is_noticed_and_never_gives_an_older_state(
    first: Path, tmp_path: Path, lost: str
) -> None:
    """A hole is damage and no end. Then the manifests are read, which hold at least what is live."""
    catalog = first / "vol-1/catalog"
    if lost == "flip":
        flip(catalog / "000001-00000035", 900)
    else:
        for path in catalog.glob(lost):
            path.unlink()
    if lost == "000001-*":
        (catalog / "000001-stop").touch()
    assert rescue.Volume(first, "vol-1").lost_catalog
    assert_rescued(first, "vol-1", FIRST["vol-1"], tmp_path, False)


def test_a_lost_newest_record_leaves_a_manifest_that_is_told_of(
    second: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (second / "wide/catalog/000000-00000002").unlink()
    assert list(rescue.Volume(second, "wide").live) == list(SECOND["wide"])[:1]
    rescue.list_snapshots(second, True)
    assert "wide: --no-catalog lists 1 more" in capsys.readouterr().err
    assert list(rescue.Volume(second, "wide", False).live) == list(SECOND["wide"])


def find_lost(text: str) -> set[int]:
    """Return the blocks that the command lists as lost."""
    extents = re.findall(r"^lost: (\d+) bytes at byte (\d+)", text, re.MULTILINE)
    return {n // BLOCK for size, start in extents for n in range(int(start), int(start) + int(size), BLOCK)}


def assert_only_listed_is_lost(
    root: Path, whole: bytes, snapshot: str, folder: Path, text: Iterator[str]
) -> set[int]:
    """All blocks are right, or listed and zero; return those."""
    target = folder / "rescued.raw"
    assert rescue.restore(root, "vol-1", snapshot, target, True) == 6
    found = target.read_bytes()
    printed = next(text)
    assert "is not the volume" in printed
    lost = find_lost(printed)
    for at in range(0, len(whole), BLOCK):
        wanted = bytes(len(whole[at : at + BLOCK])) if at // BLOCK in lost else whole[at : at + BLOCK]
        assert found[at : at + BLOCK] == wanted
    assert lost
    target.unlink()
    return lost


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["delete", "truncate", "block", "index", "header", "swap"])
def test_blocks_of_a_damaged_pack_are_zero_and_listed(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    snapshot = list(FIRST["vol-1"])[3]
    whole_file = tmp_path / "whole.raw"
    assert rescue.restore(first, "vol-1", snapshot, whole_file, True) == 0
    capsys.readouterr()
    (pack,) = (first / "vol-1/packs" / snapshot).iterdir()
    blocks = 3
    match damage:
        case "delete":
            pack.unlink()
        case "truncate":
            data = pack.read_bytes()
            pack.write_bytes(data[: len(data) - 2])
            blocks = 1
        case "block":
            flip(pack, -1)
            blocks = 1
        case "index":
            flip(pack, 400)
        case "header":
            flip(pack, 20)
        case "swap":
            other = next(path for path in (first / "vol-1/packs").rglob("0-*") if path != pack)
            shutil.copy(other, pack)
    output = (capsys.readouterr().out for _ in range(1))
    lost = assert_only_listed_is_lost(first, whole_file.read_bytes(), snapshot, tmp_path, output)
    assert len(lost) == blocks


def test_no_damaged_byte_gives_other_content(second: Path, tmp_path: Path) -> None:
    """Every third byte of each object of a volume: what comes is right, or it is said what does not."""
    (snapshot,) = SECOND["disk-a"]
    target = tmp_path / "rescued.raw"
    outcomes = set()
    for path in sorted(path for path in (second / "disk-a").rglob("*") if path.is_file()):
        data = path.read_bytes()
        for at in range(0, len(data), 3):
            path.write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
            code = rescue.restore(second, "disk-a", snapshot, target, True)
            outcomes.add(code)
            assert code in (0, 6)
            if code == 0:
                assert hash_file(target, sparse=True) == SECOND["disk-a"][snapshot]["sha256"]
            target.unlink(missing_ok=True)
        path.write_bytes(data)
    assert outcomes == {0, 6}


def test_two_packs_of_different_copies_are_a_doubt(second: Path, tmp_path: Path) -> None:
    """Only the catalog could say which one a later snapshot means, so neither is taken."""
    shutil.rmtree(second / "copied/catalog")
    volume = rescue.Volume(second, "copied")
    again = next(one for one, attempts in volume.manifests.items() if len(attempts) == 2)
    (name,) = (second / "copied/packs" / again).glob("*-00000001")
    other = next(attempt for attempt in volume.manifests[again] if not name.name.startswith(str(attempt)))
    shutil.copy(name, name.with_name(f"{other}-00000001"))
    for manifest in (second / "copied/manifests").glob(f"{again}-*"):
        manifest.unlink()
    volume = rescue.Volume(second, "copied")
    with pytest.raises(rescue.Damaged, match="only the catalog can say"):
        volume.find_attempt((again, 1), next(iter(volume.live)), 0)


# The command.


def test_it_runs_alone(tmp_path: Path) -> None:
    """One file, copied elsewhere, in a Python that does not look for our package."""
    script = tmp_path / "rescue.py"
    shutil.copy(SCRIPT, script)
    (snapshot, expected) = next(iter(FIRST["vol-1"].items()))

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", str(script), *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    listed = run(make.REPOSITORY)
    assert listed.returncode == 0
    assert [line.split()[1] for line in listed.stdout.splitlines() if line.startswith("vol-1 ")] == list(
        FIRST["vol-1"]
    )
    done = run(make.REPOSITORY, "vol-1", snapshot[:8], "volume.raw")
    assert (done.returncode, done.stdout) == (0, "volume.raw is the whole volume\n")
    assert hash_file(tmp_path / "volume.raw", sparse=False) == expected["sha256"]
    assert run(make.REPOSITORY, "vol-1", snapshot, "volume.raw").returncode == 4
    assert run(make.REPOSITORY, "vol-1", "ffff", "other.raw").returncode == 3
    assert run(tmp_path / "nothing").returncode == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rescue.py", "volume.raw"]


def test_it_is_small_and_independent() -> None:
    source = SCRIPT.read_text()
    assert len(source.splitlines()) < 450
    nodes = list(ast.walk(ast.parse(source)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= {*sys.stdlib_module_names, "xxhash", "zstandard"}
