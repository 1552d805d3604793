"""Compare the speed of a volume's block device with that of a qemu that opens an equal image itself.

The same program, `qemu-img bench`, sends the same requests to the device and to an image on the same disk, in
turn, so that other load on the machine affects both. In both cases a guest's own path to its disk comes on
top. Flushes are not measured: both sides write past the page cache, and a flush depends on the disk alone.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from island_fast.errors import IslandError
from island_fast.qcow2.image import Image
from island_fast.qemu.block_nodes import file_node, qcow2_node, supports_direct_io
from island_fast.qemu.programs import RunProgram, check_run

__all__ = ["ENOUGH", "SHAPES", "Shape", "Speed", "describe_slowness", "measure"]

ENOUGH = 0.5
"""The share of the speed of qemu's own qcow2 below which the log has a warning."""

_PAIRS = 5
_FEW = 3  # pairs; with so many, one that met a busy moment is not the median
_LIMIT, _LIMIT_FOR_FEW = 0.4, 1.5  # seconds of requests: once there are more than few pairs, and until then
_WAIT = 3.0  # seconds for one shape once there are more than few pairs: starting a program as root takes long
_RUN = 0.05  # seconds that the slower side's run should take: `qemu-img bench` prints milliseconds
_GROWTH = 64  # how many times longer a run can be than the one before it
_TOOK = re.compile(r"Run completed in (\d+\.\d+) seconds")
_ADVICE = {
    "loop": "FUSE and a loop device do one request at a time, so load the module nbd if the kernel has it",
    "vduse": "its requests go to one thread of the daemon, so check whether this host's processors are busy",
    "nbd": "its requests go through a socket to one thread, so check whether this host's processors are busy",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Writes of `length` bytes, `depth` at a time, each `step` bytes after the last one, wrapping at the end.

    `first` is the number of writes in the first run, which warms up and is not counted.
    """

    name: str
    length: int
    depth: int
    step: int
    first: int


SHAPES = (
    Shape("1 MiB writes in order", 1 << 20, 4, 1 << 20, 16),
    Shape("4 KiB writes, one at a time", 4096, 1, 4096 * 1237, 16),
    Shape("4 KiB writes, 32 at a time", 4096, 32, 4096 * 1237, 32),
)
"""The first shape maps a volume of 16 MiB, so that the others overwrite data. The step of the scattered ones
is odd in units of 4 KiB, so it visits every place of a volume whose size is a power of two."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Requests per second of the device and of qemu's own qcow2, in pairs that were measured in turn."""

    shape: Shape
    pairs: tuple[tuple[float, float], ...]

    @property
    def device(self) -> float:
        """The median of the device."""
        return statistics.median(device for device, _ in self.pairs)

    @property
    def image(self) -> float:
        """The median of qemu's own qcow2."""
        return statistics.median(image for _, image in self.pairs)

    @property
    def ratio(self) -> float:
        """The median of the ratios of the pairs, device to qemu's own qcow2."""
        return statistics.median(device / image for device, image in self.pairs)

    def __str__(self) -> str:
        return f"{self.shape.name}: {self.device:.0f}/s against {self.image:.0f}/s ({self.ratio:.2f})"


def measure(device: Path, image: Path, execute: RunProgram) -> Iterator[Speed]:
    """Overwrite a device, and an image of the same size; yield the speed of each shape.

    This takes about 2 s. No other process has the image open, and this user must be able to open both. Raises
    IslandError if `qemu-img bench` fails.
    """
    sides = ["-t", "none", "-f", "raw", str(device)], _image_arguments(image)
    for shape in SHAPES:
        yield Speed(shape, tuple(_measure_in_turn(sides, shape, execute)))


def describe_slowness(speeds: Sequence[Speed], kind: str) -> str:
    """Return a warning about the shapes that are too slow, with figures and advice, or "" if none is."""
    slow = [speed for speed in speeds if speed.ratio < ENOUGH]
    if not slow:
        return ""
    figures = "; ".join(map(str, slow))
    return (
        f"devices of kind {kind} reach less than {ENOUGH:g} of the speed of qemu's own qcow2 on the same "
        f"disk ({figures}); {_ADVICE[kind]} (see docs/cinder.md, Speed)"
    )


def _image_arguments(image: Path) -> list[str]:
    """Return arguments with which `qemu-img bench` opens an image the way that a volume's daemon does."""
    with Image.open(image) as opened:
        size, cluster = opened.header.size, opened.header.cluster_size
    direct = supports_direct_io(image)
    node = {**qcow2_node(size, cluster, direct), "file": file_node(image, direct)}
    for one in (node, node["file"]):
        del one["node-name"]  # type: ignore[attr-defined]
    return ["json:" + json.dumps(node)]


def _measure_in_turn(
    sides: Sequence[list[str]], shape: Shape, execute: RunProgram
) -> list[tuple[float, float]]:
    """Return the rates of both sides, run by run in turn; runs get longer until times can be compared."""
    begun = time.monotonic()
    count, found, spent = shape.first, list[tuple[float, float]](), 0.0
    while len(found) <= _PAIRS:
        turn = (0, 1) if len(found) % 2 else (1, 0)
        took = {side: _time_run(sides[side], shape, count, execute) for side in turn}
        found.append((count / took[0], count / took[1]))
        spent += sum(took.values())
        enough = len(found) > _FEW
        if spent > (_LIMIT if enough else _LIMIT_FOR_FEW) or (enough and time.monotonic() - begun > _WAIT):
            break
        count = max(1, min(round(count * _RUN / max(took.values())), count * _GROWTH))
    return found[1:] or found


def _time_run(side: list[str], shape: Shape, count: int, execute: RunProgram) -> float:
    """Return the seconds that `count` requests take."""
    options = ["-c", count, "-d", shape.depth, "-s", shape.length, "-S", shape.step, "-w", "--pattern", 165]
    said = check_run(execute, ["qemu-img", "bench", *map(str, options), *side], "measure a device's speed")
    took = _TOOK.search(said)
    if took is None:
        raise IslandError(f"qemu-img bench did not report how long it took, but {said[-100:]!r}")
    return max(float(took[1]), 0.001)
