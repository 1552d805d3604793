"""Postpone signals for the moment in which a program is started.

Python raises KeyboardInterrupt, or whatever a signal's handler raises, between any two instructions of the
main thread. If that is after a program was started and before the caller has noted it, the program is left
alone: with an image, and without the lock of whoever started it.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["hold_interrupts"]

_SIGNALS = (signal.SIGALRM, signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
"""Those that end a program in order; and SIGALRM, by which `cli/signals.py` tries again to do so."""


class _Held:
    """The handlers to put back, and the signals that came meanwhile. `depth` counts bodies being run.

    It is one for the whole process: with green threads, one body can begin inside another and end after it.
    """

    depth = 0
    before: dict[int, Any] = {}  # noqa: RUF012
    received: list[int] = []  # noqa: RUF012


def _note(number: int, _: FrameType | None) -> None:
    if number not in _Held.received:
        _Held.received.append(number)


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Have signals that come during the body handled at its end, when what it made is in its variables.

    Only for a short body: nothing can end it. What a handler raises then is raised by the `with` statement.
    In other threads than the main one nothing is done, because handlers do not run there. Signals that are
    ignored, or that end the process at once, stay so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if not _Held.depth:
        _note_signals()
    _Held.depth += 1
    try:
        yield
    finally:
        _Held.depth -= 1
        if not _Held.depth:
            _put_back()


def _note_signals() -> None:
    """Have all signals noted; if a handler raises meanwhile, put back those that were replaced.

    Signals are blocked, but one can come to another thread, and its handler runs in this one.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        for number in _SIGNALS:
            if callable(handler := signal.getsignal(number)):
                _Held.before[number] = handler
                signal.signal(number, _note)
    except BaseException:
        _put_back()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _put_back() -> None:
    """Put the handlers back, then call those for which a signal came; raise the first error of one."""
    errors: list[BaseException] = []
    handlers = dict(_Held.before)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    while _Held.before:
        try:
            number, handler = next(iter(_Held.before.items()))
            signal.signal(number, handler)
            del _Held.before[number]
        except BaseException as error:  # noqa: BLE001  # of a handler that is back already
            errors.append(error)
    received, _Held.received = _Held.received, []
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    except BaseException as error:  # noqa: BLE001  # the same
        errors.append(error)
    for number in received:
        try:
            handlers[number](number, sys._getframe())
        except BaseException as error:  # noqa: BLE001  # raised again below
            errors.append(error)
    if errors:
        raise errors[0]
