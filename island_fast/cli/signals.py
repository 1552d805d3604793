"""SIGINT, SIGTERM and SIGHUP: they end the work in order, never between two steps that belong together."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

__all__ = ["Interrupted", "Signals"]

_HARD_EXIT = 3  # Ctrl-C this many times ends the process at once
_SOON = 0.01  # seconds
_LOCKING = frozenset(
    ["threading", "queue", "contextlib", "logging", "weakref", "_weakrefset"]
    + [f"concurrent.futures.{name}" for name in ("_base", "thread")]
)
_UNDIVIDED = frozenset(["subprocess", "importlib._bootstrap", "importlib._bootstrap_external"])


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end. A KeyboardInterrupt, so that nothing catches it on the way."""


class Signals:
    """Turns the first SIGINT, SIGTERM or SIGHUP into Interrupted in the main thread; a context manager.

    It is raised as soon as that is safe (see `_is_unsafe`), at the latest at the next report of progress.
    While it unwinds, later signals are ignored, except the third Ctrl-C, which ends the process: that is as
    safe as a power cut. A signal that was ignored from the start (nohup, a background job) stays ignored.
    `exit_code` is the one of a run that was interrupted, as shells have it: 128 and the signal's number.
    At exit the old handlers return; with `to_the_end` those signals are ignored until the process has ended.
    """

    def __init__(self, *, to_the_end: bool = False) -> None:
        self._over = False  # nothing must be raised any more
        self._raised = False  # in the main thread, where it can have been swallowed
        self._to_the_end = to_the_end
        self._received = self._keys = 0
        self.exit_code = 128 + signal.SIGINT
        self._before: dict[int, Any] = {}
        self._seen: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self.disarm()
        for number, handler in self._before.items():
            # Python removes its handlers as it ends, and one more signal would change the exit code.
            signal.signal(number, signal.SIG_IGN if self._to_the_end else handler)

    def disarm(self) -> None:
        """Raise nothing from now on."""
        self._over = True
        self._stop_trying()

    def _stop_trying(self) -> None:
        self._raised = True
        if signal.SIGALRM in self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def check(self) -> None:
        """Raise Interrupted, in any thread, if a signal came: here it certainly ends the work."""
        if self._received and not self._over:
            self._raised = True
            raise Interrupted

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._received:
            self.exit_code = 128 + number
        self._received += 1
        self._keys += number == signal.SIGINT
        if self._keys >= _HARD_EXIT:
            os._exit(self.exit_code)
        if not self._raised:
            self._try_to_raise(number, frame)
        elif self._keys == _HARD_EXIT - 1 and os.isatty(2):
            os.write(2, b"\nisland: cleaning up; press Ctrl-C once more to leave at once\n")

    def _try_to_raise(self, number: int, frame: FrameType | None) -> None:
        """Raise Interrupted in `frame`, where the main thread is, or try again soon."""
        if self._raised:
            return
        place = (id(frame), frame.f_lasti if frame else 0)
        waits = place == self._seen  # it was here the last time too, so it waits for something
        self._seen = place
        if _is_unsafe(frame, waits):
            if signal.SIGALRM not in self._before:
                self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._try_to_raise)
            signal.setitimer(signal.ITIMER_REAL, _SOON)
        else:
            self._stop_trying()
            raise Interrupted


def _is_unsafe(frame: FrameType | None, waits: bool) -> bool:
    """Return whether an exception raised at `frame` could leave a lock held or a process running.

    Locks written in Python can stay locked if an exception comes just as they are taken, and then other
    threads wait forever; it is safe while the thread waits for the lock. A process that was just started may
    not be in any variable yet, so that nobody would end it. An import that is interrupted swallows the
    exception.
    """
    if frame is not None and frame.f_globals.get("__name__") in _LOCKING and not waits:
        return True
    while frame is not None:
        if frame.f_globals.get("__name__") in _UNDIVIDED:
            return True
        frame = frame.f_back
    return False
