"""An attached volume, worked by fio, against qemu's own qcow2 on the same disk: each kind of block device.

What is measured is the device that Nova is given, made by the driver's own code: its image, its daemon, its
export. No Cinder and no guest take part, since neither is on the way of the data from that device on.

fio cannot open a qcow2, so it reaches qemu's own by its engine for NBD: a second daemon, with the same
options, serves an equal image at a socket. That is a hop between two processes, as a guest has one, by
virtio, to a qemu that has the image open; fio's own hop to a block device is a system call. `qemu-img bench`,
which opens an image itself, shows how far a device is behind it without any hop: the driver's self-test
warns by that.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from island_fast.bench import timing
from island_fast.bench.case import GIB, MIB, Context, Scale, Work
from island_fast.bench.report import Counter, LeftOut, Row
from island_fast.bench.timing import pairs, row
from island_fast.cinder.attach.daemon import Daemon
from island_fast.cinder.attach.exports import KINDS, Exports
from island_fast.cinder.attach.selftest import check_data_path, measure_speed
from island_fast.cinder.images import Images
from island_fast.errors import IslandError
from island_fast.qemu.programs import run_program

__all__ = ["WORKS"]

_NAMES = {"loop": "loop over FUSE", "nbd": "kernel NBD"}
_CLUSTER = 65536
_LINKS = "/dev/shm"  # where no links outlive a reboot


@dataclass(frozen=True, slots=True)
class _Plan:
    """How much is done: a volume of `size` bytes, `pairs` of runs of so many `milliseconds` each."""

    size: int
    pairs: int
    milliseconds: int


_WHOLE = _Plan(1 * GIB, 9, 1000)
_QUICK = _Plan(128 * MIB, 2, 150)


@dataclass(frozen=True, slots=True)
class _Job:
    """What fio does: `way` and `depth` are its own words, `length` the bytes of a request."""

    name: str
    way: str
    length: int
    depth: int

    @property
    def reads(self) -> bool:
        """Whether it reads, and does not write."""
        return self.way.endswith("read")


_JOBS = (
    _Job("4 KiB random writes, one at a time", "randwrite", 4096, 1),
    _Job("4 KiB random writes, 32 at a time", "randwrite", 4096, 32),
    _Job("4 KiB random reads, one at a time", "randread", 4096, 1),
    _Job("4 KiB random reads, 32 at a time", "randread", 4096, 32),
    _Job("1 MiB writes in order, 4 at a time", "write", MIB, 4),
    _Job("1 MiB reads in order, 4 at a time", "read", MIB, 4),
)
_FILLING = _Job("filling", "write", MIB, 4)
_FIRST = _Job("first 4 KiB writes after a snapshot, 8 at a time", "randwrite", 4096, 8)
_AGAINST = "qemu's own qcow2"


@dataclass(frozen=True, slots=True)
class _Place:
    """Folders for one kind of device, as a host has them."""

    run: Path
    links: Path
    images: Path


@dataclass(slots=True)
class _Volume:
    """A volume in use, and what fio is told to reach it."""

    exports: Exports
    name: str
    image: Path
    words: list[str]

    def fio(self, job: _Job, plan: _Plan, *more: str) -> float:
        """Run a job; requests in a second, or of those of 1 MiB, MiB."""
        command = ["fio", "--name=job", f"--rw={job.way}", f"--bs={job.length}", f"--iodepth={job.depth}"]
        command += [f"--size={plan.size}", "--output-format=json", *more, *self.words]
        told = timing.run(command).output
        try:
            found = json.loads(told[told.index(b"{") :])["jobs"][0]["read" if job.reads else "write"]
            return float(found["iops"])
        except (ValueError, LookupError, TypeError) as error:
            raise IslandError(f"fio said what nobody expected: {told[-200:]!r}") from error

    def renew(self) -> None:
        """Attach it anew, so that nothing of it is in the page cache."""
        self.exports.detach(self.name)
        self._to(self.exports.attach(self.name, self.image).resolve())

    def _to(self, device: Path) -> None:
        self.words = ["--ioengine=libaio", "--direct=1", f"--filename={device}"]

    def snapshot(self) -> None:
        """Take an internal snapshot, and drop those before, as every day."""
        old = self.exports.internal_snapshots(self.name)
        self.exports.take_internal_snapshot(self.name, uuid.uuid4().hex)
        for name in old:
            self.exports.drop_internal_snapshot(self.name, name)


@contextlib.contextmanager
def _attached(place: _Place, kind: str, size: int) -> Iterator[_Volume]:
    """A volume behind the device of a kind."""
    exports = Exports(place.run, place.links, run_program, kind)
    volume = _Volume(exports, str(uuid.uuid4()), place.images / "attached", [])
    Images(run_program).create_blank(volume.image, size)
    try:
        exports.attach(volume.name, volume.image)
        volume.renew()
        yield volume
    finally:
        exports.stop(volume.name)
        volume.image.unlink()


@contextlib.contextmanager
def _served(place: _Place, size: int) -> Iterator[_Volume]:
    """An equal one, that a daemon serves at a socket and no device stands in front of."""
    exports = Exports(place.run, place.links, run_program, "nbd")
    volume = _Volume(exports, str(uuid.uuid4()), place.images / "served", [])
    Images(run_program).create_blank(volume.image, size)
    try:
        exports.serve(volume.name, volume.image)
        daemon = Daemon(place.run / volume.name, run_program)
        daemon.export()
        volume.words = ["--ioengine=nbd", f"--uri=nbd+unix:///volume?socket={daemon.socket}"]
        yield volume
    finally:
        exports.stop(volume.name)
        volume.image.unlink()


def _kind(kind: str, context: Context) -> Iterator[Row | Counter | LeftOut]:
    """All rows of one kind of device; why it is left out where this machine does not have it."""
    plan = _QUICK if context.quick else _WHOLE
    with tempfile.TemporaryDirectory(prefix="island-bench-", dir=_LINKS) as links:
        place = _Place(context.scratch / "run", Path(links), context.scratch / "images")
        place.images.mkdir()
        try:
            _check(place, kind)
        except IslandError as error:
            yield LeftOut(f"attached volume, {_NAMES[kind]}", str(error))
            return
        with _attached(place, kind, plan.size) as ours, _served(place, plan.size) as theirs:
            yield from _rows(context, plan, kind, (ours, theirs))
        yield from _bare_rows(context, place, kind)


def _check(place: _Place, kind: str) -> None:
    """IslandError if there are no such devices here, or if what goes through them is not right."""
    if os.geteuid() != 0:
        raise IslandError("block devices are put up by root; run the bench as root")
    check_data_path(place.run, place.links, place.images, run_program, kind)


def _rows(context: Context, plan: _Plan, kind: str, sides: tuple[_Volume, _Volume]) -> Iterator[Row]:
    context.tell(f"filling two volumes of {plan.size // MIB} MiB")
    for side in sides:
        side.fio(_FILLING, plan)
    for job in _JOBS:
        limit = ["--time_based", f"--runtime={plan.milliseconds}ms"]
        yield _row(context, plan, kind, job, sides, sides[0].renew if job.reads else lambda: None, limit)

    def snapshots() -> None:
        for side in sides:
            side.snapshot()

    # Each write in a cluster of its own, so that it is the first one there: an eighth of the volume's.
    first = [f"--blockalign={_CLUSTER}", f"--number_ios={plan.size // _CLUSTER // 8}"]
    yield _row(context, plan, kind, _FIRST, sides, snapshots, first)


def _row(
    context: Context,
    plan: _Plan,
    kind: str,
    job: _Job,
    sides: Sequence[_Volume],
    before: Callable[[], None],
    how: Sequence[str],
) -> Row:
    ours, theirs = sides
    work = f"{_NAMES[kind]}: {job.name}"
    context.tell(work)
    measured = pairs(
        plan.pairs, lambda: ours.fio(job, plan, *how), lambda: theirs.fio(job, plan, *how), before
    )
    return row(work, _AGAINST, measured, unit="MiB/s" if job.length == MIB else "requests/s")


def _bare_rows(context: Context, place: _Place, kind: str) -> Iterator[Row]:
    """What the driver's self-test measures when it starts."""
    context.tell(f"{_NAMES[kind]}: the self-test")
    for speed in measure_speed(place.run, place.links, place.images, run_program, kind):
        work = f"{_NAMES[kind]}: {speed.shape.name}, by qemu-img"
        yield row(work, f"{_AGAINST}, opened by the same program", speed.pairs, unit="requests/s")


def _space(scale: Scale) -> int:
    """Two volumes, and what the snapshot before keeps of each."""
    return 3 * _WHOLE.size if scale.large else 3 * _QUICK.size


WORKS = tuple(
    Work(f"attached volume, {_NAMES[kind]}", partial(_kind, kind), ("fio", "qemu-img"), _space)
    for kind in KINDS
)
