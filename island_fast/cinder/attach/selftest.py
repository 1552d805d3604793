"""Whether this host can put block devices in front of volumes, and whether what goes through them is right.

Data paths that corrupt are there in the field: a loop device with direct I/O over the FUSE export of QEMU
7.2, and holes punched through that export. So a volume of our own is written in every way that a guest
or a file system has, and must read back as a model of it says: through the device, and from the image.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from island_fast.cinder.attach.block_device import BlockDevice
from island_fast.cinder.attach.daemon import SYSTEMD
from island_fast.cinder.attach.exports import KINDS, Exports
from island_fast.cinder.attach.mounts import file_system
from island_fast.cinder.attach.nbd_devices import check_kernel
from island_fast.cinder.attach.speed import Speed, complaint, measure
from island_fast.dirtymap import BLOCK_SIZE
from island_fast.errors import DamagedError, IslandError
from island_fast.qcow2.block_reader import PointReader
from island_fast.qcow2.image import Image
from island_fast.qemu.programs import Execute, succeed

__all__ = ["check_data_path", "choose_kind", "measure_speed"]

_LOG = logging.getLogger(__name__)
VOLUME = "5e1f7e57-0000-4000-8000-000000000000"
"""The volume of every self-test; what a test that was killed left is cleared away by the next."""

_SIZE = 32 << 20  # bytes
_SPEED_SIZE = 16 << 20  # bytes
_STEPS = 400
_LONGEST = 256 << 10  # bytes of one request
_SECTOR = 512  # bytes
_IN_MEMORY = ("tmpfs", "ramfs")
_FUSE_CONF = Path("/etc/fuse.conf")
_SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"  # root's programs are run with root's path


def choose_kind(run: Path, links: Path, images: Path, execute: Execute) -> str:
    """Return the best kind of block device that works here; IslandError with the reasons if none does.

    If it is much slower than its disk, the log has a warning that says so.
    """
    reasons = []
    for kind in KINDS:
        try:
            check_data_path(run, links, images, execute, kind)
        except IslandError as error:
            reasons.append(f"{kind}: {error}")
            _LOG.info("no device of kind %s is put in front of volumes: %s", kind, error)
        else:
            _tell_speed(run, links, images, execute, kind)
            return kind
    raise IslandError(f"no block device can be put in front of a volume here ({'; '.join(reasons)})")


def check_data_path(run: Path, links: Path, images: Path, execute: Execute, kind: str) -> None:
    """Attach a volume of 32 MiB, whose image is made in `images`, write to it and compare.

    IslandError that names what is missing on this host; DamagedError if anything reads back otherwise than it
    was written. Nothing is left. `run`, `links`, `execute` and `kind` are those of `Exports`.
    """
    _check_host(links, kind)
    exports = Exports(run, links, execute, kind)
    exports.stop(VOLUME)
    with _image(images, "qcow2", _SIZE, execute) as image:
        try:
            model = _write_and_read(exports, image, execute, kind)
        finally:
            exports.stop(VOLUME)
        _compare(_content(image), model, "in the image", kind)
        check = ["qemu-img", "check", "-q", "-f", "qcow2", str(image)]
        succeed(execute, check, "find the image of the self-test whole")


def measure_speed(run: Path, links: Path, images: Path, execute: Execute, kind: str) -> list[Speed]:
    """Measure the device of an attached volume against an image beside its own, in about two seconds.

    A slow disk makes it longer: 32 MiB and some hundred requests it must do. IslandError if the volume
    cannot be attached or measured. Nothing is left. The arguments are those of `check_data_path`.
    """
    exports = Exports(run, links, execute, kind)
    exports.stop(VOLUME)
    with (
        _image(images, "qcow2", _SPEED_SIZE, execute) as image,
        _image(images, "beside", _SPEED_SIZE, execute) as beside,
    ):
        try:
            with _owned(exports.attach(VOLUME, image).resolve(), execute) as device:
                return list(measure(device, beside, execute))
        finally:
            exports.stop(VOLUME)


def _tell_speed(run: Path, links: Path, images: Path, execute: Execute, kind: str) -> None:
    """Log how fast devices are. Nothing depends on it, so a measurement that fails is only told, too."""
    try:
        speeds = measure_speed(run, links, images, execute, kind)
    except IslandError as error:
        _LOG.warning("how fast devices of kind %s are could not be measured: %s", kind, error)
        return
    slow = complaint(speeds, kind)
    if slow:
        _LOG.warning("%s", slow)
    _LOG.info("devices of kind %s for qemu's own qcow2: %s", kind, "; ".join(map(str, speeds)))


@contextmanager
def _image(images: Path, suffix: str, size: int, execute: Execute) -> Iterator[Path]:
    """A new image of the self-test's, in place of one that a killed self-test left, and gone afterwards."""
    image = images / f".{VOLUME}.{suffix}"
    image.unlink(missing_ok=True)
    try:
        make = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", str(image), str(size)]
        succeed(execute, make, "make the image of the self-test")
        yield image
    finally:
        image.unlink(missing_ok=True)


