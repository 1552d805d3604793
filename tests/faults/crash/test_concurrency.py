"""Verbs at the same time: processes that stand still at a chosen call until others have done theirs."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from island_fast.errors import RefusedError
from island_fast.qemu.image_lock import ImageLock
from tests.faults.crash.actor import Hold
from tests.faults.crash.holding import image_is_whole, nothing_is_left, pins, seen_by_a_stranger, sweep_later
from tests.faults.crash.processes import VOLUME, Actor, World, set_back, wait_until
from tests.faults.crash.starts import LATER, dies_before_its_manifest, registrations
from tests.faults.crash.watched import AFTER, BEFORE
from tests.support import qemu

pytestmark = qemu.needs_qemu

REPACKED = r"/packs/.*\.[0-9a-f]{16}$"
RECORD = r"/catalog/\d+-\d+$"
READ = "get|get_ranges"


@pytest.fixture
def world(world: World) -> World:
    """A volume of eight blocks that do not compress."""
    world.create()
    world.write(0, 8, 1)
    return world


def objects(world: World) -> set[Path]:
    """Files of packs and manifests."""
    found = (p for kind in ("packs", "manifests") for p in (world.repository / VOLUME / kind).rglob("*"))
    return {path for path in found if path.is_file()}


class Neighbours:
    """Three snapshots: of the eight slots of the first one's pack the second needs three, the third one."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.first = world.snapshot(slots=8)
        world.write(0, 5, 2)
        self.second = world.snapshot(slots=8)
        world.write(0, 7, 3)
        self.third = world.snapshot(slots=8)
        self.content = qemu.content(world.image)
        self.target = world.folder / "target.raw"

    def restore_third(self, *holds: Hold) -> Actor:
        """A host without local state begins to restore the third snapshot, and is held."""
        return self.world.start(
            "restore", state="elsewhere", holds=holds, reference=f"{VOLUME}@{self.third}",
            target=str(self.target), image_format="raw",
        )  # fmt: skip

    def delete_and_repack(self, snapshot: str) -> None:
        """Most of the first one's pack is needed no more: it is written anew under another name."""
        self.world.run("delete", snapshot=f"{VOLUME}@{snapshot}")
        (swept,) = self.world.run("sweep")
        assert swept["packs_repacked"] == 1


def test_a_restore_follows_a_repack_of_its_neighbours(world: World) -> None:
    past = Neighbours(world)
    restore = past.restore_third(Hold(READ, f"{past.first}/", BEFORE, "pack"))
    restore.reached("pack")
    past.delete_and_repack(past.first)
    restore.open("pack")
    restore.done()
    assert past.target.read_bytes() == past.content


def test_a_restore_follows_two_repacks_at_once(world: World) -> None:
    past = Neighbours(world)
    restore = past.restore_third(Hold(READ, f"{past.first}/", BEFORE, "pack"))
    restore.reached("pack")
    past.delete_and_repack(past.first)
    past.delete_and_repack(past.second)
    restore.open("pack")
    restore.done()
    assert past.target.read_bytes() == past.content


def test_a_restore_follows_a_repack_and_then_another(world: World) -> None:
    """The newer name that it took from the catalog is gone, too, when it comes to read it."""
    past = Neighbours(world)
    restore = past.restore_third(
        Hold(READ, f"{past.first}/0-00000000$", BEFORE, "pack"), Hold(READ, REPACKED, BEFORE, "newer")
    )
    restore.reached("pack")
    past.delete_and_repack(past.first)
    restore.open("pack")
    restore.reached("newer")
    past.delete_and_repack(past.second)
    restore.open("newer")
    restore.done()
    assert past.target.read_bytes() == past.content


def test_a_restore_that_read_the_index_of_a_pack_that_is_repacked_then(world: World) -> None:
    """Index and blocks are two requests; the pack goes between them."""
    past = Neighbours(world)
    restore = past.restore_third(Hold(READ, f"{past.first}/0-00000000$", AFTER, "index"))
    restore.reached("index")
    past.delete_and_repack(past.first)
    restore.open("index")
    restore.done()
    assert past.target.read_bytes() == past.content


