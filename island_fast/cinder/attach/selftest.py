"""Test whether this host can attach volumes, and whether their data path keeps data right.

Some data paths in the field corrupt data: a loop device with direct I/O over the FUSE export of QEMU 7.2, and
holes punched through that export. So the self-test has root write to a volume of its own in every way that a
guest or a file system has (`exercise.py`), and compares it with a model: through the device, and in the
image.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import numpy as np

from island_fast.cinder.attach.daemon import SYSTEMD
from island_fast.cinder.attach.exercise import BLOCK, DAMAGED, SIZE, VOLUME, digest
from island_fast.cinder.attach.exports import KINDS, Exports
from island_fast.cinder.attach.mounts import file_system_type
from island_fast.cinder.attach.nbd_devices import check_kernel
from island_fast.cinder.attach.speed import Speed, describe_slowness, measure
from island_fast.cinder.attach.udev import require_rule
from island_fast.cinder.attach.vduse_devices import check_vduse_kernel
from island_fast.dirtymap import BLOCK_SIZE
from island_fast.errors import DamagedError, IslandError
from island_fast.qcow2.block_reader import PointReader
from island_fast.qcow2.image import Image
from island_fast.qemu.open_files import read_sysfs
from island_fast.qemu.programs import PACKAGES, ProgramResult, RunProgram, check_run, error_text

__all__ = ["VOLUME", "check_data_path", "choose_kind", "measure_speed"]

_LOG = logging.getLogger(__name__)
_SPEED_SIZE = 16 << 20  # bytes
_LOOP_MAX_PART = Path("/sys/module/loop/parameters/max_part")
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
    _check_host(links, kind, execute)
    exports = Exports(run, links, execute, kind)
    exports.stop(VOLUME)
    with _create_image(images, "qcow2", SIZE, execute) as image:
        try:
            wanted = _write_and_read(exports, image, kind)
        finally:
            exports.stop(VOLUME)
        _require_equal(digest(_read_image(image)), wanted, "in the image", kind)
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
            device = exports.attach(VOLUME, image).resolve()
            return list(measure(device, compared, _let_root_open(device, exports, execute)))
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


def _check_host(links: Path, kind: str, execute: RunProgram) -> None:
    """Raise IslandError for the first thing that is missing. Missing rights are found when they are used."""
    programs = ["qemu-storage-daemon", "qemu-img", "systemd-run" if SYSTEMD.is_dir() else "setsid"]
    if kind == "vduse":
        check_vduse_kernel()
        programs += ["flock", "island-vduse"]
    elif kind == "nbd":
        check_kernel()
        programs.append("island-nbd")
    else:
        _check_nodes()
        programs += ["fusermount3", "island-loop"]
    for program in programs:
        if shutil.which(program, path=os.environ.get("PATH", os.defpath) + _SBIN) is None:
            package = PACKAGES.get(program, "island-fast")
            raise IslandError(f"the program {program} is missing; install the package {package}")
    if kind == "vduse":
        helped = check_run(execute, ["qemu-storage-daemon", "--help"], "list the kinds of its exports")
        if "[type=]vduse-blk" not in helped:
            raise IslandError("qemu-storage-daemon was built without VDUSE exports, which QEMU has since 7.1")
    if kind == "loop":
        _check_fuse(execute)
    if kind == "loop" and os.geteuid() != 0 and "user_allow_other" not in _read_lines(_FUSE_CONF):
        raise IslandError(
            f"root cannot open the exports of this user; add a line user_allow_other to {_FUSE_CONF}"
        )
    file_system = file_system_type(links)
    if file_system not in _IN_MEMORY:
        raise IslandError(
            f"the folder of links {str(links)!r} is on {file_system} and outlives a reboot, after which its "
            "links lead to other volumes' disks; put it on a tmpfs, below /run"
        )


def _check_fuse(execute: RunProgram) -> None:
    """Raise IslandError if QEMU was built without its FUSE export: then its help does not mention it."""
    helped = check_run(execute, ["qemu-storage-daemon", "--help"], "list the kinds of its exports")
    if "[type=]fuse" not in helped:
        raise IslandError(
            "qemu-storage-daemon was built without FUSE exports here, as RHEL's is; only kernel NBD is left: "
            "load the module nbd with max_part=0"
        )


def _check_nodes() -> None:
    for node, module in (("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")):
        if not os.path.exists(node):
            raise IslandError(
                f"there is no {node}; load the module {module}, or give the container this device"
            )
    if read_sysfs(_LOOP_MAX_PART) not in ("", "0"):
        raise IslandError(
            "the module loop reads the partition tables that tenants wrote; load it with max_part=0, "
            "by a line 'options loop max_part=0' in /etc/modprobe.d"
        )
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise IslandError("this user cannot open /dev/fuse; give it mode 0666, as udev does")


def _write_and_read(exports: Exports, image: Path, kind: str) -> list[str]:
    """Write in all ways, read through the same device and through a new one; return digests of the data."""
    require_rule(exports.attach(VOLUME, image).resolve())
    wanted = _run_on_device(exports, "exercise", kind).split()
    exports.detach(VOLUME)
    exports.attach(VOLUME, image)
    found = _run_on_device(exports, "digest", kind).split()
    _require_equal(found, wanted, "after it was attached again", kind)
    return wanted


def _run_on_device(exports: Exports, verb: str, kind: str) -> str:
    """Let root work on the self-test's device; return the output. DamagedError if it finds wrong data."""
    try:
        done = exports.run_as_root(VOLUME, verb)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise IslandError(f"the self-test cannot {verb} its device of kind {kind}: {error}") from error
    if done.returncode == DAMAGED:
        raise _damage(kind, error_text(done.stderr))
    if done.returncode:
        raise IslandError(
            f"the self-test cannot {verb} its device of kind {kind}: {error_text(done.stderr or '')}"
        )
    return done.stdout


def _let_root_open(device: Path, exports: Exports, execute: RunProgram) -> RunProgram:
    """Return `execute`, except that `qemu-img bench` on the self-test's device is run by root."""

    def run(
        command: Sequence[str], /, *, root: bool = False, env: Mapping[str, str] | None = None
    ) -> ProgramResult:
        if command[-1] != str(device):
            return execute(command, root=root, env=env)
        return exports.run_as_root(VOLUME, "bench", *command[2:10])

    return run


def _damage(kind: str, what: str) -> DamagedError:
    return DamagedError(f"the data path of kind {kind} corrupts data: {what}; do not use it")


def _require_equal(found: Sequence[str], wanted: Sequence[str], where: str, kind: str) -> None:
    """Compare digests of blocks."""
    pairs = enumerate(zip_longest(found, wanted))
    differ = [number for number, (one, other) in pairs if one != other]
    if differ:
        raise _damage(
            kind,
            f"{len(differ)} blocks of {BLOCK} bytes, from byte {differ[0] * BLOCK} on, differ from what was "
            f"written ({where})",
        )


def _read_image(image: Path) -> bytes:
    """Read the whole volume from the image, with this package's own reader."""
    with Image.open(image) as opened:
        point = opened.active_point()
        blocks = np.arange(point.blocks)
        rows = np.empty((len(blocks), BLOCK_SIZE), np.uint8)
        PointReader(opened, point).read(blocks, rows)
    return rows.tobytes()[:SIZE]


def _read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(errors="replace").splitlines()]
    except OSError:
        return []
