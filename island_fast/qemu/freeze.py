"""Running something while a guest's file systems are frozen by the agent inside it (QEMU's guest agent).

A guest that stays frozen is worse than a failed snapshot. So what was frozen is thawed whatever happens, and
freeze, work and thaw run in a thread of their own, because signals interrupt only the main thread. The
commands are in qemu's qga/qapi-schema.json. Freeze and thaw return the number of file systems; if the guest
ended the freeze by itself (as Windows does after seconds), the thaw returns 0.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from island_fast.errors import IslandError, NotFoundError, RefusedError

__all__ = ["CRASH", "FILESYSTEM", "FREEZES", "Clock", "FreezeResult", "Guest", "run_while_frozen"]

_LOG = logging.getLogger(__name__)

CRASH = "crash"
FILESYSTEM = "filesystem"
FREEZES = ("auto", "require", "never")
"""In this order: freeze if the guest's agent can; fail if it cannot; do not freeze."""

_STATUS = 5  # seconds for an agent to answer; otherwise there is none
_FREEZE = 60  # seconds for a guest to write what it has in memory
_THAW = 20  # seconds
_PATIENCE = 300  # seconds to retry a thaw: the agent can be busy with a freeze that timed out here
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0  # seconds between tries; each pause is twice the one before


class Guest(Protocol):
    """A running guest, with or without an agent; see `Domain`. `who` is what messages call it."""

    who: str

    @property
    def thaw_command(self) -> str:
        """Return a shell command that thaws the guest, for messages."""

    def ask_agent(self, command: str, timeout: int) -> object:
        """Send the agent a command and return its answer; IslandError if there is none in `timeout` seconds.

        RefusedError if the agent answers that it did not do it.
        """

    def reconnect(self) -> None:
        """Connect again; NotFoundError or RefusedError if the guest no longer runs."""


@dataclass(frozen=True, slots=True)
class FreezeResult:
    """The state of the volumes when the work ran: FILESYSTEM, or CRASH (as after a power cut), and why.

    `stuck` is a sentence about a guest that may still be frozen, "" if it is not.
    """

    consistency: str
    reason: str
    stuck: str = ""


@dataclass(frozen=True, slots=True)
class Clock:
    """A monotonic clock in seconds, and a way to wait; tests replace both."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def run_while_frozen(
    guest: Guest, freeze: str, work: Callable[[], None], clock: Clock | None = None
) -> FreezeResult:
    """Call `work` once while the guest is frozen, if `freeze`, one of FREEZES, says so.

    With "require" it is a RefusedError if the guest could not be frozen, or was not frozen all the time;
    `work` may have been called then. An exception of `work` is raised after the thaw. If the guest may still
    be frozen, this is also logged as a warning at once, because the caller can continue for long.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_run_while_frozen, guest, freeze, work, clock or Clock()).result()


def _run_while_frozen(guest: Guest, freeze: str, work: Callable[[], None], clock: Clock) -> FreezeResult:
    if freeze == "never":
        work()
        return FreezeResult(CRASH, "no freeze was requested")
    if why_not := _reason_not_freezable(guest):
        thawed = _ThawResult()
    else:
        done, frozen = False, True
        try:
            why_not, frozen = _try_freeze(guest)
            if not why_not:
                work()
                done = True
        finally:
            thawed = _thaw(guest, clock) if frozen else _ThawResult()
        if done:
            if thawed.early:
                _refuse_if_required(guest, freeze, thawed.early)
                return FreezeResult(CRASH, thawed.early, thawed.stuck)
            return FreezeResult(FILESYSTEM, "the guest's file systems were frozen")
    _refuse_if_required(guest, freeze, why_not)
    work()
    return FreezeResult(CRASH, why_not, thawed.stuck)


def _refuse_if_required(guest: Guest, freeze: str, why_not: str) -> None:
    if freeze == "require":
        raise RefusedError(
            f"{guest.who} was not frozen: {why_not}; correct that in the guest, or use --freeze auto"
        )


def _reason_not_freezable(guest: Guest) -> str:
    """Return why the guest cannot be frozen now; "" if it can. Who froze it already must also thaw it."""
    try:
        status = guest.ask_agent("guest-fsfreeze-status", _STATUS)
    except IslandError as error:
        return str(error)
    return "" if status == "thawed" else "another program froze it, and can thaw it at any time"


def _try_freeze(guest: Guest) -> tuple[str, bool]:
    """Freeze; return why that failed, "" if it did not, and whether file systems may be frozen now.

    An agent that refuses has undone its freeze, or another program froze the guest and will thaw it.
    """
    try:
        count = guest.ask_agent("guest-fsfreeze-freeze", _FREEZE)
    except RefusedError as error:
        return str(error), False
    except IslandError as error:
        return str(error), True
    return "" if _is_positive(count) else "its agent found no file system to freeze", True


@dataclass(frozen=True, slots=True)
class _ThawResult:
    """Why the guest may have been thawed too early; a sentence, if it may still be frozen; "" if not."""

    early: str = ""
    stuck: str = ""


def _thaw(guest: Guest, clock: Clock) -> _ThawResult:
    """Thaw the guest; retry for _PATIENCE seconds until the agent confirms it."""
    until = clock.now() + _PATIENCE
    pause = _FIRST_PAUSE
    while True:
        try:
            count = guest.ask_agent("guest-fsfreeze-thaw", _THAW)
            return _ThawResult(
                "" if _is_positive(count) else "it was thawed by something else, perhaps too early"
            )
        except IslandError as error:
            trouble = error
        if clock.now() + pause > until:
            break
        clock.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
        try:
            guest.reconnect()
        except (NotFoundError, RefusedError) as error:
            return _ThawResult(f"it ended while it was frozen: {error}")
        except IslandError:
            pass  # the next try shows whether it matters
    stuck = f"{guest.who} may still be frozen ({trouble}); run '{guest.thaw_command}', or restart its agent"
    _LOG.warning("%s", stuck)
    return _ThawResult(f"it is unknown whether it was frozen all the time: {trouble}", stuck)


def _is_positive(count: object) -> bool:
    return isinstance(count, int) and count > 0
