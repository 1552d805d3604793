"""Random lives of one volume in two repositories, with copies both ways, against a model.

Trees branch, volumes change their size, either side deletes and sweeps as it likes, snapshots are taken into
copies, copies are interrupted: every live snapshot restores right on both sides, and no space is lost.
COPIES_SEED=n .venv/bin/pytest tests/operations/test_copying_lives.py lives others.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import RefusedError, StoreError
from island_fast.formats import catalog
from island_fast.images import open as source_module
from island_fast.repository import lineage, pack_reader, pack_writer, workers
from island_fast.repository.lineage import Lineage
from island_fast.repository.local_state import LocalState
from island_fast.repository.pack_reader import PackReader
from island_fast.results import Deleted
from tests.faults.machine.books import accounted, is_content, volume_of
from tests.faults.machine.memory_image import CONTENTS, Content, MemoryImage, MemorySource
from tests.faults.machine.world import Inline
from tests.support.memory_store import MemoryStore

SEED = int(os.environ.get("COPIES_SEED", "1"))
LIVES, STEPS = int(os.environ.get("COPIES_LIVES", "4")), 60
DAY = 24 * 3600.0
COUNTS: Counter[str] = Counter()


class Failing(MemoryStore):
    """A store that does not answer any more after `left` further puts."""

    left = 1 << 30

    def put(self, name: str, parts: Sequence[bytes]) -> None:
        if self.left <= 0:
            raise StoreError("the store does not answer")
        self.left -= 1
        super().put(name, parts)


class Side:
    """One repository, and which snapshots are live in it, and which were and are not any more."""

    def __init__(self, folder: Path, number: int) -> None:
        self.store = Failing(location=f"memory{number}")
        self.state = LocalState(folder / "state")
        self.strangers = folder / "strangers"
        self.repository = Repository(self.store, self.state, create=True)
        self.live: set[str] = set()
        self.deleted: set[str] = set()

    def delete(self, snapshot: str) -> Deleted:
        (answer,) = self.repository.delete([f"vol@{snapshot}"])
        self.live.discard(snapshot)
        self.deleted.add(snapshot)
        return answer

    def add(self, snapshots: set[str]) -> None:
        self.live |= snapshots
        self.deleted -= snapshots

    def lineage(self) -> Lineage:
        return next(self.repository.lineages("vol"))

    def size(self) -> int:
        return sum(len(o.data) for name, o in self.store.objects.items() if "/catalog/" not in name)

    def check(self, contents: dict[str, Content], reader: Repository | None = None) -> None:
        """What is live is so in the model, and restores."""
        if not self.live and "vol/catalog/000000-00000000" not in self.store.objects:
            return
        found = next((reader or self.repository).lineages("vol"))
        assert set(found.state.live) == self.live
        packs = PackReader(found)
        for row in found.state.live.values():
            assert is_content(volume_of(found, row, packs), contents[row.id])
            assert row.parent is None or row.parent in self.live


class Life:
    """What happens to the volume."""

    def __init__(self, folder: Path, seed: int, patch: pytest.MonkeyPatch) -> None:
        self.draw = random.Random(seed)
        self.sides = [Side(folder, number) for number in (0, 1)]
        self.images: dict[str, MemoryImage] = {}
        self.contents: dict[str, Content] = {}
        self.clock = 0
        patch.setattr(source_module, "Qcow2Source", self._source)
        patch.setattr(os, "urandom", random.Random(seed).randbytes)  # a seed is one life
        hours = random.Random(seed)
        patch.setattr(time, "time_ns", lambda: hours.randrange(10**18))  # nothing is decided by it alone
        self.images["/images/0"] = MemoryImage(tuple(self.draw.randrange(CONTENTS) for _ in range(12)))

    def _source(self, path: Path, *_: object, **__: object) -> MemorySource:
        self.clock += 1
        return MemorySource(path, self.images[str(path)], float(self.clock))

    def step(self) -> None:
        verbs: list[tuple[int, Callable[[Side, Side], str]]] = [
            (6, self.snapshot), (2, self.branch), (7, self.copy), (3, self.copy_all), (3, self.copy_again),
            (3, self.delete), (2, self.frees_what_it_tells), (2, self.sweep), (2, self.interrupted),
        ]  # fmt: skip
        (verb,) = self.draw.choices([v for _, v in verbs], [weight for weight, _ in verbs])
        one, other = self.draw.sample(self.sides, 2)
        COUNTS[f"{verb.__name__}: {verb(one, other)}"] += 1
        for side in self.sides:
            side.check(self.contents)

    # The verbs, from `one` side to the `other`. Each tells how it ended.

    def snapshot(self, one: Side, other: Side) -> str:
        if not one.live and one is self.sides[1]:
            return "not yet"  # the volume begins in the first repository
        path = self.draw.choice(sorted(self.images))
        image = self.images[path]
        size = self.draw.choice([len(image.blocks)] * 3 + [8, 12, 16])
        writes = {self.draw.randrange(size): self.draw.randrange(-1, CONTENTS) for _ in range(5)}
        image.write(writes, size)
        full = self.draw.random() < 0.1
        pins = {row.pin for row in one.lineage().state.live.values()} if one.live else set()
        try:
            taken = one.repository.snapshot(path, volume="vol", full=full)
        except RefusedError:
            assert not pins & {internal.identity for internal, _ in image.frozen}, "it holds a pin"
            return "refused"
        assert taken.snapshot not in self.contents, "an id of its own"
        self.contents[taken.snapshot] = image.content
        one.live.add(taken.snapshot)
        return taken.rule

    def branch(self, one: Side, other: Side) -> str:
        """An image as a restore of a snapshot makes it."""
        if not one.live:
            return "nothing to branch from"
        snapshot = self._any(one)
        pin = one.lineage().state.live[snapshot].pin
        self.images[f"/images/{self.draw.randrange(3)}"] = MemoryImage(self.contents[snapshot], pin)
        return "done"

    def _any(self, side: Side) -> str:
        return self.draw.choice(sorted(side.live))

    def copy(self, one: Side, other: Side) -> str:
        if not one.live:
            return "nothing there"
        some = self.draw.sample(sorted(one.live), min(len(one.live), self.draw.choice([1, 1, 2, 3])))
        missing = set(some) - other.live
        for named in self.draw.choice([[some], [[snapshot] for snapshot in some]]):
            self._copied(one, other, named)
        return "some" if missing else "none"

    def copy_again(self, one: Side, other: Side) -> str:
        """All that was deleted there, by its names; then some go, whose blocks the others may share."""
        gone = sorted(one.live & other.deleted)
        for snapshot in self.draw.sample(gone, len(gone)):
            self._copied(one, other, [snapshot])
        for _ in range(min(self.draw.choice([0, 2, 3]), len(other.live) if gone else 0)):
            other.delete(self._any(other))
        return "done" if gone else "nothing was deleted"

    def _copied(self, one: Side, other: Side, named: list[str] | None) -> None:
        meant = set(one.live if named is None else named)
        answers = one.repository.copy(other.repository, named)
        assert not one.repository.left_out
        assert {a.snapshot for a in answers} == meant
        away = other.deleted if named is None else set()
        assert {a.snapshot for a in answers if a.copied} == meant - other.live - away
        assert {a.snapshot for a in answers if a.deleted} == meant & away
        other.add(meant - away)
        orders = [list(side.lineage().state.live) for side in (one, other)]
        both = [[row for row in order if row in one.live & other.live] for order in orders]
        assert both[0] == both[1], "what both have is in the same order"

    def copy_all(self, one: Side, other: Side) -> str:
        if not one.live:
            return "nothing there"
        into_nothing = not other.live
        self._copied(one, other, None)
        if into_nothing and not other.deleted:
            near, far = (
                {row.id: row.parent for row in s.lineage().state.live.values()} for s in (one, other)
            )
            assert list(near) == list(far)
            assert {k: far[k] for k in near if near[k]} == {k: near[k] for k in near if near[k]}, (
                "the same tree"
            )
            assert list(far.values()).count(None) == 1, "what roots have in common is sent once"
            return "whole tree" if list(near.values()).count(None) == 1 else "several roots"
        return "done"

    def delete(self, one: Side, other: Side) -> str:
        if not one.live:
            return "nothing there"
        for _ in range(min(len(one.live), self.draw.choice([1, 1, 2, 4]))):
            one.delete(self._any(one))
        return "done"

    def frees_what_it_tells(self, one: Side, other: Side) -> str:
        if not one.live:
            return "nothing there"
        one.store.now += DAY
        one.repository.sweep()
        before = one.size()
        told = one.delete(self._any(one))
        (swept,) = one.repository.sweep()
        assert before - one.size() == told.bytes_freed == swept.bytes_freed
        return "done"

    def sweep(self, one: Side, other: Side) -> str:
        one.store.now += self.draw.choice([0.0, DAY])
        one.repository.sweep()
        return "done"

    def interrupted(self, one: Side, other: Side) -> str:
        """A copy after which the other side's store is gone for a while."""
        if not one.live:
            return "nothing there"
        before = set(other.live)
        named = self.draw.choice([None, sorted(one.live)])
        other.store.left = self.draw.randrange(12)
        try:
            one.repository.copy(other.repository, named)
        except StoreError:
            other.store.left = 1 << 30
            if other.live or other.store.objects:
                other.repository = Repository(other.store, other.state, create=True)
                names = [name for name in other.store.folders("") if name == "vol"]
                other.add(set(other.lineage().state.live) if names else set())
            assert before <= other.live <= before | one.live
            return "cut off"
        finally:
            other.store.left = 1 << 30
        other.add(one.live if named else one.live - other.deleted)
        return "done"

    def end(self) -> None:
        """All that is garbage goes, and a stranger sees what the model says."""
        for side in self.sides:
            if not any(name.startswith("vol/") for name in side.store.objects):
                continue
            for running in (side.lineage().files.folder / "running").glob("*"):
                os.utime(running, (0, 0))
            side.store.now += 2 * DAY
            side.repository.sweep()
            side.repository.sweep()
            with Repository(side.store, LocalState(side.strangers)) as stranger:
                side.check(self.contents, stranger)
                found = next(stranger.lineages("vol"))
                objects = {n: o.data for n, o in side.store.objects.items() if n.startswith("vol/")}
                accounted(found, objects)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Packs of four blocks, checkpoints at every fourth record, no threads, nothing flushed."""
    monkeypatch.setattr(pack_reader, "BATCH", 2)
    monkeypatch.setattr(pack_writer, "MAX_SLOTS", 4)
    monkeypatch.setattr(workers, "ThreadPoolExecutor", Inline)
    monkeypatch.setattr(pack_writer, "ThreadPoolExecutor", Inline)
    for module in (catalog, lineage):
        monkeypatch.setattr(module, "CHECKPOINT_EVERY", 4)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    return monkeypatch


def test_random_lives(tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    COUNTS.clear()
    for number in range(LIVES):
        print(f"COPIES_SEED={SEED + number}")
        life = Life(tmp_path / str(number), SEED + number, small)
        for _ in range(STEPS):
            life.step()
        life.end()
    for what, count in sorted(COUNTS.items()):
        print(f"{count:6}  {what}")
