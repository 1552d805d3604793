"""Map and diff: where a large volume has data, and what differs between two snapshots, from tables alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from island_fast.bench import timing
from island_fast.bench.case import GIB, Case, Context
from island_fast.bench.island_command import make_child_environment
from island_fast.bench.report import Counter, Row
from island_fast.bench.synthetic_image import SyntheticImage
from island_fast.bench.timing import Measurement, make_row, run_pairs, time_call
from island_fast.errors import DamagedError
from island_fast.images.inspect import map_image
from island_fast.qcow2.changes import find_allocated, find_changed
from island_fast.qcow2.image import Image

__all__ = ["CASES"]

_PAIRS, _QUICK_PAIRS = 11, 3
_AGAINST = "qemu-img map"
_TWICE = "qemu-img map, twice"


def _measure_maps(context: Context) -> Iterator[Row | Counter]:
    volume, data, runs = (1024, 50, 50_000) if not context.quick else (64, 3, 3000)
    size = f"{volume} GiB, {data} GiB in {runs} runs"
    context.show_progress("making an image of tables")
    image = SyntheticImage.make(context.scratch / "image", volume * GIB, data * GIB, runs, context.seed)
    few = SyntheticImage.make(context.scratch / "few", volume * GIB, data * GIB, runs, context.seed, 0.01)
    _compare_maps(image.path)
    count = _QUICK_PAIRS if context.quick else _PAIRS

    def theirs(times: int) -> Callable[[], float]:
        return lambda: sum(_run_qemu_img_map(image.path).wall for _ in range(times))

    def run_island(*words: str) -> Callable[[], float]:
        return lambda: _run_island_map(image.path, *words).wall

    def map_in_process() -> float:
        return time_call(lambda: sum(len(part.start) for part in map_image(image.path)))

    context.show_progress("map")
    yield make_row(
        f"map of {size}",
        _AGAINST,
        run_pairs(count, run_island(), theirs(1)),
        reach=context.target_unless_quick(12),
    )
    context.show_progress("map, in process")
    found = run_pairs(count, map_in_process, theirs(1))
    yield make_row(f"map of {size}, in process", _AGAINST, found, reach=context.target_unless_quick(40))
    context.show_progress("diff")
    found = run_pairs(count, run_island("--snapshot", "b", "--since", "a"), theirs(2))
    yield make_row(
        f"diff of it, 1 % changed in {image.tables_moved} tables",
        _TWICE,
        found,
        reach=context.target_unless_quick(28),
    )
    yield from _measure_diff_of_few(few, count, context.target_unless_quick(20))


def _measure_diff_of_few(few: SyntheticImage, count: int, reach: float | None) -> Iterator[Row | Counter]:
    """Measure a diff where 1 % of the tables differ, against a scan of all tables."""
    with Image.open(few.path) as image:
        old, new = (image.point_at(image.find_named(name)) for name in "ab")
        found = run_pairs(
            2 * count,
            lambda: time_call(lambda: find_changed(image, old, new)),
            lambda: time_call(lambda: find_allocated(image, new)),
        )
        work = f"diff where {few.tables_moved} of {few.volume // (512 << 20)} L2 tables differ, in process"
        yield make_row(work, "a scan of one point", found, reach=reach)
        entries = find_changed(image, old, new).tables_read * image.header.table_entries
        whole = int(np.count_nonzero(image.read_l1(new))) * image.header.table_entries
        yield Counter("L2 entries read for it, of those of a scan", entries / whole, reach=1 / 20)


def _run_qemu_img_map(path: Path) -> Measurement:
    return timing.run(["qemu-img", "map", "-f", "qcow2", "--output=json", path])


def _run_island_map(path: Path, *words: str) -> Measurement:
    command = [sys.executable, "-m", "island_fast", "map", "--json", str(path), *words]
    return timing.run(command, env=make_child_environment())


def _compare_maps(path: Path) -> None:
    """Raise DamagedError unless island and qemu-img find the same data, to the byte."""
    ours, theirs = json.loads(_run_island_map(path).output), json.loads(_run_qemu_img_map(path).output)
    found = [(row["start"], row["length"]) for row in ours if row["kind"] == "data"]
    if _join(found) != _join([(row["start"], row["length"]) for row in theirs if row["data"]]):
        raise DamagedError("the map differs from the map of qemu-img; report this fault")


def _join(extents: list[tuple[int, int]]) -> list[list[int]]:
    """Join adjacent extents: qemu-img splits them where they are not adjacent in the file."""
    found: list[list[int]] = []
    for start, length in extents:
        if found and found[-1][1] == start:
            found[-1][1] = start + length
        else:
            found.append([start, start + length])
    return found


CASES = (Case("map and diff of tables", _measure_maps, ("qemu-img",), lambda scale: GIB),)
