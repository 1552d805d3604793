"""How the second golden repository was made: `python -m tests.golden.make_second`.

It has what the first one lacks: columns of several bytes, snapshots of several attempts, pack numbers that go
down (column 18 below 0), copies, one that was deleted and made again, groups, and checkpoints in records of
snapshots. It is as small as that can be, and the same code makes the same bytes again. Like the first one it
is never made again: what it is worth is that an old version wrote it.

What each snapshot should hold comes from this script's own model of the bytes; none of our readers has a part
in `expected.json`. The content of a volume is its blocks that are not zero, by number: one has 8 TiB.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from island_fast.api import Repository
from island_fast.errors import StoreError
from island_fast.operations.parent import SnapshotRequest
from island_fast.repository.local_state import LocalState
from island_fast.stores.directory import DirectoryStore
from tests.support import qemu

HERE = Path(__file__).parent / "second"
REPOSITORY = HERE / "repository"
EXPECTED = HERE / "expected.json"
BLOCK = 65536
GROUP = "c0ffee" * 5 + "00"


def hash_blocks(blocks: Mapping[int, bytes]) -> str:
    """Return one hash for what a volume holds: each block that is not zero, after its number."""
    content = hashlib.sha256()
    for block in sorted(blocks):
        if blocks[block].strip(b"\0"):
            content.update(block.to_bytes(8, "little") + blocks[block].ljust(BLOCK, b"\0"))
    return content.hexdigest()


class Volume:
    """A sparse image and the model of its blocks."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = qemu.create(path, size), size
        self.blocks: dict[int, bytes] = {}

    def text(self, tag: str, *blocks: int) -> None:
        """Fill blocks, each with a text of its own."""
        lines = {block: f"block {block}, {tag}\n".encode() for block in blocks}
        self.write({block: (line * (BLOCK // len(line) + 1))[:BLOCK] for block, line in lines.items()})

    def write(self, content: Mapping[int, bytes]) -> None:
        """Begin each block with these bytes; its rest, if any, stays as it is."""
        commands, sources = [], []
        for block, data in content.items():
            kept = data[: self.size - block * BLOCK]
            self.blocks[block] = kept + self.blocks.get(block, b"")[len(kept) :]
            sources.append(self.path.parent / f"{block}.bytes")
            sources[-1].write_bytes(kept)
            commands.append(f"write -s {sources[-1]} {block * BLOCK} {len(kept)}")
        qemu.io(self.path, *commands)
        for source in sources:
            source.unlink()


class Lineage:
    """What the snapshots of one lineage should be."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.live: dict[str, dict[str, object]] = {}

    def take(self, repository: Repository, volume: Volume, label: str) -> str:
        """Take a snapshot without a pin: the time of a pin would be another each time."""
        taken = repository.snapshot(volume.path, volume=self.name, pin=False, label=label)
        parent = next(reversed(self.live), None)
        self.live[taken.snapshot] = {
            "parent": parent,
            "label": label,
            "volume_size": volume.size,
            "sha256": hash_blocks(volume.blocks),
        }
        assert taken.parent == parent
        return taken.snapshot

    def delete(self, repository: Repository, snapshot: str) -> None:
        repository.delete([f"{self.name}@{snapshot}"])
        gone = self.live.pop(snapshot)
        for row in self.live.values():
            if row["parent"] == snapshot:
                row["parent"] = gone["parent"]


After = Callable[[list[Lineage]], None]


def make_wide(repository: Repository, folder: Path) -> Iterator[Lineage]:
    """Blocks that are far from each other: numbers and gaps of four bytes, slots and lengths of two."""
    lineage, volume = Lineage("wide"), Volume(folder / "wide.qcow2", 2**43 + 512)
    volume.text("far", 0, 2**16, 2**24 + 5, 2**27)
    volume.text("long", *range(1000, 1300))
    lineage.take(repository, volume, "far")
    yield lineage
    volume.text("near", 1001, 1299, 2**26)
    lineage.take(repository, volume, "near")
    yield lineage


@contextlib.contextmanager
def answer_lost(ending: str) -> Iterator[None]:
    """Have the store keep the object whose name ends so, and not say that it did."""
    put = DirectoryStore.put

    def put_in_silence(store: DirectoryStore, name: str, parts: list[bytes]) -> None:
        put(store, name, parts)
        if name.endswith(ending):
            raise StoreError("no answer")

    with mock.patch.object(DirectoryStore, "put", put_in_silence), pytest.raises(StoreError):
        yield


def make_attempts(repository: Repository, folder: Path) -> Iterator[Lineage]:
    """Four attempts at a snapshot, with changes in between: its pack numbers go down in the manifest.

    Packs of attempts 0 and 1 stay behind, whose numbers later attempts use again; so does a manifest.
    """
    lineage, volume = Lineage("attempts"), Volume(folder / "attempts.qcow2", 200 * BLOCK)
    volume.text("zero", *range(10, 90))
    with answer_lost("/0-00000001"):
        lineage.take(repository, volume, "attempt 0")
    volume.text("one", 3, 95)
    with answer_lost("/1-00000002"):
        lineage.take(repository, volume, "attempt 1")
    volume.text("two", 0, 30, 150)
    with answer_lost("-2"):
        lineage.take(repository, volume, "attempt 2")
    volume.text("three", 1, 31, 151)
    lineage.take(repository, volume, "attempt 3")
    yield lineage
    volume.text("later", 2, 199)
    lineage.take(repository, volume, "inherits from several attempts")
    yield lineage


def make_groups(repository: Repository, folder: Path) -> Iterator[Lineage]:
    """Two volumes of one moment."""
    request = partial(SnapshotRequest, group=GROUP)
    for name in ("disk-a", "disk-b"):
        lineage, volume = Lineage(name), Volume(folder / f"{name}.qcow2", 3 * BLOCK + 1024)
        volume.text(name, 1, 3)
        with mock.patch("island_fast.api.SnapshotRequest", request):
            lineage.take(repository, volume, "one moment")
        yield lineage


def make_checkpoints(repository: Repository, folder: Path) -> Iterator[Lineage]:
    """Record 32 is that of a snapshot; a pack was repacked."""
    lineage, volume = Lineage("records"), Volume(folder / "records.qcow2", 40 * BLOCK)
    volume.write({1: random.Random(1).randbytes(8000)})
    volume.text("first", *range(2, 9))
    first = lineage.take(repository, volume, "first")
    volume.text("second", *range(1, 8))
    lineage.take(repository, volume, "second")
    lineage.delete(repository, first)
    yield lineage
    repository.sweep()
    yield lineage
    for number in range(13):
        short = lineage.take(repository, volume, f"unchanged {number}")
        lineage.delete(repository, short)
    repository.sweep()
    volume.text("last", 20)
    lineage.take(repository, volume, "record 32")
    yield lineage
    volume.text("after", 21)
    lineage.take(repository, volume, "after record 32")
    yield lineage


def make_copies(far: Repository, folder: Path, state: LocalState) -> Iterator[Lineage]:
    """Copies out of order, so that records of snapshots have checkpoints; one is deleted and made again."""
    lineage, volume = Lineage("copied"), Volume(folder / "copied.qcow2", 2**20)
    with Repository.open(str(folder / "near"), state=state, create=True, workers=1) as near:
        taken = []
        for number in range(4):
            volume.text(f"near {number}", number, number + 1, 10)
            taken.append(lineage.take(near, volume, f"near {number}"))
        rows = dict(lineage.live)
        lineage.live = {}
        for wanted in (3, 0, 2, None, 0, 1):
            if wanted is None:
                lineage.delete(far, taken[0])
            else:
                (copied,) = near.copy(far, [f"copied@{taken[wanted]}"])
                lineage.live[copied.snapshot] = rows[copied.snapshot] | {"parent": copied.parent}
            lineage.live = {
                one: lineage.live[one] for one in taken if one in lineage.live
            }  # in the near order
            yield lineage


@contextlib.contextmanager
def no_chance() -> Iterator[None]:
    """Have ids and times of the main thread the same each time."""
    chance, clock = random.Random(14), itertools.count(1_700_000_000 * 10**9, 10**9)
    urandom, time_ns, uname = os.urandom, time.time_ns, os.uname()

    def is_main() -> bool:
        return threading.current_thread() is threading.main_thread()

    def known_bytes(size: int) -> bytes:
        return chance.randbytes(size) if is_main() else urandom(size)

    def known_time() -> int:
        return next(clock) if is_main() else time_ns()

    with (
        mock.patch("os.urandom", known_bytes),
        mock.patch("time.time_ns", known_time),
        mock.patch("os.uname", return_value=os.uname_result((uname[0], "golden", *uname[2:]))),
    ):
        yield


def make(repository: Path, expected: Path, after: After = lambda _: None) -> None:
    """Make both files, at paths that must not exist; call `after` with all lineages after each stage."""
    for path in (repository, expected):
        if path.exists():
            raise SystemExit(f"{path} is there, and is never made again")
    lineages: dict[str, Lineage] = {}
    with tempfile.TemporaryDirectory() as name, no_chance():
        folder, state = Path(name), LocalState(Path(name, "state"))
        with Repository.open(str(repository), state=state, create=True, workers=1) as opened:
            # Small packs, so that a small snapshot has several; their size is no part of the format.
            with mock.patch("island_fast.repository.pack_writer.MAX_SLOTS", 32):
                stages = [make_attempts(opened, folder), make_groups(opened, folder)]
                stages += [make_checkpoints(opened, folder), make_copies(opened, folder, state)]
                for lineage in itertools.chain(*stages):
                    lineages[lineage.name] = lineage
                    after(list(lineages.values()))
            for lineage in make_wide(opened, folder):
                lineages[lineage.name] = lineage
                after(list(lineages.values()))
    shutil.rmtree(repository / ".tmp~")
    live = {name: one.live for name, one in sorted(lineages.items())}
    expected.write_text(json.dumps(live, indent=1) + "\n")


if __name__ == "__main__":
    HERE.mkdir()
    make(REPOSITORY, EXPECTED)
