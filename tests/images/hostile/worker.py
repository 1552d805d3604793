"""Reads images named on standard input in every way there is, in bounded memory; one line of JSON for each.

Seconds are of the processor, so that a busy machine makes no difference; who started this watches the clock.

A program of its own: it runs in a process that may be killed.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from island_fast.dirtymap import BLOCK_SIZE
from island_fast.errors import IslandError
from island_fast.qcow2.bitmaps import read_bitmaps
from island_fast.qcow2.block_reader import PointReader
from island_fast.qcow2.changes import count_shared_copied, find_allocated, find_changed
from island_fast.qcow2.extents import iter_extents
from island_fast.qcow2.image import Image, Point
from island_fast.qcow2.snapshots import InternalSnapshot

ADDRESS_SPACE = 2 << 30
POINTS = 3
BATCH = 64


def _peak_resident():
    """Most MiB of memory that this process ever had; ru_maxrss counts what its parent had when it forked."""
    line = next(li for li in Path("/proc/self/status").read_text().splitlines() if li.startswith("VmHWM"))
    return int(line.split()[1]) >> 10


def content(image: Image, point: Point) -> str:
    """Digest of the blocks that are not zero, found as a full scan finds them."""
    reader = PointReader(image, point)
    digest = hashlib.sha256()
    out = np.empty((BATCH, BLOCK_SIZE), np.uint8)
    for blocks in find_allocated(image, point).batches(BATCH):
        rows = out[: len(blocks)]
        reader.read(blocks, rows)
        for block, row in zip(blocks.tolist(), rows, strict=True):
            if row.any():
                digest.update(block.to_bytes(8, "big") + row.tobytes())
    return digest.hexdigest()


def whole(image: Image, point: Point) -> None:
    """Read blocks that are not allocated too: what is there must agree."""
    reader = PointReader(image, point)
    blocks = np.unique(np.linspace(0, point.blocks - 1, 64).astype(np.int64)) if point.blocks else []
    for block in blocks:
        reader.read(np.array([block]), np.empty((1, BLOCK_SIZE), np.uint8))


def attempt(work: Callable[[], object]) -> list[object]:
    """["ok", result], or the error: its exit code, class and sentence."""
    try:
        return ["ok", work()]
    except IslandError as error:
        return [error.exit_code, type(error).__name__, str(error)]


def examine(path: str) -> dict[str, list[object]]:
    outcome: dict[str, list[object]] = {}

    def opened() -> int:
        with Image.open(path) as image:
            active = image.active_point()
            outcome["volume"] = attempt(lambda: content(image, active))
            outcome["blocks"] = attempt(lambda: whole(image, active))
            outcome["extents"] = attempt(lambda: sum(len(w.start) for w in iter_extents(image, active)))
            outcome["bitmaps"] = attempt(lambda: len(read_bitmaps(image).listed))
            for number, snapshot in enumerate(image.snapshots[:POINTS]):

                def aspects(snapshot: InternalSnapshot = snapshot) -> str:
                    old = image.point_at(snapshot)
                    find_changed(image, old, active)
                    count_shared_copied(image, active, old)
                    for _ in iter_extents(image, active, old):
                        pass
                    return content(image, old)

                outcome[f"snapshot {number}"] = attempt(aspects)
            return image.header.size

    outcome["open"] = attempt(opened)
    return outcome


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    for line in sys.stdin:
        path = line.strip()
        began = time.process_time()
        try:
            outcome: dict[str, list[object]] = examine(path)
        except Exception as error:  # noqa: BLE001 - what escapes the tree of errors is the finding
            outcome = {"escaped": [type(error).__name__, str(error)]}
        resident = _peak_resident()
        took = time.process_time() - began
        print(
            json.dumps({"name": Path(path).name, "took": took, "resident": resident, "outcome": outcome}),
            flush=True,
        )


if __name__ == "__main__":
    main()
