"""The progress of long operations: bars on a terminal, JSON lines for programs."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from typing import TYPE_CHECKING, Self

from island_fast.cli.text import duration, size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Bars", "Lines", "pace"]

_REDRAW = 0.1  # seconds between two changes of a bar
_LINE_EVERY = 1.0  # seconds between two lines of progress
_PHASES = {
    "scan": "Scanning",
    "send": "Sending",
    "commit": "Finishing",
    "zero": "Zeroing",
    "restore": "Restoring",
    "sweep": "Sweeping",
    "copy": "Copying",
    "look": "Listing objects",
    "verify": "Verifying",
    "compare": "Comparing",
    "mend": "Repairing",
    "retain": "Deleting",
    "usage": "Reading manifests",
}
_NARROW, _WIDE = 10, 30  # columns of a bar
_PERCENT = 4  # columns of 100%


def pace(done: int, total: int, elapsed: float, width: int | None = None) -> str:
    """Return how far work is: bytes done and in all, the rate since it began, and the time left at that rate.

    If that is wider than `width`, the rate is left out, then the bytes, then the time.
    """
    bytes_done = f"{size(done)} of {size(total)}"
    if elapsed <= 0 or done <= 0:
        parts = [bytes_done]
        shorter: list[list[str]] = [[]]
    else:
        rate = done / elapsed
        left = max(0, round((total - done) / rate))
        time_left = f"{duration(left) if left >= 60 else f'{left} s'} left"
        parts = [bytes_done, f"{size(int(rate))}/s", time_left]
        shorter = [[bytes_done, time_left], [time_left], []]
    for texts in (parts, *shorter):
        if width is None or len(", ".join(texts)) <= width:
            return ", ".join(texts)
    return ""


class Bars:
    """Progress on standard error, one bar at a time: a context manager, and a `Progress` to call.

    Shows nothing unless `wanted` and standard error is a terminal; rich is imported only when a bar is shown.
    No bar is left behind at exit. Can be called from several threads.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted and sys.stderr is not None and sys.stderr.isatty()
        self._lock = threading.Lock()
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._phase = ""
        self._began = self._drawn = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._wanted = False
            if self._bars is not None:
                with contextlib.suppress(OSError):  # the terminal is gone
                    self._bars.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of `phase` are done."""
        if not self._wanted:
            return
        with self._lock:
            now = time.monotonic()
            if not self._wanted:  # it exited meanwhile
                return
            if phase != self._phase:
                self._start(phase, now)
            elif now - self._drawn < _REDRAW and done < total:
                return
            self._drawn = now
            if self._bars is not None and self._task is not None:
                text = pace(done, total, now - self._began, self._room()) if total else ""
                self._bars.update(self._task, completed=done, total=total or None, pace=text, refresh=True)

    def _start(self, phase: str, now: float) -> None:
        """Replace the bar by one for `phase`."""
        if self._bars is None:
            self._bars = _rich_progress()
            self._bars.start()
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(_phase_name(phase), total=None, pace="")
        self._phase, self._began = phase, now

    def _room(self) -> int:
        """Return the columns that are left beside the phase, the bar and the percentage."""
        assert self._bars is not None
        columns = self._bars.console.width
        return columns - len(_phase_name(self._phase)) - _bar_width(columns) - _PERCENT - 3  # and spaces


class Lines:
    """Progress as lines of JSON on standard error, for programs: a context manager, and a `Progress` to call.

    A line such as {"phase": "send", "done": 1048576, "total": 4194304}, in bytes: when a phase begins, once
    a second, and when it is done. Can be called from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase = ""
        self._written = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Report that `done` of `total` bytes of `phase` are done."""
        with self._lock:
            now = time.monotonic()
            if phase == self._phase and done < total and now - self._written < _LINE_EVERY:
                return
            self._phase, self._written = phase, now
            line = json.dumps({"phase": phase, "done": done, "total": total})
            if sys.stderr is not None:
                with contextlib.suppress(OSError, ValueError):
                    sys.stderr.write(line + "\n")
                    sys.stderr.flush()


def _phase_name(phase: str) -> str:
    return _PHASES.get(phase, phase)


def _bar_width(columns: int) -> int:
    """Return how wide the bar is on a terminal with this many columns."""
    return max(_NARROW, min(_WIDE, columns - 60))


def _rich_progress() -> Progress:
    """Return a rich display on standard error that removes itself when it is stopped."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=_bar_width(console.width)),
        TaskProgressColumn(),
        TextColumn("{task.fields[pace]}"),
        console=console,
        auto_refresh=False,  # every change is drawn, and `_REDRAW` bounds how often
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
