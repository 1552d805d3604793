"""An increment of 1 %: its time, from the start of a process until it is durable, and its size."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from island_fast.bench.case import MIB, Case, Context, Size
from island_fast.bench.island_command import Island
from island_fast.bench.peers.archivers import Archiver, Borg, Borg2, Restic
from island_fast.bench.peers.bitmap import DirtyBitmap
from island_fast.bench.peers.cinder import Cinder
from island_fast.bench.report import Row
from island_fast.bench.timing import (
    Measurement,
    describe_costs,
    flush_to_disk,
    make_row,
    run_pairs,
    warm_page_cache,
)
from island_fast.bench.volume import Volume, is_same_disk
from island_fast.errors import DamagedError

__all__ = ["CASES"]

_ARCHIVERS: dict[str, Callable[[Path, str], Archiver]] = {
    "restic": Restic,
    "borg": Borg,
    "borg2": Borg2,
    "cinder": lambda folder, _program: Cinder(folder),
}
_SMALL_REACH = {"restic": 12.0, "borg": 9.0, "borg2": 9.0, "cinder": 30.0}
_LARGE_REACH = {"restic": 25.0, "borg": 25.0, "borg2": 25.0, "cinder": 50.0}
_BITMAP_REACH = 1.2
_STORED_REACH = 0.75
_CINDERS_TIME = "for Cinder only the driver's call is timed, in a process that keeps running"
_BITMAPS_TIME = (
    "clearing the bitmap is not timed; island takes and drops pins, hashes, compresses and flushes"
)


@dataclass(frozen=True, slots=True)
class _Run:
    """One snapshot, or one run of a peer: its cost, and the bytes that it added to the repository."""

    cost: Measurement
    stored: int


@dataclass(slots=True)
class _Bench:
    """One volume, whose chain of snapshots in `island` continues from peer to peer.

    `stored` is the bytes that each snapshot stored.
    """

    context: Context
    volume: Volume
    island: Island
    stored: list[int]

    @classmethod
    def make(cls, context: Context, size: Size) -> _Bench:
        """Write the volume, and take its first snapshot."""
        context.show_progress(f"making a volume of {size.volume // MIB} MiB with {size} of data")
        island = Island(context.scratch / "ours")
        bench = cls(context, Volume.make(context.scratch, size, context.seed), island, [])
        island("snapshot", bench.volume.image)
        return bench

    @property
    def name(self) -> str:
        """The work, as the row names it."""
        return f"increment of 1 %, {self.volume.size} of data"

    def take_snapshot(self) -> _Run:
        """Take a snapshot. Raises DamagedError if it is not an increment."""
        cost, answer = self.island("snapshot", self.volume.image)
        if answer["rule"] != "table-diff":
            raise DamagedError(f"the snapshot was not an increment ({answer['reason']}); report this fault")
        self.stored.append(answer["bytes_stored"])
        return _Run(cost, answer["bytes_stored"])

    def measure_pairs(self, peer: Archiver) -> list[tuple[_Run, _Run]]:
        """Measure increments of both on the same states, after the peer has stored a first, full copy."""
        self.context.show_progress(f"{self.name}, against {peer.name}")
        peer.prepare()
        peer.back_up(self.volume.raw)

        def theirs() -> _Run:
            before = peer.measure_stored()
            cost = peer.back_up(self.volume.raw)
            flush_to_disk(self.context.scratch / peer.name)  # or the next flush of island would wait for it
            return _Run(cost, peer.measure_stored() - before)

        def edit() -> None:
            self.volume.edit()
            warm_page_cache(self.volume.raw)

        return run_pairs(self.volume.size.pairs, self.take_snapshot, theirs, edit)

    def measure_peer(self, peer: Archiver, reach: float | None) -> Iterator[Row]:
        """Yield the rows against a peer: time, and bytes stored."""
        found = self.measure_pairs(peer)
        times = [(our.cost.wall, their.cost.wall) for our, their in found]
        notes = [describe_costs([(our.cost, their.cost) for our, their in found])]
        if peer.name == "cinder":
            notes.append(_CINDERS_TIME)
        yield make_row(self.name, peer.name, times, reach=reach, notes=notes)
        sizes = [(our.stored / MIB, their.stored / MIB) for our, their in found]
        yield make_row(f"stored for 1 %, {self.volume.size} of data", peer.name, sizes, unit="MiB")

    def measure_bitmap(self, reach: float | None) -> Row:
        """Measure the time against copying what a dirty bitmap marks in a copy of the image."""
        self.context.show_progress(f"{self.name}, against a dirty bitmap")
        image = self.context.scratch / "marked.qcow2"
        shutil.copyfile(self.volume.image, image)
        flush_to_disk(image)
        bitmap = DirtyBitmap(image, self.context.scratch / "bitmap")
        bitmap.start()
        self.volume.copies.append(image)

        def theirs() -> Measurement:
            cost = bitmap.copy_changes()
            flush_to_disk(bitmap.target)
            return cost

        found = run_pairs(self.volume.size.pairs, lambda: self.take_snapshot().cost, theirs, self.volume.edit)
        if bitmap.copied != self.volume.edited or not _has_last_edit(bitmap.target, self.volume):
            raise DamagedError(
                "the copy by the dirty bitmap is not what changed; report this fault of the bench"
            )
        self.volume.copies.remove(image)
        image.unlink()
        times = [(our.wall, their.wall) for our, their in found]
        notes = [describe_costs(found), _BITMAPS_TIME]
        return make_row(self.name, "dirty bitmap, copied", times, reach=reach, better="lower", notes=notes)

    def compare_stored(self) -> Row:
        """Return the row of bytes stored against bytes edited."""
        sizes = [(stored / MIB, self.volume.edited / MIB) for stored in self.stored]
        reach = self.context.target_unless_quick(_STORED_REACH)
        work = f"stored for 1 %, {self.volume.size} of data"
        return make_row(work, "bytes edited", sizes, unit="MiB", better="lower", reach=reach)

    def check(self) -> None:
        """Restore the last snapshot, and raise DamagedError if it differs from the volume."""
        target = self.context.scratch / "back.qcow2"
        self.island("restore", f"{self.volume.image.stem}@latest", target)
        if not is_same_disk(target, self.volume.raw):
            raise DamagedError("the restored image differs from the volume; report this fault")
        target.unlink()

    def check_peer(self, peer: Archiver) -> None:
        """Restore what a peer stored last, and raise DamagedError if it differs from the volume."""
        target = self.context.scratch / "back.raw"
        peer.restore(self.volume.raw, target)
        if not is_same_disk(target, self.volume.raw, ("raw", "raw")):
            raise DamagedError(
                f"what {peer.name} restored differs from the volume; report this fault of the bench"
            )
        target.unlink()


def _has_last_edit(copy: Path, volume: Volume) -> bool:
    """Return whether a sparse copy equals the volume in the ranges that the last edit wrote."""
    with open(copy, "rb") as copied, open(volume.raw, "rb") as raw:
        return all(
            os.pread(copied.fileno(), length, start) == os.pread(raw.fileno(), length, start)
            for start, length in volume.last
        )


def _measure_increments(context: Context, size: Size | None, reach: dict[str, float]) -> Iterator[Row]:
    """Yield the rows against each installed peer, on one volume; none if the scale has no such volume."""
    if size is None:
        return
    bench = _Bench.make(context, size)
    for name, make in _ARCHIVERS.items():
        if context.has_peer(name):
            peer = make(context.scratch / name, context.peers[name].program)
            try:
                yield from bench.measure_peer(peer, context.target_unless_quick(reach[name]))
                if size is context.scale.small:  # restoring the large volume from Cinder takes minutes
                    bench.check_peer(peer)
            finally:
                peer.close()
            shutil.rmtree(context.scratch / name)
    target = context.target_unless_quick(_BITMAP_REACH) if size is context.scale.large else None
    yield bench.measure_bitmap(target)
    yield bench.compare_stored()
    bench.check()


def _space(size: Size | None) -> int:
    """Return the bytes of the qcow2 and a copy, the raw file and a restored one, and two repositories."""
    return 4 * size.allocated + size.volume if size else 0


CASES = (
    Case(
        "increment, small volume",
        lambda context: _measure_increments(context, context.scale.small, _SMALL_REACH),
        ("qemu-img",),
        lambda scale: _space(scale.small),
    ),
    Case(
        "increment, large volume",
        lambda context: _measure_increments(context, context.scale.large, _LARGE_REACH),
        ("qemu-img",),
        lambda scale: _space(scale.large),
    ),
)
