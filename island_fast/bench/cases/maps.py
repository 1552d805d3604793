"""Where the data of a large volume lies, and what differs between two points of it: from tables alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from island_fast.bench import timing
from island_fast.bench.case import GIB, Context, Scale, Work
from island_fast.bench.island_command import environment
from island_fast.bench.report import Counter, Row
from island_fast.bench.synthetic_image import MappedImage
from island_fast.bench.timing import Measured, pairs, row, timed
from island_fast.errors import DamagedError
from island_fast.images.inspect import map_image
from island_fast.qcow2.changes import find_allocated, find_changed
from island_fast.qcow2.image import Image

__all__ = ["WORKS"]

_PAIRS, _QUICK_PAIRS = 11, 3
_AGAINST = "qemu-img map"
_TWICE = "qemu-img map, twice"


def _maps(context: Context) -> Iterator[Row | Counter]:
    volume, data, runs = (1024, 50, 50_000) if not context.quick else (64, 3, 3000)
    size = f"{volume} GiB, {data} GiB in {runs} runs"
    context.tell("making an image of tables")
    image = MappedImage.make(context.scratch / "image", volume * GIB, data * GIB, runs, context.seed)
    few = MappedImage.make(context.scratch / "few", volume * GIB, data * GIB, runs, context.seed, 0.01)
    _check(image.path)
    count = _QUICK_PAIRS if context.quick else _PAIRS

    def reach(ratio: float) -> float | None:
        return None if context.quick else ratio

    def theirs(times: int) -> Callable[[], float]:
        return lambda: sum(_qemu(image.path).wall for _ in range(times))

    def compare(*words: str) -> Callable[[], float]:
        return lambda: _island(image.path, *words).wall

    context.tell("map")
    yield row(f"map of {size}", _AGAINST, pairs(count, compare(), theirs(1)), reach=reach(12))
    context.tell("map, in process")
    found = pairs(count, lambda: timed(lambda: _walked(image.path)), theirs(1))
    yield row(f"map of {size}, in process", _AGAINST, found, reach=reach(40))
    context.tell("diff")
    found = pairs(count, compare("--snapshot", "b", "--since", "a"), theirs(2))
    yield row(f"diff of it, 1 % changed in {image.tables_moved} tables", _TWICE, found, reach=reach(28))
    yield from _diff_of_few(few, count, reach(20))


def _diff_of_few(few: MappedImage, count: int, reach: float | None) -> Iterator[Row | Counter]:
    """What changed where 1 % of the tables differ, against a scan of all."""
    with Image.open(few.path) as image:
        old, new = (image.point_at(image.find_named(name)) for name in "ab")
        found = pairs(
            2 * count,
            lambda: timed(lambda: find_changed(image, old, new)),
            lambda: timed(lambda: find_allocated(image, new)),
        )
        work = f"diff where {few.tables_moved} of {few.volume // (512 << 20)} L2 tables differ, in process"
        yield row(work, "a scan of one point", found, reach=reach)
        entries = find_changed(image, old, new).tables_read * image.header.table_entries
        whole = int(np.count_nonzero(image.read_l1(new))) * image.header.table_entries
        yield Counter("L2 entries read for it, of those of a scan", entries / whole, reach=1 / 20)


def _qemu(path: Path) -> Measured:
    return timing.run(["qemu-img", "map", "-f", "qcow2", "--output=json", path])


def _island(path: Path, *words: str) -> Measured:
    command = [sys.executable, "-m", "island_fast", "map", "--json", str(path), *words]
    return timing.run(command, env=environment())


def _walked(path: Path) -> int:
    return sum(len(part.start) for part in map_image(path))


def _check(path: Path) -> None:
    """Both find the same data, to the byte."""
    ours, theirs = json.loads(_island(path).output), json.loads(_qemu(path).output)
    found = [(row["start"], row["length"]) for row in ours if row["kind"] == "data"]
    if _joined(found) != _joined([(row["start"], row["length"]) for row in theirs if row["data"]]):
        raise DamagedError("the map differs from that of qemu-img; report this fault")


def _joined(extents: list[tuple[int, int]]) -> list[list[int]]:
    """Extents with those joined that touch: qemu-img splits what is not together in the file."""
    found: list[list[int]] = []
    for start, length in extents:
        if found and found[-1][1] == start:
            found[-1][1] = start + length
        else:
            found.append([start, start + length])
    return found


def _space(scale: Scale) -> int:
    return GIB


WORKS = (Work("map and diff of tables", _maps, ("qemu-img",), _space),)