@pytest.mark.parametrize("where", ["manifests", "packs"])
def test_a_restore_whose_own_snapshot_is_deleted_says_so(world: World, where: str) -> None:
    past = Neighbours(world)
    restore = past.restore_third(Hold(READ, f"/{where}/{past.third}", BEFORE, "held"))
    restore.reached("held")
    world.run("delete", snapshot=f"{VOLUME}@{past.third}")
    world.run("sweep")
    restore.open("held")
    assert restore.wait() == 3
    told = restore.told()
    assert "was deleted while it was restored" in told["message"], told
    assert told["error"] == "NotFoundError"
    assert not past.target.exists()


@pytest.mark.parametrize("moment", [BEFORE, AFTER])
def test_a_sweep_touches_nothing_of_a_snapshot_in_progress(world: World, moment: str) -> None:
    """However long it takes: its objects, and its registration, look older than any limit."""
    first = world.snapshot()
    world.write(2, 6, 2)
    hold = Hold("put", "/manifests/", moment, "held")
    taken = world.start("snapshot", image=str(world.image), holds=(hold,))
    taken.reached("held")
    set_back(registrations(world), LATER)
    put = objects(world)
    (swept,) = world.run("sweep", older=LATER)
    assert swept["objects_removed"] == 0
    assert objects(world) == put
    taken.open("held")
    second = taken.done()["snapshot"]
    assert seen_by_a_stranger(world).keys() == {first, second}
    assert seen_by_a_stranger(world)[second] == qemu.content(world.image)


def test_what_a_killed_snapshot_put_goes_when_its_registration_is_a_day_old(world: World) -> None:
    first = world.snapshot()
    content = qemu.content(world.image)
    world.write(2, 6, 2)
    before = objects(world)
    dies_before_its_manifest(world)
    left = objects(world) - before
    assert len(left) == 2
    world.run("sweep", older=LATER)
    assert left <= objects(world), "the registration is young"
    assert len(registrations(world)) == 1
    set_back(registrations(world), LATER)
    world.run("sweep")
    assert left <= objects(world), "the objects are young"
    assert not registrations(world)
    world.run("sweep", older=LATER)
    assert objects(world) == before
    assert seen_by_a_stranger(world) == {first: content}


def test_two_volumes_make_one_repository_at_the_same_time(world: World) -> None:
    """Both find nothing there; both have put all but their records when the first of them commits."""
    other = world.folder / "other.qcow2"
    qemu.create(other, 1 << 20)
    world.write(0, 3, 7, other)
    holds = [
        (Hold("put", "^repository$", BEFORE, f"making-{n}"), Hold("put", "/manifests/", AFTER, f"put-{n}"))
        for n in (0, 1)
    ]
    both = [
        world.start("snapshot", image=str(image), state=f"state{n}", holds=holds[n])
        for n, image in enumerate((world.image, other))
    ]
    for name in ("making", "put"):
        for n, one in enumerate(both):
            one.reached(f"{name}-{n}")
        for n, one in enumerate(both):
            one.open(f"{name}-{n}")
    ids = [one.done()["snapshot"] for one in both]
    found = world.run("list", state="elsewhere")
    assert [(one["volume"], one["snapshot"]) for one in found] == [("other", ids[1]), (VOLUME, ids[0])]
    for image, snapshot in zip((world.image, other), ids, strict=True):
        assert pins(world, image) == 1, "both know the repository by the same id"
        target = world.folder / snapshot
        world.run("restore", state="elsewhere", reference=snapshot, target=str(target))
        qemu.compare(image, target, other_format="qcow2")


def test_a_second_snapshot_of_an_image_in_use_is_refused(world: World) -> None:
    one = world.start("snapshot", image=str(world.image), holds=(Hold("put", "/packs/", BEFORE, "held"),))
    one.reached("held")
    two = world.start("snapshot", image=str(world.image))
    assert two.wait() == 4
    assert str(world.image) in two.told()["message"]
    one.open("held")
    taken = one.done()["snapshot"]
    assert seen_by_a_stranger(world) == {taken: qemu.content(world.image)}
    assert pins(world) == 1


