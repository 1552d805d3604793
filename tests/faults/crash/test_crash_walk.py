"""kill -9 at every call of the store, and before every change of other files: nothing it leaves matters."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest

from island_fast.repository.local_state import LocalState
from tests.faults.crash.holding import (
    image_is_whole,
    live,
    nothing_is_left,
    opened,
    pins,
    seen_by_a_stranger,
    seen_by_its_host,
    sweep_later,
)
from tests.faults.crash.processes import VOLUME, Actors, World
from tests.faults.crash.starts import STARTS, Start
from tests.faults.crash.watched import AFTER, BEFORE, ELSEWHERE, UNNAMED
from tests.support import qemu

pytestmark = [qemu.needs_qemu, pytest.mark.long]

Point = tuple[int, str]


class Walk:
    """One verb, done again and again from the same start, and killed at another point each time."""

    def __init__(self, name: str, folder: Path, actors: Actors) -> None:
        self.world = World(folder / "world", actors)
        self.start: Start = STARTS[name](self.world)
        self._kept = folder / "start"
        self.world.keep(self._kept)
        self.reached: set[Point] = set()
        self.committed = 0

    def points(self) -> set[Point]:
        """Every moment of a run that nobody kills; it must be what the verb is for."""
        self.world.put_back(self._kept)
        done = self.world.start(**self._words())
        done.done()
        self._done(killed_made=frozenset())
        calls = done.calls()
        points = {(call.number, moment) for call in calls for moment in (BEFORE, AFTER)}
        points |= {(call.number, UNNAMED) for call in calls if call.verb == "put"}
        return points | {(number + 1, ELSEWHERE) for number in range(done.told()["elsewhere"])}

    def _words(self) -> dict[str, object]:
        start = self.start
        return {"verb": start.verb, "state": start.state, "older": start.older, **start.arguments}

    def kill(self, point: Point) -> None:
        """Kill the verb at `point`, see what is left, and do it again."""
        self.world.put_back(self._kept)
        killed = self.world.start(**self._words(), kill=point)
        assert killed.wait() == -signal.SIGKILL, killed.told()
        number, moment = killed.told()["reached"]
        self.reached.add((number, moment))
        target = self.world.folder / "target.qcow2"
        if moment != ELSEWHERE:
            assert not target.exists(), "it gets its name when nothing more is read"
        elif target.exists():
            qemu.compare(self.world.image, target, other_format="qcow2")
            qemu.check(target)
            target.unlink()
        self._again(self._left())

    def _left(self) -> frozenset[str]:
        """Everything is as before the verb or as after it; the snapshot that it made, if it did."""
        image_is_whole(self.world)
        self._is_right(seen_by_a_stranger(self.world))
        left = seen_by_its_host(self.world, self.start.state)
        self._is_right(left)
        made = frozenset(left) - frozenset(self.start.truth)
        self.committed += bool(made)
        return made

    def _is_right(self, found: dict[str, bytes]) -> None:
        """The snapshots before the verb, or those after it, each with every byte."""
        start, before = self.start, set(self.start.truth)
        made = found.keys() - before
        if made:
            assert start.makes
            assert len(made) == 1
        assert found.keys() - made in (before, before - start.removes)
        assert found == {one: start.truth.get(one, start.content) for one in found}

    def _again(self, made: frozenset[str]) -> None:
        """The same command on what the killed one left: nobody clears anything up before."""
        again = self.world.start(**self._words())
        if self.start.removes and again.wait() == 3:  # the killed one had done it
            assert again.told()["error"] == "NotFoundError"
        else:
            answer = again.done()
            if self.start.makes and (made or self.start.truth):
                assert answer["rule"] == "table-diff", "the image still holds its newest snapshot's pin"
        self._done(killed_made=made)

    def _done(self, killed_made: frozenset[str]) -> None:
        """The state after the verb, whether it was killed before or not; and it stays after a sweep."""
        start, world = self.start, self.world
        image_is_whole(world)
        assert pins(world) == (1 if start.makes else start.pins)
        owner = start.state if start.verb == "adopt" else "state"
        self._is_owner(owner)
        found = live(world.repository, world.state(owner))
        made = found - start.truth.keys()
        assert killed_made <= made
        assert len(made) == len(killed_made) + start.makes
        assert start.truth.keys() - found == start.removes
        if start.verb == "restore":
            qemu.compare(world.image, world.folder / "target.qcow2", other_format="qcow2")
        sweep_later(world, owner)
        nothing_is_left(world, owner)
        content = {one: start.truth.get(one, start.content) for one in found}
        assert seen_by_a_stranger(world) == content

    def _is_owner(self, state: str) -> None:
        with opened(self.world.repository, self.world.state(state)) as repository:
            (lineage,) = repository.lineages(VOLUME)
            assert lineage.owner == LocalState(self.world.state(state)).writer


@pytest.mark.parametrize("name", STARTS)
def test_killed_at_every_call_of_the_store(
    name: str, tmp_path: Path, actors: Actors, walked: list[str]
) -> None:
    walk = Walk(name, tmp_path, actors)
    points = walk.points()
    for point in sorted(points):
        walk.kill(point)
    assert walk.points() == points, "a verb does as much in every run"
    assert walk.reached == points
    if walk.start.makes:
        assert 0 < walk.committed < len(points), "killed before it existed, and after"
    count = Counter(moment for _, moment in points)
    assert count[BEFORE] == count[AFTER] > 0
    walked.append(
        f"{name}: {len(points)} points, two at each of {count[BEFORE]} calls of the store, a third at "
        f"{count[UNNAMED]} puts, {count[ELSEWHERE]} at changes of other files"
    )
