"""Blocks that a table diff calls unchanged are read as a sample, and what no table shows comes to light."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from island_fast.api import Repository
from island_fast.bench.synthetic_volume import SyntheticVolume
from island_fast.dirtymap import DirtyMap
from island_fast.formats.runs import Runs
from island_fast.images.source import END, TABLE_DIFF, Change, View
from island_fast.operations.sample import Sample, compare_sample
from island_fast.qcow2.block_reader import PointReader
from island_fast.qcow2.image import Image
from island_fast.repository.local_state import LocalState
from island_fast.results import SnapshotTaken
from tests.support import qemu
from tests.support.memory_store import MemoryStore

MIB = 1 << 20
BLOCK = 1 << 16


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "vol.qcow2", 64 * MIB)
    qemu.noise(path, 0, 4 * MIB)
    qemu.noise(path, 30 * MIB, 4 * MIB)
    return path


def snapshot_and_check(repository: Repository, image: Path, folder: Path, **how: object) -> SnapshotTaken:
    """Take a snapshot, which must restore to what qemu reads."""
    taken = repository.snapshot(image, volume="vol", **how)  # type: ignore[arg-type]
    target = folder / "check.raw"
    repository.restore(taken.snapshot, target, image_format="raw")
    assert target.read_bytes() == qemu.content(image)
    target.unlink()
    return taken


def is_noticed(taken: SnapshotTaken) -> bool:
    """Whether the sample failed: the rule, the reason and a note all say so."""
    told = "differs from the parent, which the tables do not show" in taken.reason
    assert told == (taken.rule == "full-scan") == bool(taken.notes), taken
    assert not told or "everything was read" in taken.notes[0]
    return told


def places_in_file(image: Path, blocks: range) -> list[int]:
    """Where the file holds these blocks of the volume, as the active tables say."""
    with Image.open(image) as opened:
        reader = PointReader(opened, opened.active_point())
        entries = reader._read_entries(np.array(blocks, np.int64)).byteswap()
        return [int(entry) & 0x00FF_FFFF_FFFF_FE00 for entry in entries[:, 0]]


def write_behind(image: Path, blocks: range) -> None:
    """Write into clusters of the file in place, as no qemu would: the tables stay as they are."""
    places = places_in_file(image, blocks)
    with image.open("r+b") as file:
        for place in places:
            file.seek(place)
            file.write(os.urandom(BLOCK))


@qemu.needs_qemu
def test_a_volume_that_was_written_behind_its_tables_is_read_in_full(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    first = repository.snapshot(image, volume="vol")
    assert first.blocks_sampled == 0, "a full scan reads everything anyway"
    qemu.io(image, qemu.write(MIB, BLOCK, 7))
    write_behind(image, range(480, 544))
    taken = snapshot_and_check(repository, image, tmp_path)
    assert is_noticed(taken)
    assert first.snapshot in taken.notes[0]
    assert (taken.parent, taken.blocks_changed) == (first.snapshot, 65)
    qemu.io(image, qemu.write(2 * MIB, BLOCK, 7))
    again = snapshot_and_check(repository, image, tmp_path)
    assert not is_noticed(again)
    assert (again.rule, again.blocks_changed) == ("table-diff", 1)


@qemu.needs_qemu
@pytest.mark.parametrize("block", [31, 33, 47, 511])
def test_a_single_block_beside_what_changed_is_noticed(
    repository: Repository, image: Path, tmp_path: Path, block: int
) -> None:
    """The ends of a change, and of what is stored together, are always in the sample of a small volume."""
    qemu.noise(image, 511 * BLOCK, 2 * BLOCK)
    repository.snapshot(image, volume="vol")
    qemu.io(image, qemu.write(32 * BLOCK, BLOCK, 7), qemu.write(46 * BLOCK, BLOCK, 7))
    qemu.io(image, qemu.write(512 * BLOCK, BLOCK, 7))
    write_behind(image, range(block, block + 1))
    assert is_noticed(snapshot_and_check(repository, image, tmp_path))


@qemu.needs_qemu
def test_an_old_copy_of_part_of_the_file_that_was_put_back_is_noticed(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    repository.snapshot(image, volume="vol")
    places = places_in_file(image, range(64))
    data = image.read_bytes()[min(places) : max(places) + BLOCK]
    qemu.noise(image, 0, 4 * MIB, seed="other")
    repository.snapshot(image, volume="vol")
    new = places_in_file(image, range(64))
    with image.open("r+b") as file:
        file.seek(min(new))
        file.write(data)
    assert is_noticed(snapshot_and_check(repository, image, tmp_path))


@qemu.needs_qemu
@pytest.mark.parametrize("options", [("compat=0.10", "compat=1.1"), ("lazy_refcounts=on",)], ids=str)
def test_an_image_that_was_amended_is_stored_right(
    repository: Repository, image: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    qemu.io(image, qemu.zeroes(MIB, MIB), qemu.zeroes(31 * MIB, MIB))
    repository.snapshot(image, volume="vol")
    qemu.io(image, qemu.zeroes(2 * MIB, MIB), qemu.write(0, BLOCK, 3))
    for option in options:
        qemu.run("qemu-img", "amend", "-f", "qcow2", "-o", option, image)
    qemu.io(image, qemu.write(BLOCK, BLOCK, 4), qemu.write(MIB, BLOCK, 4), qemu.write(31 * MIB, BLOCK, 4))
    snapshot_and_check(repository, image, tmp_path)
    qemu.io(image, qemu.write(BLOCK, BLOCK, 5), qemu.write(MIB + BLOCK, BLOCK, 5))
    snapshot_and_check(repository, image, tmp_path)


@qemu.needs_qemu
def test_a_sample_makes_no_request(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    repository = Repository(store, LocalState(tmp_path / "state"), create=True)
    repository.snapshot(image, volume="vol")
    calls = []
    for sampled in (True, False):
        if not sampled:
            none: Callable[..., Sample] = lambda *_: Sample(0, None)  # noqa: E731
            monkeypatch.setattr("island_fast.operations.snapshot.compare_sample", none)
        store.calls.clear()
        taken = repository.snapshot(image, volume="vol")
        assert bool(taken.blocks_sampled) == sampled
        calls.append(dict(store.calls))
    assert calls[0] == calls[1]


def test_indexes_that_are_not_here_are_not_fetched(tmp_path: Path) -> None:
    """On a host that has just adopted the volume, only zeros could be compared; this volume has none."""
    store = MemoryStore()
    state = LocalState(tmp_path / "state")
    volume = SyntheticVolume(tmp_path / "vol.qcow2", 64, seed=1)
    repository = Repository(store, state, create=True)
    volume.snapshot(repository)
    volume.edit(3)
    for front in [
        path for path in (tmp_path / "state").rglob("*") if "packs" in path.parts and path.is_file()
    ]:
        front.unlink()
    again = Repository(store, state)
    store.calls.clear()
    taken = volume.snapshot(again)
    assert taken.rule == "table-diff"
    assert taken.blocks_sampled == 0
    assert store.calls["get_ranges"] <= 1, "that of the block that changed"


class _Numbers(View):
    """A volume whose blocks are all zero; it notes which are read."""

    def __init__(self, blocks: int) -> None:
        self.volume_size = blocks * BLOCK
        self.seen: set[int] = set()
        self._read = 0

    @property
    def bytes_read(self) -> int:
        return self._read

    def read(self, blocks: np.ndarray, out: np.ndarray) -> None:
        assert (np.diff(blocks) > 0).all()
        self.seen |= set(blocks.tolist())
        self._read += blocks.size * BLOCK
        out[:] = 0


def change_of(blocks: int, changed: list[tuple[int, int]]) -> Change:
    candidates = DirtyMap.from_runs(blocks, np.array(changed, np.int64).reshape(-1, 2))
    replaced = np.concatenate([candidates.runs(), [[blocks, END]]]).astype(np.int64)
    return Change(TABLE_DIFF, "", candidates, candidates, replaced)


@pytest.mark.parametrize("changed", [[], [(0, 1)], [(10, 90)], [(0, 50), (52, 100)], [(0, 100)]], ids=str)
def test_only_unchanged_blocks_are_drawn_few_at_a_time_and_all_in_time(
    changed: list[tuple[int, int]],
) -> None:
    blocks = 100
    change = change_of(blocks, changed)
    view = _Numbers(blocks)
    for number in range(400):
        sample = compare_sample(view, change, Runs.empty(), lambda _: None, 0, str(number))
        assert sample.blocks <= 32
        assert sample.differing is None
    assert view.seen == {block for block in range(blocks) if block not in change.candidates}


@pytest.mark.parametrize("blocks", [0, 1, 2, 15, 17])
def test_small_volumes_have_small_samples(blocks: int) -> None:
    view = _Numbers(blocks)
    sample = compare_sample(view, change_of(blocks, []), Runs.empty(), lambda _: None, 0, "x")
    assert sample.blocks == len(view.seen) <= blocks


def test_most_of_a_sparse_sample_is_of_stored_blocks() -> None:
    """A volume of 16 TiB with little in it: holes prove nothing, so named blocks are preferred."""
    blocks = 1 << 28
    start = np.arange(0, blocks, blocks // 50) + 3
    runs = Runs(start, np.full(start.size, 4), np.zeros(start.size, np.int64), np.arange(start.size) * 4)
    asked: list[int] = []
    view = _Numbers(blocks)
    sample = compare_sample(view, change_of(blocks, []), runs, lambda key: asked.append(key), 0, "x")
    assert asked, "indexes of named blocks were wanted"
    assert sample.blocks <= 16, "only the blocks after runs are known to be zero"