class Branches:
    """A lineage with two images, the second restored from the first one's only snapshot and written to."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.root = world.snapshot()
        self.truth = {self.root: qemu.content(world.image)}
        self.other = world.folder / "other.qcow2"
        world.run("restore", reference=f"{VOLUME}@{self.root}", target=str(self.other))
        world.write(2, 3, 2)
        world.write(2, 3, 3, self.other)

    def holding_the_lock(self) -> Actor:
        """A snapshot of the first image that stands still where it holds the lineage's lock."""
        hold = Hold("put", RECORD, BEFORE, "record")
        one = self.world.start("snapshot", image=str(self.world.image), holds=(hold,))
        one.reached("record")
        return one


PAST_THE_LOCK = Hold(".*", "/catalog/", BEFORE, "past")
"""While a record of another process is under way, the catalog is not looked at without the lineage's lock."""


def waits_for_the_lock(one: Actor) -> None:
    """Wait until it asks for the lineage's lock, and then let it go past the lock if it can: it must not."""
    wait_until(lambda: one.asks_for_lock() or not one.runs, "a process to ask for the lock")
    for _ in range(50):  # how long does not matter to a lock that is kept
        assert not one.stands("past")
        time.sleep(0.002)
    assert one.runs, one.told()
    one.open("past")


def came_after(two: Actor, one: Actor) -> bool:
    """Whether `two` looked at the catalog only when `one` had appended its record and read it back."""
    back = max(call.at for call in one.calls() if call.verb == "get" and re.search(RECORD, call.name))
    return min(call.at for call in two.calls() if "/catalog/" in call.name) > back


def test_an_image_that_takes_the_volumes_place_waits_for_the_lineages_lock(world: World) -> None:
    """Two images of one lineage are refused; one that was renamed over the other is the image now."""
    past = Branches(world)
    one = past.holding_the_lock()
    first = qemu.content(world.image)
    past.other.rename(world.image)
    two = world.start("snapshot", image=str(world.image), holds=(PAST_THE_LOCK,))
    waits_for_the_lock(two)
    one.open("record")
    taken = [process.done()["snapshot"] for process in (one, two)]
    assert came_after(two, one)
    contents = [first, qemu.content(world.image)]
    assert seen_by_a_stranger(world) == past.truth | dict(zip(taken, contents, strict=True))
    qemu.check(world.image)


def test_a_delete_waits_for_the_lineages_lock(world: World) -> None:
    past = Branches(world)
    world.snapshot()
    world.write(5, 1, 4)
    one = past.holding_the_lock()
    two = world.start("delete", snapshot=f"{VOLUME}@{past.root}", holds=(PAST_THE_LOCK,))
    waits_for_the_lock(two)
    assert past.root in seen_by_a_stranger(world)
    one.open("record")
    taken = one.done()["snapshot"]
    two.done()
    assert came_after(two, one)
    found = seen_by_a_stranger(world)
    assert past.root not in found
    assert found[taken] == qemu.content(world.image)
    sweep_later(world, "state")
    assert seen_by_a_stranger(world) == found


@pytest.mark.parametrize("gate", [("put", "/packs/"), ("put", RECORD)], ids=["image", "image and lineage"])
def test_no_lock_outlives_its_process(world: World, gate: tuple[str, str]) -> None:
    """What was killed held the image's lock, or that and the lineage's: the next one finds nothing locked."""
    past = Branches(world)
    one = world.start("snapshot", image=str(world.image), holds=(Hold(*gate, BEFORE, "held"),))
    one.reached("held")
    with pytest.raises(RefusedError), ImageLock(world.image):
        pass
    one.kill()
    with ImageLock(world.image):
        pass
    image_is_whole(world)
    taken = world.snapshot()
    world.run("delete", snapshot=f"{VOLUME}@{past.root}")
    found = seen_by_a_stranger(world)
    assert found[taken] == qemu.content(world.image)
    assert past.root not in found
    assert pins(world) == 1
    sweep_later(world, "state")
    nothing_is_left(world, "state")
    assert seen_by_a_stranger(world) == found
