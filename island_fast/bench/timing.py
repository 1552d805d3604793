"""How times are taken: whole processes and calls, in alternating pairs; and what is said of them.

All medians come with an interval that needs no assumption about how times are spread: between which two of
the sorted values the median of all possible runs lies (the sign test turned round).
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from island_fast.bench.report import Row, Spread
from island_fast.errors import IslandError, NotFoundError

__all__ = ["Measured", "costs", "pairs", "row", "run", "spread", "status", "timed", "until_on_disk", "warm"]

_LAUNCHER = Path(__file__).with_name("launcher.py")
_SURE = 0.95
_MAX_SAID = 500

Ours = TypeVar("Ours")
Theirs = TypeVar("Theirs")


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of a whole process.

    Seconds from before its start until it is gone; `processor` seconds of it and all processes that it
    waited for; `memory`, in bytes, is the most that one of them held. `output` is what it wrote on
    standard output.
    """

    wall: float
    processor: float
    memory: int
    output: bytes


def run(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Measured:
    """Run a program to its end and say what it cost.

    `env` is added to the environment. Raises NotFoundError if there is no such program, IslandError with its
    last words if it fails. If this process is interrupted, the program and all that it started are killed.
    """
    words = [str(word) for word in command]
    ours, theirs = os.pipe()
    with (
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as said,
        os.fdopen(ours, "rb") as answer,
    ):
        try:
            launcher = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_LAUNCHER), str(theirs), *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=said,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                pass_fds=[theirs],
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        with _killed_if_interrupted(launcher):
            told = answer.read().split()
            launcher.wait()
        output.seek(0)
        said.seek(0)
        return _measured(words, told, output.read(), said.read())


@contextlib.contextmanager
def _killed_if_interrupted(launcher: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill the launcher and what it started if the body is left by an exception."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
        raise


def _measured(words: Sequence[str], told: Sequence[bytes], output: bytes, said: bytes) -> Measured:
    """Read what the launcher told."""
    if not told and b"FileNotFoundError" in said:
        raise NotFoundError(f"{words[0]} is not installed; install it, or leave it out with --peers")
    if not told or int(told[0]):
        last = (said or output).decode(errors="replace").strip()[-_MAX_SAID:]
        raise IslandError(f"{' '.join(words)!r} failed, and the measurement with it; it said: {last}")
    return Measured(float(told[1]), float(told[2]), int(told[3]), output)


def status(command: Sequence[str]) -> int:
    """Run a program to its end, unmeasured, and return its exit status."""
    return subprocess.run(command, capture_output=True, check=False).returncode


def timed(work: Callable[[], object]) -> float:
    """Seconds that one call takes in this process."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def until_on_disk(path: Path) -> None:
    """Wait until a file, or every file below a folder, is on disk, so that nobody pays for it later."""
    for file in [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def warm(path: Path) -> None:
    """Read a file into the page cache."""
    with open(path, "rb", buffering=0) as opened:
        buffer = bytearray(1 << 20)
        while opened.readinto(buffer):
            pass


def pairs(
    count: int,
    ours: Callable[[], Ours],
    theirs: Callable[[], Theirs],
    before: Callable[[], object] = lambda: None,
) -> list[tuple[Ours, Theirs]]:
    """Run both on the same state, `count` times, ours first, theirs first, and so on in turn.

    `before` is called before each pair and makes its state. One pair more is run first and not counted: it
    warms caches.
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


def costs(found: Sequence[tuple[Measured, Measured]]) -> str:
    """Say what both used beside time, by their medians."""
    told = []
    for name, of in (("ours", [our for our, _ in found]), ("theirs", [their for _, their in found])):
        processor = statistics.median(one.processor for one in of)
        memory = max(one.memory for one in of) / 2**20
        told.append(f"{name} {processor:.2f} s and {memory:.0f} MiB")
    return f"processor and memory: {', '.join(told)}"


def spread(values: Sequence[float]) -> Spread:
    """Median, quartiles, and what holds the true median with 95 %, or as surely as so few can say."""
    ordered = sorted(values)
    if len(ordered) == 1:
        quartiles = [ordered[0]] * 3
    else:
        quartiles = statistics.quantiles(ordered, n=4, method="inclusive")
    at = _rank(len(ordered))
    return Spread(
        statistics.median(ordered),
        quartiles[0],
        quartiles[2],
        ordered[at],
        ordered[-1 - at],
        tuple(float(value) for value in values),
    )


def _rank(count: int) -> int:
    """How many values may be left out at either end for an interval of 95 %; 0 if none may."""
    outside, rank = 0.0, -1
    while rank + 1 < count - 1 - rank:
        outside += 2 * math.comb(count, rank + 1) / 2**count
        if outside > 1 - _SURE:
            break
        rank += 1
    return max(rank, 0)


def row(
    work: str,
    against: str,
    measured: Sequence[tuple[float, float]],
    *,
    reach: float | None = None,
    better: str = "higher",
    unit: str = "s",
    notes: Sequence[str] = (),
) -> Row:
    """Make a row of pairs (ours, theirs).

    The ratio of a time that should be short is theirs / ours ("times faster") if `better` is "higher", and
    ours / theirs ("times its time") if it is "lower"; of a rate (a `unit` per second) it is ours / theirs.
    Each ratio is of one pair.
    """
    upside_down = better == "higher" and not unit.endswith("/s")
    ratios = [theirs / ours if upside_down else ours / theirs for ours, theirs in measured]
    return Row(
        work=work,
        against=against,
        unit=unit,
        ours=spread([ours for ours, _ in measured]),
        theirs=spread([theirs for _, theirs in measured]),
        ratio=spread(ratios),
        ratio_is="theirs / ours" if upside_down else "ours / theirs",
        reach=reach,
        better=better,
        notes=tuple(notes),
    )
