"""An increment of 1 %, from the start of a process until it is durable, and what it stores."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from island_fast.bench.case import MIB, Context, Scale, Size, Work
from island_fast.bench.island_command import Island
from island_fast.bench.peers.archivers import Borg, Keeper, Restic
from island_fast.bench.peers.bitmap import Bitmap
from island_fast.bench.peers.cinder import Cinder
from island_fast.bench.report import Row
from island_fast.bench.timing import Measured, costs, pairs, row, until_on_disk, warm
from island_fast.bench.volume import Volume, is_same
from island_fast.errors import DamagedError

__all__ = ["WORKS"]

_KEEPERS: dict[str, Callable[[Path], Keeper]] = {"restic": Restic, "borg": Borg, "cinder": Cinder}
_SMALL_REACH = {"restic": 12.0, "borg": 9.0, "cinder": 30.0}
_LARGE_REACH = {"restic": 20.0, "borg": 15.0, "cinder": 50.0}
_BITMAP_REACH = 1.2
_STORED_REACH = 0.75
_CINDERS_TIME = "of Cinder only the driver's call is timed, as in a service that runs already"
_BITMAPS_TIME = "clearing the bitmap is not timed; ours takes and drops pins, hashes, compresses and flushes"


@dataclass(frozen=True, slots=True)
class _Run:
    """One snapshot or what a peer did instead: its cost, and the bytes it added to its repository."""

    cost: Measured
    stored: int


@dataclass(slots=True)
class _Bench:
    """One volume, whose snapshots in `island` go on from peer to peer; `stored` is what each of them took."""

    context: Context
    volume: Volume
    island: Island
    stored: list[int]

    @classmethod
    def make(cls, context: Context, size: Size) -> _Bench:
        """Write the volume, and take its first snapshot."""
        context.tell(f"making a volume of {size.volume // MIB} MiB with {size} of data")
        island = Island(context.scratch / "ours")
        bench = cls(context, Volume.make(context.scratch, size, context.seed), island, [])
        island("snapshot", bench.volume.image)
        return bench

    @property
    def name(self) -> str:
        """Of what is measured."""
        return f"increment of 1 %, {self.volume.size} of data"

    def ours(self) -> _Run:
        """Take a snapshot, which has to be an increment."""
        cost, answer = self.island("snapshot", self.volume.image)
        if answer["rule"] != "table-diff":
            raise DamagedError(f"the snapshot was no increment ({answer['reason']}); report this fault")
        self.stored.append(answer["bytes_stored"])
        return _Run(cost, answer["bytes_stored"])

    def against(self, peer: Keeper) -> list[tuple[_Run, _Run]]:
        """Increments of both on the same states; the peer's first, whole one is taken before."""
        self.context.tell(f"{self.name}, against {peer.name}")
        peer.take(self.volume.raw)

        def theirs() -> _Run:
            before = peer.stored()
            cost = peer.take(self.volume.raw)
            until_on_disk(self.context.scratch / peer.name)  # or the next flush of ours would wait for it
            return _Run(cost, peer.stored() - before)

        def edit() -> None:
            self.volume.edit()
            warm(self.volume.raw)

        return pairs(self.volume.size.pairs, self.ours, theirs, edit)

    def rows(self, peer: Keeper, reach: float) -> Iterator[Row]:
        """Time against a peer, and bytes stored."""
        found = self.against(peer)
        times = [(our.cost.wall, their.cost.wall) for our, their in found]
        notes = [costs([(our.cost, their.cost) for our, their in found])]
        if peer.name == "cinder":
            notes.append(_CINDERS_TIME)
        yield row(self.name, peer.name, times, reach=self.context.reach(reach), notes=notes)
        sizes = [(our.stored / MIB, their.stored / MIB) for our, their in found]
        yield row(f"stored for 1 %, {self.volume.size} of data", peer.name, sizes, unit="MiB")

    def bitmap_row(self, reach: float | None) -> Row:
        """Time against copying what a dirty bitmap marks, in a copy of the image."""
        self.context.tell(f"{self.name}, against a dirty bitmap")
        image = self.context.scratch / "marked.qcow2"
        shutil.copyfile(self.volume.image, image)
        until_on_disk(image)
        bitmap = Bitmap(image, self.context.scratch / "bitmap")
        bitmap.begin()
        self.volume.copies.append(image)

        def theirs() -> Measured:
            cost = bitmap.take()
            until_on_disk(bitmap.target)
            return cost

        found = pairs(self.volume.size.pairs, lambda: self.ours().cost, theirs, self.volume.edit)
        if bitmap.copied != self.volume.edited or not _holds(bitmap.target, self.volume):
            raise DamagedError("the dirty bitmap's copy is not the change; it is used wrongly here")
        self.volume.copies.remove(image)
        image.unlink()
        times = [(our.wall, their.wall) for our, their in found]
        notes = [costs(found), _BITMAPS_TIME]
        return row(self.name, "dirty bitmap, copied", times, reach=reach, better="lower", notes=notes)

    def stored_row(self) -> Row:
        """Bytes stored against bytes edited."""
        sizes = [(stored / MIB, self.volume.edited / MIB) for stored in self.stored]
        reach = self.context.reach(_STORED_REACH)
        work = f"stored for 1 %, {self.volume.size} of data"
        return row(work, "bytes edited", sizes, unit="MiB", better="lower", reach=reach)

    def check(self) -> None:
        """Restore the last snapshot and compare it with the volume: speed that loses data is none."""
        target = self.context.scratch / "back.qcow2"
        self.island("restore", f"{self.volume.image.stem}@latest", target)
        if not is_same(target, self.volume.raw):
            raise DamagedError("what was restored differs from the volume; report this fault")
        target.unlink()

    def check_peer(self, peer: Keeper) -> None:
        """The same for a peer, so that it is known to have done the whole work."""
        target = self.context.scratch / "back.raw"
        peer.give_back(self.volume.raw, target)
        if not is_same(target, self.volume.raw, ("raw", "raw")):
            raise DamagedError(f"what {peer.name} restored differs from the volume; it is used wrongly here")
        target.unlink()


