"""How fast the device in front of a volume is, against qemu that has the same kind of image open itself.

The same program, `qemu-img bench`, sends the same requests to the device and to an image of its own on the
same disk, in turn, so that what else the machine does meets both. A guest's own path to its disk comes on top
of either. Flushes are not measured: both sides write past the page cache, and a flush is the disk's matter.
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

__all__ = ["ENOUGH", "SHAPES", "Shape", "Speed", "complaint", "measure"]

ENOUGH = 0.5
"""Of the speed of qemu's own qcow2; a device with less is complained of."""

_PAIRS = 5
_FEW = 3  # pairs, of which one that met a busy moment is not the median
_PATIENCE, _MORE_PATIENCE = 0.4, 1.5  # seconds for one shape: with few pairs at least, and with fewer
_RUN = 0.05  # seconds that the slower side's run should take: `qemu-img bench` tells milliseconds
_GROWTH = 64  # how much longer than the run before it one may be
_TOOK = re.compile(r"Run completed in (\d+\.\d+) seconds")
_WAYS_OUT = {
    "loop": "FUSE and a loop device do one request at a time, so load the module nbd if the kernel has it",
    "nbd": "its requests go through a socket to one thread, so see whether this host's processors are busy",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Writes of `length` bytes, `depth` at a time, each `step` bytes after the one before, round and round.

    `first` is how many the first run has, which warms up and does not count.
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
"""The first one maps a volume of 16 MiB, so that the others write over what is there. The step of the
scattered ones is odd in units of 4 KiB: it visits every place of a volume whose size is a power of two."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Requests in a second by the device and by qemu's own qcow2, in pairs that were measured in turn."""

    shape: Shape
    pairs: tuple[tuple[float, float], ...]

    @property
    def device(self) -> float:
        """The device's median."""
        return statistics.median(device for device, _ in self.pairs)

    @property
    def image(self) -> float:
        """The median of qemu's own qcow2."""
        return statistics.median(image for _, image in self.pairs)

    @property
    def ratio(self) -> float:
        """The median of the pairs' ratios, device to qemu's own."""
        return statistics.median(device / image for device, image in self.pairs)

    def __str__(self) -> str:
        return f"{self.shape.name}: {self.device:.0f}/s for {self.image:.0f}/s ({self.ratio:.2f})"


def measure(device: Path, image: Path, execute: RunProgram) -> Iterator[Speed]:
    """Write over all of a device, and over an image of the same size that nobody has open; about 2 s.

    This user must be able to open both. IslandError if `qemu-img bench` fails on either.
    """
    sides = _device_words(device), _image_words(image)
    for shape in SHAPES:
        yield Speed(shape, tuple(_alternate(sides, shape, execute)))


def complaint(speeds: Sequence[Speed], kind: str) -> str:
    """One sentence on what is slower than it should be, with the figures and a way out; "" if all is well."""
    slow = [speed for speed in speeds if speed.ratio < ENOUGH]
    if not slow:
        return ""
    figures = "; ".join(map(str, slow))
    return (
        f"devices of kind {kind} reach less than {ENOUGH:g} of the speed of qemu's own qcow2 on the same "
        f"disk ({figures}); {_WAYS_OUT[kind]} (docs/cinder.md, Speed)"
    )


def _device_words(device: Path) -> list[str]:
    """How `qemu-img bench` is told of a block device."""
    return ["-t", "none", "-f", "raw", str(device)]


def _image_words(image: Path) -> list[str]:
    """How it is told of an image: with the options that a volume's daemon uses."""
    with Image.open(image) as opened:
        size, cluster = opened.header.size, opened.header.cluster_size
    direct = supports_direct_io(image)
    node = {**qcow2_node(size, cluster, direct), "file": file_node(image, direct)}
    for one in (node, node["file"]):
        del one["node-name"]  # type: ignore[attr-defined]
    return ["json:" + json.dumps(node)]


def _alternate(sides: Sequence[list[str]], shape: Shape, execute: RunProgram) -> list[tuple[float, float]]:
    """Rates of both sides, run by run in turn; the runs get as long as they must be to be told apart."""
    begun = time.monotonic()
    count, found = shape.first, list[tuple[float, float]]()
    while len(found) <= _PAIRS:
        turn = (0, 1) if len(found) % 2 else (1, 0)
        took = {side: _run(sides[side], shape, count, execute) for side in turn}
        found.append((count / took[0], count / took[1]))
        if time.monotonic() - begun > (_PATIENCE if len(found) > _FEW else _MORE_PATIENCE):
            break
        count = _next_count(count, max(took.values()))
    return found[1:] or found


def _next_count(count: int, took: float) -> int:
    return max(1, min(round(count * _RUN / took), count * _GROWTH))


def _run(side: list[str], shape: Shape, count: int, execute: RunProgram) -> float:
    """Seconds that so many requests take."""
    how = ["-c", count, "-d", shape.depth, "-s", shape.length, "-S", shape.step, "-w", "--pattern", 165]
    said = check_run(execute, ["qemu-img", "bench", *map(str, how), *side], "measure a device's speed")
    took = _TOOK.search(said)
    if took is None:
        raise IslandError(f"qemu-img bench does not say how long it took, but {said[-100:]!r}")
    return max(float(took[1]), 0.001)
