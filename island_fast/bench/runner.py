"""Run the cases one after the other, and describe the machine and the versions."""

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
from island_fast.bench.case import FULL_SCALE, GIB, QUICK_SCALE, Case, Context, Scale
from island_fast.bench.peers.all_peers import PEERS, Found
from island_fast.bench.report import Counter, LeftOut, Report, Row
from island_fast.errors import IslandError, UsageError

__all__ = ["Plan", "measure", "select_cases"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. `peers` are names; `scale` overrides the one that `quick` gives."""

    peers: Sequence[str]
    cases: Sequence[Case]
    quick: bool = False
    swift: bool = False
    seed: int = 1
    scale: Scale | None = None


def select_cases(cases: Sequence[Case], text: str) -> list[Case]:
    """Return the cases with `text` in their names. Raises UsageError if there are none."""
    found = [case for case in cases if text.lower() in case.name.lower()]
    if not found:
        names = "; ".join(case.name for case in cases)
        raise UsageError(f"no case has {text!r} in its name; the cases are: {names}")
    return found


def measure(plan: Plan, show_progress: Callable[[str], None]) -> Report:
    """Run the cases of a plan in their order. If one fails, the others still run."""
    started = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    load = os.getloadavg()[0]
    left_out: list[LeftOut] = []
    peers: dict[str, Found] = {}
    for name in plan.peers:
        if found := PEERS[name].find():
            peers[name] = found
        else:
            left_out.append(LeftOut(name, f"it is not installed; run: {PEERS[name].install}"))
    scale = plan.scale or (QUICK_SCALE if plan.quick else FULL_SCALE)
    rows: list[Row] = []
    counters: list[Counter] = []
    if not plan.quick:
        show_progress("touching the free memory")
        _touch_free_memory()
    for case in plan.cases:
        reason = _reason_to_leave_out(case, plan, scale, peers)
        if reason:
            left_out.append(LeftOut(case.name, reason))
            continue
        show_progress(case.name)
        for result in _run_case(case, plan, scale, peers, show_progress):
            if isinstance(result, Row):
                rows.append(result)
            elif isinstance(result, Counter):
                counters.append(result)
            else:
                left_out.append(result)
    return Report(
        started,
        {**_describe_machine(), "load": f"{load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end"},
        {
            "island": f"{__version__}, digests by {HASH_KERNEL}",
            "python": platform.python_version(),
            "numpy": np.__version__,
            **{name: one.version for name, one in peers.items()},
        },
        _describe_parameters(plan, scale),
        tuple(_group_by_work(rows)),
        tuple(counters),
        tuple(left_out),
    )


def _touch_free_memory() -> None:
    """Allocate nine tenths of the free memory, and free it again.

    A virtual machine gets memory from its host when it first touches it, which takes longer than the copying
    that is measured here; the first case would pay for it.
    """
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    length = int(lines["MemFree"].split()[0]) * 1024 // 10 * 9
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, length, flags=flags).close()


def _run_case(
    case: Case, plan: Plan, scale: Scale, peers: Mapping[str, Found], show_progress: Callable[[str], None]
) -> Iterator[Row | Counter | LeftOut]:
    """Run one case in a new folder. If it fails, the results that it has yielded so far are kept."""
    with tempfile.TemporaryDirectory(prefix="island-bench-", ignore_cleanup_errors=True) as scratch:
        try:
            yield from case.run(Context(Path(scratch), scale, plan.quick, plan.seed, peers, show_progress))
        except (IslandError, OSError) as error:
            yield LeftOut(case.name, str(error), failed=True)


def _group_by_work(rows: Sequence[Row]) -> list[Row]:
    """Move the rows of the same work next to the first of them."""
    names = [row.work for row in rows]
    return sorted(rows, key=lambda row: names.index(row.work))


def _reason_to_leave_out(case: Case, plan: Plan, scale: Scale, peers: Mapping[str, Found]) -> str:
    """Return why a case cannot run; "" if it can."""
    missing = [name for name in case.needs if name not in peers]
    if missing:
        return f"it needs {' and '.join(missing)}"
    if case.swift and not plan.swift:
        return "it needs --swift"
    free, space = shutil.disk_usage(tempfile.gettempdir()).free, case.space(scale)
    if free < space:
        needed = f"{space / GIB:.0f} GiB in {tempfile.gettempdir()}, which has {free / GIB:.0f} GiB free"
        return f"it needs {needed}; set TMPDIR to a folder with more space"
    return ""


def _describe_parameters(plan: Plan, scale: Scale) -> dict[str, object]:
    sizes = {"small": scale.small, "large": scale.large}
    used = {
        name: {"volume": size.volume, "allocated": size.allocated, "pairs": size.pairs}
        for name, size in sizes.items()
        if size
    }
    return {"quick": plan.quick, "swift": plan.swift, "seed": plan.seed, **used}


def _describe_machine() -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _find_processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / GIB:.0f} GiB",
        "kernel": platform.release(),
        "file system": _find_file_system(Path(tempfile.gettempdir())),
    }


def _find_processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _find_file_system(path: Path) -> str:
    """Return the type of the file system that holds a folder."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, one = line.split()[:3]
        if path.resolve().is_relative_to(place) and len(place) >= len(best):
            best, kind = place, one
    return kind
