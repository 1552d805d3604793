"""Attached volumes, one kind of block device after the other, against qemu's own qcow2 on the same disk.

fio runs on the device that the driver hands to Nova, which the driver's own code makes: image, daemon and
export. Cinder and a guest take no part, because the data from that device does not pass through them.

fio cannot open a qcow2. For the other side it uses its NBD engine: a second daemon with the same options
serves an equal image at a socket. That is a hop between two processes, like the hop from a guest by virtio to
a qemu that has the image open; fio's hop to a block device is a system call. `qemu-img bench` opens an image
itself, so it shows how much slower a device is than an image without any hop; the driver's self-test
measures the same and warns if that is too slow.
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
from island_fast.bench.case import GIB, MIB, Case, Context, Scale
from island_fast.bench.report import Counter, LeftOut, Row
from island_fast.bench.timing import make_row, run_pairs
from island_fast.cinder.attach.daemon import Daemon
from island_fast.cinder.attach.exports import KINDS, Exports
from island_fast.cinder.attach.selftest import check_data_path, measure_speed
from island_fast.cinder.images import Images
from island_fast.errors import IslandError
from island_fast.qemu.programs import run_program

__all__ = ["CASES"]

_NAMES = {"vduse": "VDUSE", "nbd": "kernel NBD", "loop": "loop over FUSE"}
_CLUSTER = 65536
_LINKS = "/dev/shm"  # whose links do not survive a reboot


@dataclass(frozen=True, slots=True)
class _Amount:
    """How much is measured: a volume of `size` bytes, and `pairs` pairs of runs of `milliseconds` each."""

    size: int
    pairs: int
    milliseconds: int


_FULL = _Amount(1 * GIB, 9, 1000)
_QUICK = _Amount(128 * MIB, 2, 150)


@dataclass(frozen=True, slots=True)
class _Job:
    """A job of fio: `way` is its option rw, `depth` its option iodepth, `length` the bytes of a request."""

    name: str
    way: str
    length: int
    depth: int

    @property
    def reads(self) -> bool:
        """Whether the job reads; otherwise it writes."""
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
    """The folders that a host has for one kind of device."""

    run: Path
    links: Path
    images: Path


@dataclass(slots=True)
class _Volume:
    """A volume in use, and the options with which fio reaches it."""

    exports: Exports
    name: str
    image: Path
    options: list[str]

    def run_fio(self, job: _Job, amount: _Amount, *more: str) -> float:
        """Run a job; return requests per second (MiB per second if the requests are of 1 MiB)."""
        command = ["fio", "--name=job", f"--rw={job.way}", f"--bs={job.length}", f"--iodepth={job.depth}"]
        command += [f"--size={amount.size}", "--output-format=json", *more, *self.options]
        output = timing.run(command).output
        try:
            found = json.loads(output[output.index(b"{") :])["jobs"][0]["read" if job.reads else "write"]
            return float(found["iops"])
        except (ValueError, LookupError, TypeError) as error:
            raise IslandError(f"fio printed no result: {output[-200:]!r}") from error

    def renew(self) -> None:
        """Detach and attach the volume, so that nothing of it is in the page cache."""
        self.exports.detach(self.name)
        device = self.exports.attach(self.name, self.image).resolve()
        self.options = ["--ioengine=libaio", "--direct=1", f"--filename={device}"]

    def snapshot(self) -> None:
        """Take an internal snapshot and drop the earlier ones, as a daily snapshot does."""
        old = self.exports.internal_snapshots(self.name)
        self.exports.take_internal_snapshot(self.name, uuid.uuid4().hex)
        for name in old:
            self.exports.drop_internal_snapshot(self.name, name)


@contextlib.contextmanager
def _attach(place: _Place, kind: str, size: int) -> Iterator[_Volume]:
    """Attach a new volume as a device of a kind while the body runs."""
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
def _serve(place: _Place, size: int) -> Iterator[_Volume]:
    """Serve an equal volume at a socket, without a device, while the body runs."""
    exports = Exports(place.run, place.links, run_program, "nbd")
    volume = _Volume(exports, str(uuid.uuid4()), place.images / "served", [])
    Images(run_program).create_blank(volume.image, size)
    try:
        exports.serve(volume.name, volume.image)
        daemon = Daemon(place.run / volume.name, run_program)
        daemon.export()
        volume.options = ["--ioengine=nbd", f"--uri=nbd+unix:///volume?socket={daemon.socket}"]
        yield volume
    finally:
        exports.stop(volume.name)
        volume.image.unlink()


def _measure_kind(kind: str, context: Context) -> Iterator[Row | Counter | LeftOut]:
    """Yield all rows of one kind of device, or why it is left out on this machine."""
    amount = _QUICK if context.quick else _FULL
    with tempfile.TemporaryDirectory(prefix="island-bench-", dir=_LINKS) as links:
        place = _Place(context.scratch / "run", Path(links), context.scratch / "images")
        place.images.mkdir()
        try:
            _require_devices(place, kind)
        except IslandError as error:
            yield LeftOut(f"attached volume, {_NAMES[kind]}", str(error))
            return
        with _attach(place, kind, amount.size) as ours, _serve(place, amount.size) as theirs:
            yield from _measure_jobs(context, amount, kind, (ours, theirs))
        context.show_progress(f"{_NAMES[kind]}: the self-test")
        for speed in measure_speed(place.run, place.links, place.images, run_program, kind):
            work = f"{_NAMES[kind]}: {speed.shape.name}, by qemu-img"
            against = f"{_AGAINST}, opened by the same program"
            yield make_row(work, against, speed.pairs, unit="requests/s")


def _require_devices(place: _Place, kind: str) -> None:
    """Raise IslandError if this machine has no such devices, or if they do not return what was written."""
    if os.geteuid() != 0:
        raise IslandError("only root can make block devices; run the bench as root")
    check_data_path(place.run, place.links, place.images, run_program, kind)


def _measure_jobs(
    context: Context, amount: _Amount, kind: str, sides: tuple[_Volume, _Volume]
) -> Iterator[Row]:
    context.show_progress(f"filling two volumes of {amount.size // MIB} MiB")
    for side in sides:
        side.run_fio(_FILLING, amount)
    for job in _JOBS:
        limit = ["--time_based", f"--runtime={amount.milliseconds}ms"]
        yield _measure_job(
            context, amount, kind, job, sides, sides[0].renew if job.reads else lambda: None, limit
        )

    def take_snapshots() -> None:
        for side in sides:
            side.snapshot()

    # Each write goes to another cluster and is the first one there. An eighth of the clusters is written.
    first = [f"--blockalign={_CLUSTER}", f"--number_ios={amount.size // _CLUSTER // 8}"]
    yield _measure_job(context, amount, kind, _FIRST, sides, take_snapshots, first)


def _measure_job(
    context: Context,
    amount: _Amount,
    kind: str,
    job: _Job,
    sides: Sequence[_Volume],
    before: Callable[[], None],
    how: Sequence[str],
) -> Row:
    ours, theirs = sides
    work = f"{_NAMES[kind]}: {job.name}"
    context.show_progress(work)
    measured = run_pairs(
        amount.pairs,
        lambda: ours.run_fio(job, amount, *how),
        lambda: theirs.run_fio(job, amount, *how),
        before,
    )
    return make_row(work, _AGAINST, measured, unit="MiB/s" if job.length == MIB else "requests/s")


def _space(scale: Scale) -> int:
    """Return the bytes of two volumes, and of what the earlier snapshot keeps of each."""
    return 3 * _FULL.size if scale.large else 3 * _QUICK.size


CASES = tuple(
    Case(f"attached volume, {_NAMES[kind]}", partial(_measure_kind, kind), ("fio", "qemu-img"), _space)
    for kind in KINDS
)