def _holds(copy: Path, volume: Volume) -> bool:
    """Whether a sparse copy of what the last edit wrote is what the volume has there."""
    with open(copy, "rb") as copied, open(volume.raw, "rb") as raw:
        return all(
            os.pread(copied.fileno(), length, start) == os.pread(raw.fileno(), length, start)
            for start, length in volume.last
        )


def _increments(context: Context, size: Size, reach: dict[str, float]) -> Iterator[Row]:
    """Rows against each peer that is there, on one volume."""
    bench = _Bench.make(context, size)
    for name, make in _KEEPERS.items():
        if context.has(name):
            peer = make(context.scratch / name)
            try:
                yield from bench.rows(peer, reach[name])
                if size is context.scale.small:  # restoring large ones from Cinder takes minutes
                    bench.check_peer(peer)
            finally:
                peer.finish()
            shutil.rmtree(context.scratch / name)
    yield bench.bitmap_row(context.reach(_BITMAP_REACH) if size is context.scale.large else None)
    yield bench.stored_row()
    bench.check()


def _small(context: Context) -> Iterator[Row]:
    yield from _increments(context, context.scale.small, _SMALL_REACH)


def _large(context: Context) -> Iterator[Row]:
    if context.scale.large:
        yield from _increments(context, context.scale.large, _LARGE_REACH)


def _space(size: Size | None) -> int:
    """The qcow2 and a copy or restored one, the raw file, our repository, and a peer's or a raw restored."""
    return 4 * size.allocated + size.volume if size else 0


def _small_space(scale: Scale) -> int:
    return _space(scale.small)


def _large_space(scale: Scale) -> int:
    return _space(scale.large)


WORKS = (
    Work("increment, small volume", _small, ("qemu-img",), _small_space),
    Work("increment, large volume", _large, ("qemu-img",), _large_space),
)
