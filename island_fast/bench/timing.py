"""Measure whole processes and calls in alternating pairs, and summarize the values.

Every median comes with a confidence interval that assumes nothing about how the values are distributed: it
reaches from one of the sorted values to another, so that the true median is in between (inverted sign test).
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from island_fast.bench.report import Row, Spread
from island_fast.errors import IslandError, NotFoundError

__all__ = [
    "Measurement",
    "describe_costs",
    "flush_to_disk",
    "make_row",
    "run",
    "run_for_status",
    "run_pairs",
    "summarize",
    "time_call",
    "warm_page_cache",
]

_LAUNCHER = Path(__file__).with_name("launcher.py")
_SURE = 0.95
_MAX_OUTPUT = 500

Ours = TypeVar("Ours")
Theirs = TypeVar("Theirs")


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one run of a whole process cost.

    `wall` is the seconds from before its start until it has ended; `processor` the processor seconds of it
    and of all processes that it waited for; `memory` the peak, in bytes, of the largest of them. `output` is
    what it wrote to standard output.
    """

    wall: float
    processor: float
    memory: int
    output: bytes


def run(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Measurement:
    """Run a program to its end and return what it cost.

    `env` is added to the environment. Raises NotFoundError if the program is not installed, IslandError with
    the end of its output if it fails. If this process is interrupted, it kills the program and everything
    that the program started.
    """
    words = [str(word) for word in command]
    ours, theirs = os.pipe()
    with (
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
        os.fdopen(ours, "rb") as answer,
    ):
        try:
            launcher = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_LAUNCHER), str(theirs), *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                pass_fds=[theirs],
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        try:
            costs = answer.read().split()
            launcher.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
            raise
        output.seek(0)
        errors.seek(0)
        return _read_measurement(words, costs, output.read(), errors.read())


def _read_measurement(
    words: Sequence[str], costs: Sequence[bytes], output: bytes, errors: bytes
) -> Measurement:
    """Return what the launcher reported. Raises NotFoundError or IslandError if the program failed."""
    if not costs and b"FileNotFoundError" in errors:
        raise NotFoundError(f"{words[0]} is not installed; install it, or leave it out with --peers")
    if not costs or int(costs[0]):
        last = (errors or output).decode(errors="replace").strip()[-_MAX_OUTPUT:]
        raise IslandError(f"{' '.join(words)!r} failed, so there is no measurement; its last output: {last}")
    return Measurement(float(costs[1]), float(costs[2]), int(costs[3]), output)


def run_for_status(command: Sequence[str]) -> int:
    """Run a program to its end without measuring it, and return its exit status."""
    return subprocess.run(command, capture_output=True, check=False).returncode


def time_call(work: Callable[[], object]) -> float:
    """Call `work` in this process, and return the seconds that it took."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def flush_to_disk(path: Path) -> None:
    """Flush a file, or every file below a folder, so that no later flush has to wait for it."""
    for file in [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def warm_page_cache(path: Path) -> None:
    """Read a file into the page cache."""
    with open(path, "rb", buffering=0) as opened:
        buffer = bytearray(1 << 20)
        while opened.readinto(buffer):
            pass


def run_pairs(
    count: int,
    ours: Callable[[], Ours],
    theirs: Callable[[], Theirs],
    before: Callable[[], object] = lambda: None,
) -> list[tuple[Ours, Theirs]]:
    """Run both on the same state, `count` times; ours runs first in one pair, theirs in the next.

    `before` is called before each pair and prepares its state. An extra pair runs at the beginning and is not
    counted; it warms the caches.
    """
    results = []
    for number in range(count + 1):
        before()
        if number % 2:
            our = ours()
            results.append((our, theirs()))
        else:
            their = theirs()
            results.append((ours(), their))
    return results[1:]


def describe_costs(found: Sequence[tuple[Measurement, Measurement]]) -> str:
    """Describe what both used besides time: the median of processor seconds, and the peak of memory."""
    parts = []
    for name, of in (("ours", [our for our, _ in found]), ("theirs", [their for _, their in found])):
        processor = statistics.median(one.processor for one in of)
        memory = max(one.memory for one in of) / 2**20
        parts.append(f"{name} {processor:.2f} s and {memory:.0f} MiB")
    return f"processor and memory: {', '.join(parts)}"


def summarize(values: Sequence[float]) -> Spread:
    """Return median, quartiles, and the 95 % interval of the median; a weaker one if there are few values."""
    ordered = sorted(values)
    if len(ordered) == 1:
        quartiles = [ordered[0]] * 3
    else:
        quartiles = statistics.quantiles(ordered, n=4, method="inclusive")
    at = _find_rank(len(ordered))
    return Spread(
        statistics.median(ordered),
        quartiles[0],
        quartiles[2],
        ordered[at],
        ordered[-1 - at],
        tuple(float(value) for value in values),
    )


def _find_rank(count: int) -> int:
    """Return how many of `count` values are outside the 95 % interval at either end; 0 for few values."""
    outside, rank = 0.0, -1
    while rank + 1 < count - 1 - rank:
        outside += 2 * math.comb(count, rank + 1) / 2**count
        if outside > 1 - _SURE:
            break
        rank += 1
    return max(rank, 0)


def make_row(
    work: str,
    against: str,
    measured: Sequence[tuple[float, float]],
    *,
    reach: float | None = None,
    better: str = "higher",
    unit: str = "s",
    notes: Sequence[str] = (),
) -> Row:
    """Make a row from pairs (ours, theirs), with a ratio for each pair.

    For times and sizes the ratio is theirs / ours ("times faster") if `better` is "higher", and ours / theirs
    ("times as long") if it is "lower". For rates (a `unit` per second) it is ours / theirs.
    """
    upside_down = better == "higher" and not unit.endswith("/s")
    ratios = [theirs / ours if upside_down else ours / theirs for ours, theirs in measured]
    return Row(
        work=work,
        against=against,
        unit=unit,
        ours=summarize([ours for ours, _ in measured]),
        theirs=summarize([theirs for _, theirs in measured]),
        ratio=summarize(ratios),
        ratio_is="theirs / ours" if upside_down else "ours / theirs",
        reach=reach,
        better=better,
        notes=tuple(notes),
    )