def _check_host(links: Path, kind: str) -> None:
    """IslandError for the first thing that is missing; rights show themselves when they are used."""
    programs = [
        ("qemu-storage-daemon", "qemu-system-common"),
        ("qemu-img", "qemu-utils"),
        ("systemd-run", "systemd") if SYSTEMD.is_dir() else ("setsid", "util-linux"),
    ]
    if kind == "nbd":
        check_kernel()
        programs.append(("island-nbd", "island-fast"))
    else:
        _check_nodes()
        programs += [("fusermount3", "fuse3"), ("losetup", "mount")]
    for program, package in programs:
        if shutil.which(program, path=os.environ.get("PATH", os.defpath) + _SBIN) is None:
            raise IslandError(f"the program {program} is missing; install the package {package}")
    if kind != "nbd" and os.geteuid() != 0 and "user_allow_other" not in _lines(_FUSE_CONF):
        raise IslandError(
            f"root may not use the exports of this user; add a line user_allow_other to {_FUSE_CONF}"
        )
    place = file_system(links)
    if place not in _IN_MEMORY:
        raise IslandError(
            f"the folder of links {str(links)!r} is on {place} and outlives a reboot, after which its links "
            f"lead to other volumes' disks; put it on a tmpfs, below /run"
        )


def _check_nodes() -> None:
    for node, module in (("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")):
        if not os.path.exists(node):
            raise IslandError(
                f"there is no {node}; load the module {module}, or give the container that device"
            )
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise IslandError("this user may not open /dev/fuse; give it mode 0666, as udev does")


def _write_and_read(exports: Exports, image: Path, execute: Execute, kind: str) -> bytearray:
    """Write in all ways, then read through the same device and through a new one; what must be there."""
    dice = random.Random(1)
    model = bytearray(_SIZE)
    with _opened(exports.attach(VOLUME, image), execute) as device:
        for step in range(_STEPS):
            _change(device, model, dice)
            if step % 16 == 0:
                begin = dice.randrange(_SIZE - _LONGEST) // _SECTOR * _SECTOR
                stop = begin + _LONGEST
                _compare(device.read_direct(begin, _LONGEST), model[begin:stop], "while it was written", kind)
        device.flush()
        _compare(device.read_direct(0, _SIZE), model, "without the page cache", kind)
    exports.detach(VOLUME)
    with _opened(exports.attach(VOLUME, image), execute) as device:
        _compare(device.read(0, _SIZE), model, "after it was attached again", kind)
    return model


def _change(device: BlockDevice, model: bytearray, dice: random.Random) -> None:
    """One random request, and the same to the model."""
    way = dice.choice(["write", "write", "direct", "direct", "zero", "hole", "discard", "flush"])
    length = dice.choice([_SECTOR, 4096, 65536, _LONGEST, dice.randrange(1, _LONGEST)])
    begin = dice.randrange(_SIZE - length)
    if way != "write":
        begin, length = begin // _SECTOR * _SECTOR, -(-length // _SECTOR) * _SECTOR
    stop = begin + length
    if way in ("write", "direct"):
        data = dice.randbytes(length)
        (device.write if way == "write" else device.write_direct)(begin, data)
        model[begin:stop] = data
    elif way == "zero":
        device.zero(begin, length)
        model[begin:stop] = bytes(length)
    elif way == "hole":
        if device.punch(begin, length):
            model[begin:stop] = bytes(length)
    elif way == "discard":
        if device.discard(begin, length):
            model[begin:stop] = _discarded(device.read_direct(begin, length), bytes(model[begin:stop]))
    else:
        device.flush()


def _discarded(now: bytes, before: bytes) -> bytes:
    """What a discard left, which may be anything of the two: old data or zeros, sector by sector."""
    rows = np.frombuffer(now, np.uint8).reshape(-1, _SECTOR)
    old = np.frombuffer(before, np.uint8).reshape(-1, _SECTOR)
    if np.any(rows.any(axis=1) & (rows != old).any(axis=1)):
        raise DamagedError("the data path corrupts: a discard changed data into other data; do not use it")
    return now


@contextmanager
def _opened(link: Path, execute: Execute) -> Iterator[BlockDevice]:
    """The device, opened."""
    with _owned(link.resolve(), execute) as device, BlockDevice(device) as opened:
        yield opened


@contextmanager
def _owned(device: Path, execute: Execute) -> Iterator[Path]:
    """The device; it is this user's for as long as the body runs, and then whose it was."""
    owner = os.stat(device)
    ours = (os.geteuid(), os.getegid())
    _give(device, ours, execute)
    try:
        yield device
    finally:
        _give(device, (owner.st_uid, owner.st_gid), execute)


def _give(device: Path, to: tuple[int, int], execute: Execute) -> None:
    if os.geteuid() != 0:
        succeed(
            execute, ["chown", f"{to[0]}:{to[1]}", str(device)], f"change the owner of {device}", root=True
        )


def _compare(found: bytes | bytearray, wanted: bytes | bytearray, where: str, kind: str) -> None:
    if found != wanted:
        differ = np.flatnonzero(np.frombuffer(found, np.uint8) != np.frombuffer(wanted, np.uint8))
        raise DamagedError(
            f"the data path of kind {kind} corrupts: {len(differ)} bytes from {differ[0]} on are not "
            f"what was written, {where}; do not use it"
        )


def _content(image: Path) -> bytes:
    """The volume as our own reader finds it in the image."""
    with Image.open(image) as opened:
        point = opened.active_point()
        blocks = np.arange(point.blocks)
        rows = np.empty((len(blocks), BLOCK_SIZE), np.uint8)
        PointReader(opened, point).read(blocks, rows)
    return rows.tobytes()[:_SIZE]


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(errors="replace").splitlines()]
    except OSError:
        return []
