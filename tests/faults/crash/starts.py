"""The states that the walk's verbs start from, each made once by real snapshots of a real image.

A volume is 64 blocks, a pack 4 slots. All that is written does not compress, so how many packs a verb reads
or writes is decided here, and with it the number of its calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.crash.actor import Hold
from tests.faults.crash.processes import BLOCK, VOLUME, World, set_back
from tests.faults.crash.watched import BEFORE
from tests.support import qemu

DAY = 24 * 3600.0
STRANGER = "c" * 32  # what has this in its name was stored by nobody knows whom
LATER = DAY + 3600.0  # older than any limit


@dataclass(frozen=True)
class Start:
    """A verb and what holds before it.

    `truth` are the live snapshots and their volumes' bytes; `content` is what the image holds. The verb is
    run with `state`, on objects that seem `older` seconds older; it makes a snapshot of `content` if `makes`,
    and removes those in `removes`. The image holds `pins` pins.
    """

    verb: str
    arguments: dict[str, Any]
    content: bytes
    truth: dict[str, bytes] = field(default_factory=dict)
    removes: frozenset[str] = frozenset()
    makes: bool = False
    state: str = "state"
    older: float = 0.0
    pins: int = 1


class _Past:
    """What happened to a world's volume so far."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.truth: dict[str, bytes] = {}
        world.create()

    def snapshot(self, image: Path | None = None) -> str:
        taken = self.world.snapshot(image)
        self.truth[taken] = qemu.content(image or self.world.image)
        return taken

    def delete(self, *snapshots: str) -> None:
        for snapshot in snapshots:
            self.world.run("delete", snapshot=snapshot)
            del self.truth[snapshot]

    def start(self, verb: str, arguments: dict[str, Any], **more: Any) -> Start:
        return Start(verb, arguments, qemu.content(self.world.image), self.truth, **more)


def first_snapshot(world: World) -> Start:
    """Ten blocks in three packs, and nothing else is there yet."""
    past = _Past(world)
    world.write(0, 10, 1)
    return past.start("snapshot", {"image": str(world.image)}, makes=True, pins=0)


def increment(world: World) -> Start:
    """Ten blocks changed in two places, one is zero now, one was written with what it held."""
    past = _Past(world)
    world.write(0, 16, 1)
    past.snapshot()
    world.write(2, 5, 2)
    world.write(20, 5, 2)
    qemu.io(world.image, qemu.zeroes(8 * BLOCK, BLOCK))
    world.write(40, 1, 1)
    past.snapshot()
    world.write(2, 5, 3)
    world.write(20, 5, 3)
    world.write(40, 1, 1)
    qemu.io(world.image, qemu.zeroes(9 * BLOCK, BLOCK))
    return past.start("snapshot", {"image": str(world.image)}, makes=True)


def _let_any_image_in(world: World) -> None:
    """Have the next snapshot come from any image that holds the volume's pin, as after an adoption."""
    for note in world.state().glob(f"*/{VOLUME}/image"):
        note.unlink()


def branch(world: World) -> Start:
    """Of two branches whose first common snapshot is gone, one with a child: parent, child and sibling count.

    Beside the one to be deleted, only the other branch still has the common snapshot's block 4.
    The host lost its caches of manifests and packs, so all of them are read.
    """
    past = _Past(world)
    world.write(0, 8, 1)
    past.snapshot()
    world.write(4, 6, 2)
    common = past.snapshot()
    other = world.folder / "other.qcow2"
    world.run("restore", reference=common, target=str(other))
    world.write(5, 3, 3, other)
    _let_any_image_in(world)
    past.snapshot(other)
    _let_any_image_in(world)
    world.write(6, 5, 4)
    middle = past.snapshot()
    world.write(9, 2, 5)
    world.write(4, 1, 5)
    past.snapshot()
    past.delete(common)
    for kind in ("manifests", "packs"):
        for file in world.state().glob(f"*/{VOLUME}/cache/{kind}/**/*"):
            if file.is_file():
                file.unlink()
    return past.start("delete", {"snapshot": f"{VOLUME}@{middle}"}, removes=frozenset({middle}))


def dead_packs(world: World) -> Start:
    """Two deleted snapshots, whose packs nobody needs, and what a killed one and a stranger left long ago."""
    past = _Past(world)
    world.write(0, 8, 1)
    one = past.snapshot()
    world.write(0, 8, 2)
    two = past.snapshot()
    world.write(0, 8, 3)
    past.snapshot()
    past.delete(one, two)
    world.write(30, 6, 4)
    dies_before_its_manifest(world)
    set_back(registrations(world), LATER)
    for kind in ("packs", "manifests"):
        (world.repository / VOLUME / kind / f"{STRANGER}-0").write_bytes(b"left by nobody knows whom")
    return past.start("sweep", {"unknown": True}, older=LATER, pins=2)


def half_dead_packs(world: World) -> Start:
    """Two packs of which one slot of four is needed, one all of whose slots are dead, one that lives."""
    past = _Past(world)
    world.write(0, 16, 1)
    one = past.snapshot()
    world.write(0, 3, 2)
    world.write(5, 7, 2)
    past.snapshot()
    past.delete(one)
    return past.start("sweep", {})


def two_snapshots(world: World) -> Start:
    """The newest needs all of some packs and one slot of another; a host restores it that has no caches."""
    past = _Past(world)
    world.write(0, 16, 1)
    past.snapshot()
    world.write(0, 3, 2)
    world.write(20, 5, 2)
    newest = past.snapshot()
    words = {"reference": f"{VOLUME}@{newest}", "target": str(world.folder / "target.qcow2")}
    return past.start("restore", words, state="elsewhere")


def owned_elsewhere(world: World) -> Start:
    """Two snapshots of a host that is no more, to be adopted by another."""
    past = _Past(world)
    world.write(0, 8, 1)
    past.snapshot()
    world.write(2, 3, 2)
    past.snapshot()
    return past.start("adopt", {"volume": VOLUME}, state="elsewhere")


STARTS: dict[str, Callable[[World], Start]] = {
    "first snapshot": first_snapshot,
    "incremental snapshot": increment,
    "delete": branch,
    "sweep": dead_packs,
    "repack": half_dead_packs,
    "restore": two_snapshots,
    "adopt": owned_elsewhere,
}


def registrations(world: World, state: str = "state") -> list[Path]:
    """Marks of snapshots in progress, of live processes and of dead ones."""
    return sorted(world.state(state).glob(f"*/{VOLUME}/running/*"))


def dies_before_its_manifest(world: World) -> None:
    """A snapshot that is killed when its packs are stored and nothing names them yet."""
    hold = Hold("put", "/manifests/", BEFORE, "dying")
    dying = world.start("snapshot", image=str(world.image), holds=(hold,))
    dying.reached("dying")
    dying.kill()
