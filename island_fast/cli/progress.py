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
    "commit": "Committing",
    "zero": "Zeroing",
    "restore": "Restoring",
    "sweep": "Sweeping",
    "copy": "Copying",
    "look": "Looking",
    "verify": "Verifying",
    "compare": "Comparing",
    "mend": "Mending",
    "retain": "Deleting",
    "usage": "Reading manifests",
}


def pace(done: int, total: int, elapsed: float) -> str:
    """How far work is: bytes done and in all, the rate since it began, and the time left at that rate."""
    far = f"{size(done)} of {size(total)}"
    if elapsed <= 0 or done <= 0:
        return far
    rate = done / elapsed
    left = max(0, round((total - done) / rate))
    return f"{far}, {size(int(rate))}/s, {duration(left) if left >= 60 else f'{left} s'} left"


class Bars:
    """Progress on standard error, one bar at a time; a context manager, and called as a `Progress`.

    Shows nothing unless `wanted` and standard error is a terminal; rich is imported only when a bar is
    shown. Bars are gone when it is left, whichever way. May be called from several threads.
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
                with contextlib.suppress(OSError):  # the terminal went away
                    self._bars.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of `phase` are done."""
        if not self._wanted:
            return
        with self._lock:
            now = time.monotonic()
            if not self._wanted:  # left meanwhile
                return
            if phase != self._phase:
                self._start(phase, now)
            elif now - self._drawn < _REDRAW and done < total:
                return
            self._drawn = now
            if self._bars is not None and self._task is not None:
                text = pace(done, total, now - self._began) if total else ""
                self._bars.update(self._task, completed=done, total=total or None, pace=text, refresh=True)

    def _start(self, phase: str, now: float) -> None:
        """Put a bar for `phase` in the place of the one before."""
        if self._bars is None:
            self._bars = _rich_progress()
            self._bars.start()
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(_PHASES.get(phase, phase), total=None, pace="")
        self._phase, self._began = phase, now


class Lines:
    """Progress as lines of JSON on standard error, for programs; a context manager, and a `Progress`.

    A line such as {"phase": "send", "done": 1048576, "total": 4194304}, in bytes: when a phase begins, once
    a second, and when it is done. May be called from several threads.
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
        """Tell that `done` of `total` bytes of `phase` are done."""
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


def _rich_progress() -> Progress:
    """A rich display on standard error that removes itself when it is stopped."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[pace]}"),
        console=Console(stderr=True),
        auto_refresh=False,  # every change is drawn, and `_REDRAW` bounds how often one is
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
