"""Test whether this host can attach volumes, and whether their data path keeps data right.

Some data paths in the field corrupt data: a loop device with direct I/O over the FUSE export of QEMU 7.2, and
holes punched through that export. So the self-test writes to a volume of its own in every way that a guest
or a file system has, and compares it with a model: through the device, and in the image.
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
from island_fast.cinder.attach.mounts import file_system_type
from island_fast.cinder.attach.nbd_devices import check_kernel
from island_fast.cinder.attach.speed import Speed, describe_slowness, measure
from island_fast.dirtymap import BLOCK_SIZE
from island_fast.errors import DamagedError, IslandError
from island_fast.qcow2.block_reader import PointReader
from island_fast.qcow2.image import Image
from island_fast.qemu.programs import RunProgram, check_run

__all__ = ["check_data_path", "choose_kind", "measure_speed"]

_LOG = logging.getLogger(__name__)
VOLUME = "5e1f7e57-0000-4000-8000-000000000000"
"""The volume of every self-test. The next test removes what a killed one left."""

_SIZE = 32 << 20  # bytes
_SPEED_SIZE = 16 << 20  # bytes
_STEPS = 400
_LONGEST = 256 << 10  # bytes of one request
_SECTOR = 512  # bytes
_IN_MEMORY = ("tmpfs", "ramfs")
_FUSE_CONF = Path("/etc/fuse.conf")
_SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"  # programs for root are found by root's PATH


def choose_kind(run: Path, links: Path, images: Path, execute: RunProgram) -> str:
    """Return the best kind of block device that works here; raise IslandError with the reasons if none does.

    Logs its speed, with a warning if it is much slower than its disk.
    """
    reasons = []
    for kind in KINDS:
        try:
            check_data_path(run, links, images, execute, kind)
        except IslandError as error:
            reasons.append(f"{kind}: {error}")
            _LOG.info("devices of kind %s cannot be used: %s", kind, error)
        else:
            _log_speed(run, links, images, execute, kind)
            return kind
    raise IslandError(f"no kind of block device for volumes works on this host ({'; '.join(reasons)})")


def check_data_path(run: Path, links: Path, images: Path, execute: RunProgram, kind: str) -> None:
    """Attach a volume of 32 MiB, whose image is made in `images`, write to it, and compare what it reads.

    Raises IslandError that names what is missing on this host, or DamagedError if any data differs from what
    was written. Nothing is left. `run`, `links`, `execute` and `kind` are those of `Exports`.
    """
    _check_host(links, kind)
    exports = Exports(run, links, execute, kind)
    exports.stop(VOLUME)
    with _create_image(images, "qcow2", _SIZE, execute) as image:
        try:
            model = _write_and_read(exports, image, execute, kind)
        finally:
            exports.stop(VOLUME)
        _require_equal(_read_image(image), model, "in the image", kind)
        check = ["qemu-img", "check", "-q", "-f", "qcow2", str(image)]
        check_run(execute, check, "find the image of the self-test intact")


def measure_speed(run: Path, links: Path, images: Path, execute: RunProgram, kind: str) -> list[Speed]:
    """Measure the device of an attached volume, and an image on the same disk to compare it with.

    This takes about two seconds, and longer on a slow disk, which must write 32 MiB and do some hundred
    requests. Raises IslandError if the volume cannot be attached or measured. Nothing is left. The arguments
    are those of `check_data_path`.
    """
    exports = Exports(run, links, execute, kind)
    exports.stop(VOLUME)
    with (
        _create_image(images, "qcow2", _SPEED_SIZE, execute) as image,
        _create_image(images, "compared", _SPEED_SIZE, execute) as compared,
    ):
        try:
            with _own_device(exports.attach(VOLUME, image).resolve(), execute) as device:
                return list(measure(device, compared, execute))
        finally:
            exports.stop(VOLUME)


def _log_speed(run: Path, links: Path, images: Path, execute: RunProgram, kind: str) -> None:
    """Measure and log how fast devices are. A failure is only logged, because nothing depends on it."""
    try:
        speeds = measure_speed(run, links, images, execute, kind)
    except IslandError as error:
        _LOG.warning("the speed of devices of kind %s could not be measured: %s", kind, error)
        return
    if warning := describe_slowness(speeds, kind):
        _LOG.warning("%s", warning)
    _LOG.info(
        "speed of devices of kind %s, compared with qemu's own qcow2: %s", kind, "; ".join(map(str, speeds))
    )


@contextmanager
def _create_image(images: Path, suffix: str, size: int, execute: RunProgram) -> Iterator[Path]:
    """Create an image for the self-test, and remove it when the body ends.

    It replaces one that a killed self-test left.
    """
    image = images / f".{VOLUME}.{suffix}"
    image.unlink(missing_ok=True)
    try:
        make = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", str(image), str(size)]
        check_run(execute, make, "create the image of the self-test")
        yield image
    finally:
        image.unlink(missing_ok=True)


def _check_host(links: Path, kind: str) -> None:
    """Raise IslandError for the first thing that is missing. Missing rights are found when they are used."""
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
    if kind != "nbd" and os.geteuid() != 0 and "user_allow_other" not in _read_lines(_FUSE_CONF):
        raise IslandError(
            f"root cannot open the exports of this user; add a line user_allow_other to {_FUSE_CONF}"
        )
    file_system = file_system_type(links)
    if file_system not in _IN_MEMORY:
        raise IslandError(
            f"the folder of links {str(links)!r} is on {file_system} and outlives a reboot, after which its "
            "links lead to other volumes' disks; put it on a tmpfs, below /run"
        )


def _check_nodes() -> None:
    for node, module in (("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")):
        if not os.path.exists(node):
            raise IslandError(
                f"there is no {node}; load the module {module}, or give the container this device"
            )
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise IslandError("this user cannot open /dev/fuse; give it mode 0666, as udev does")


def _write_and_read(exports: Exports, image: Path, execute: RunProgram, kind: str) -> bytearray:
    """Write in all ways, read through the same device and through a new one; return what must be there."""
    dice = random.Random(1)
    model = bytearray(_SIZE)
    with _open_device(exports.attach(VOLUME, image), execute) as device:
        for step in range(_STEPS):
            _change_at_random(device, model, dice)
            if step % 16 == 0:
                begin = dice.randrange(_SIZE - _LONGEST) // _SECTOR * _SECTOR
                stop = begin + _LONGEST
                _require_equal(
                    device.read_direct(begin, _LONGEST), model[begin:stop], "while it was written", kind
                )
        device.flush()
        _require_equal(device.read_direct(0, _SIZE), model, "without the page cache", kind)
    exports.detach(VOLUME)
    with _open_device(exports.attach(VOLUME, image), execute) as device:
        _require_equal(device.read(0, _SIZE), model, "after it was attached again", kind)
    return model


def _change_at_random(device: BlockDevice, model: bytearray, dice: random.Random) -> None:
    """Send one random request to the device, and make the same change to the model."""
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
            model[begin:stop] = _check_discarded(device.read_direct(begin, length), bytes(model[begin:stop]))
    else:
        device.flush()


def _check_discarded(now: bytes, before: bytes) -> bytes:
    """Return what a discard left: in each sector old data or zeros; raise DamagedError if anything else."""
    rows = np.frombuffer(now, np.uint8).reshape(-1, _SECTOR)
    old = np.frombuffer(before, np.uint8).reshape(-1, _SECTOR)
    if np.any(rows.any(axis=1) & (rows != old).any(axis=1)):
        raise DamagedError(
            "the data path corrupts data: a discard changed data into other data; do not use it"
        )
    return now


@contextmanager
def _open_device(link: Path, execute: RunProgram) -> Iterator[BlockDevice]:
    """Open the device that a link leads to."""
    with _own_device(link.resolve(), execute) as device, BlockDevice(device) as opened:
        yield opened


@contextmanager
def _own_device(device: Path, execute: RunProgram) -> Iterator[Path]:
    """Make this user the owner of a device while the body runs; then the old owner has it back."""
    owner = os.stat(device)
    _change_owner(device, (os.geteuid(), os.getegid()), execute)
    try:
        yield device
    finally:
        _change_owner(device, (owner.st_uid, owner.st_gid), execute)


def _change_owner(device: Path, owner: tuple[int, int], execute: RunProgram) -> None:
    """Give a device to a user and a group; root needs no change, because it can open any device."""
    if os.geteuid() != 0:
        command = ["chown", f"{owner[0]}:{owner[1]}", str(device)]
        check_run(execute, command, f"change the owner of {device}", root=True)


def _require_equal(found: bytes | bytearray, wanted: bytes | bytearray, where: str, kind: str) -> None:
    if found != wanted:
        differ = np.flatnonzero(np.frombuffer(found, np.uint8) != np.frombuffer(wanted, np.uint8))
        raise DamagedError(
            f"the data path of kind {kind} corrupts data: {len(differ)} bytes, from {differ[0]} on, differ "
            f"from what was written ({where}); do not use it"
        )


def _read_image(image: Path) -> bytes:
    """Read the whole volume from the image, with this package's own reader."""
    with Image.open(image) as opened:
        point = opened.active_point()
        blocks = np.arange(point.blocks)
        rows = np.empty((len(blocks), BLOCK_SIZE), np.uint8)
        PointReader(opened, point).read(blocks, rows)
    return rows.tobytes()[:_SIZE]


def _read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(errors="replace").splitlines()]
    except OSError:
        return []
