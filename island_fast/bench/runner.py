"""One run of the bench: which works are done, where, and what is said of machine and versions."""

from __future__ import annotations

import mmap
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from island_fast import __version__
from island_fast._diff import HASH_KERNEL
from island_fast.bench.case import GIB, QUICK, WHOLE, Context, Scale, Work
from island_fast.bench.peers.versions import PEERS
from island_fast.bench.report import Counter, LeftOut, Report, Row
from island_fast.errors import IslandError, UsageError

__all__ = ["Plan", "chosen", "measure"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for. `peers` and `works` are names; `scale` overrides the one that `quick` gives."""

    peers: Sequence[str]
    works: Sequence[Work]
    quick: bool = False
    swift: bool = False
    seed: int = 1
    scale: Scale | None = None


def chosen(works: Sequence[Work], text: str) -> list[Work]:
    """The works that have `text` in their names. Raises UsageError if there are none."""
    found = [work for work in works if text.lower() in work.name.lower()]
    if not found:
        names = "; ".join(work.name for work in works)
        raise UsageError(f"no work has {text!r} in its name; they are: {names}")
    return found


def measure(plan: Plan, tell: Callable[[str], None]) -> Report:
    """Do all works of a plan, one after the other; one that fails leaves the others to be measured."""
    started = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    load = os.getloadavg()[0]
    left_out: list[LeftOut] = []
    versions = dict(_peers(plan, left_out))
    scale = plan.scale or (QUICK if plan.quick else WHOLE)
    rows: list[Row] = []
    counters: list[Counter] = []
    if not plan.quick:
        tell("touching the memory that is free")
        _touch_free_memory()
    for work in plan.works:
        reason = _obstacle(work, plan, scale, versions)
        if reason:
            left_out.append(LeftOut(work.name, reason))
            continue
        tell(work.name)
        for found in _done(work, plan, scale, versions, tell):
            if isinstance(found, Row):
                rows.append(found)
            elif isinstance(found, Counter):
                counters.append(found)
            else:
                left_out.append(found)
    return Report(
        started,
        {**_machine(), "load": f"{load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end"},
        _versions() | versions,
        _parameters(plan, scale),
        tuple(_together(rows)),
        tuple(counters),
        tuple(left_out),
    )


def _touch_free_memory() -> None:
    """Use all but a tenth of the memory that is free, and give it back.

    The host of a virtual machine hands out memory when it is touched for the first time, which takes longer
    than the copying that is measured here, and would fall on whoever comes first.
    """
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    length = int(lines["MemFree"].split()[0]) * 1024 // 10 * 9
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, length, flags=flags).close()


def _done(
    work: Work, plan: Plan, scale: Scale, versions: Mapping[str, str], tell: Callable[[str], None]
) -> Iterator[Row | Counter | LeftOut]:
    """Do one work in a folder of its own. If it fails, what it has found until then stands."""
    with tempfile.TemporaryDirectory(prefix="island-bench-", ignore_cleanup_errors=True) as scratch:
        try:
            yield from work.run(Context(Path(scratch), scale, plan.quick, plan.seed, versions, tell))
        except (IslandError, OSError) as error:
            yield LeftOut(work.name, str(error), failed=True)


def _together(rows: Sequence[Row]) -> list[Row]:
    """The rows of one name side by side, where the first of them is."""
    names = [row.work for row in rows]
    return sorted(rows, key=lambda row: names.index(row.work))


def _peers(plan: Plan, left_out: list[LeftOut]) -> Iterator[tuple[str, str]]:
    """Versions of the peers that are there; those that are not are named in `left_out`."""
    for name in plan.peers:
        version = PEERS[name].version()
        if version:
            yield name, version
        else:
            left_out.append(LeftOut(name, f"it is not installed; {PEERS[name].install}"))


def _obstacle(work: Work, plan: Plan, scale: Scale, versions: Mapping[str, str]) -> str:
    """Why a work cannot be done; "" if it can."""
    missing = [name for name in work.needs if name not in versions]
    if missing:
        return f"it needs {' and '.join(missing)}"
    if work.swift and not plan.swift:
        return "it is measured with --swift"
    free, space = shutil.disk_usage(tempfile.gettempdir()).free, work.space(scale)
    if free < space:
        needed = f"{space / GIB:.0f} GiB in {tempfile.gettempdir()}, where {free / GIB:.0f} GiB are free"
        return f"it needs {needed}; set TMPDIR to a folder with more"
    return ""


def _parameters(plan: Plan, scale: Scale) -> dict[str, object]:
    sizes = {"small": scale.small, "large": scale.large}
    told = {
        name: {"volume": size.volume, "allocated": size.allocated, "pairs": size.pairs}
        for name, size in sizes.items()
        if size
    }
    return {"quick": plan.quick, "swift": plan.swift, "seed": plan.seed, **told}


def _machine() -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / GIB:.0f} GiB",
        "kernel": platform.release(),
        "file system": _file_system(Path(tempfile.gettempdir())),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(path: Path) -> str:
    """The kind of file system that holds a folder."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, one = line.split()[:3]
        if path.resolve().is_relative_to(place) and len(place) >= len(best):
            best, kind = place, one
    return kind


def _versions() -> dict[str, str]:
    return {
        "island": f"{__version__}, digests by {HASH_KERNEL}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
