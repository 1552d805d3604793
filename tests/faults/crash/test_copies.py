"""Copies that are killed go on where they were, and copies beside other commands."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.crash.actor import Hold
from tests.faults.crash.holding import live, nothing_is_left, restored, seen_by_a_stranger, sweep_later
from tests.faults.crash.processes import BLOCK, VOLUME, Actor, Actors, World
from tests.faults.crash.watched import AFTER, BEFORE, ELSEWHERE
from tests.support import qemu

pytestmark = qemu.needs_qemu


class Worlds:
    """A repository with two snapshots, of three and two packs, and the place of their copies."""

    def __init__(self, folder: Path, actors: Actors) -> None:
        self.near = World(folder, actors)
        self.far = World(folder, actors)
        self.far.repository = folder / "far"
        self.near.create()
        self.near.write(0, 10, 1)
        self.order = [self.near.snapshot()]
        self.near.write(3, 5, 2)
        qemu.io(self.near.image, qemu.discard(8 * BLOCK, BLOCK))
        self.order.append(self.near.snapshot())
        self.truth = restored(self.near.repository, self.near.state())

    def start(self, **options: object) -> Actor:
        return self.far.start("copy", source=str(self.near.repository), **options)


@pytest.fixture
def worlds(tmp_path: Path, actors: Actors) -> Worlds:
    return Worlds(tmp_path / "world", actors)


def packs_put(actor: Actor) -> list[str]:
    return [call.name for call in actor.calls() if call.verb == "put" and "/packs/" in call.name]


def test_killed_at_every_put(worlds: Worlds, tmp_path: Path, walked: list[str]) -> None:
    """What the store had acknowledged is not sent again, and nothing is half there."""
    far = worlds.far
    far.keep(tmp_path / "start")
    whole = worlds.start()
    whole.done()
    puts = [call for call in whole.calls() if call.verb == "put"]
    kinds = "catalog packs packs packs manifests catalog packs packs manifests catalog"
    assert " ".join(call.name.split("/")[1] for call in puts[1:]) == kinds
    points = [(call.number, moment) for call in puts for moment in (BEFORE, AFTER)]
    points += [(number, ELSEWHERE) for number in range(1, whole.told()["elsewhere"], 6)]
    for point in points:
        far.put_back(tmp_path / "start")
        killed = worlds.start(kill=point)
        assert killed.wait() == -signal.SIGKILL, killed.told()
        left = seen_by_a_stranger(far)
        assert list(left) == worlds.order[: len(left)]
        assert left == {one: worlds.truth[one] for one in left}
        again = worlds.start()
        again.done()
        if point[1] != ELSEWHERE:
            acknowledged = [call for call in puts if "/packs/" in call.name and call.number < point[0]]
            assert len(packs_put(again)) == 5 - len(acknowledged)
        sweep_later(far, "state")
        nothing_is_left(far, "state")
        assert seen_by_a_stranger(far) == worlds.truth
    walked.append(f"copy: {len(points)} points, two at each of {len(puts)} puts")


def test_a_sweep_touches_nothing_of_a_copy_in_progress(worlds: Worlds) -> None:
    copying = worlds.start(holds=(Hold("put", "/manifests/", BEFORE, "packs-there"),))
    copying.reached("packs-there")
    (swept,) = worlds.far.run("sweep", older=2 * 86400.0)
    assert swept["objects_removed"] == 0
    copying.open("packs-there")
    copying.done()
    assert seen_by_a_stranger(worlds.far) == worlds.truth


def test_the_parent_of_a_copy_in_progress_cannot_be_deleted_there(worlds: Worlds) -> None:
    first, second = worlds.order
    copying = worlds.start(holds=(Hold("put", f"/manifests/{second}", BEFORE, "packs-there"),))
    copying.reached("packs-there")
    refused = worlds.far.start("delete", snapshot=f"{VOLUME}@{first}")
    assert refused.wait() == 4, refused.told()
    copying.open("packs-there")
    copying.done()
    assert live(worlds.far.repository, worlds.far.state()) == {first, second}
