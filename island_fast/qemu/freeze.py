"""Doing something while a guest's file systems are frozen, by the agent inside it (QEMU's guest agent).

A guest that stays frozen is worse than any snapshot that fails. So what is frozen is thawed whatever happens;
and freezing, work and thawing are done in a thread, which no signal interrupts, unlike the main one.
The commands are in qemu's qga/qapi-schema.json: each of the two counts file systems, and a freeze that
the guest ended by itself (as Windows does after seconds) shows in a thaw that finds none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from island_fast.errors import IslandError, NotFoundError, RefusedError

__all__ = ["CRASH", "FILESYSTEM", "FREEZES", "Clock", "Guest", "Moment", "at_one_moment"]

_LOG = logging.getLogger(__name__)

CRASH = "crash"
FILESYSTEM = "filesystem"
FREEZES = ("auto", "require", "never")
"""Freeze if the guest's agent answers; do nothing without; do not ask it."""

_LOOK = 5  # seconds for an agent to answer, without which there is none
_FREEZE = 60  # seconds in which a guest has written what it holds in memory
_THAW = 20  # seconds
_PATIENCE = 300  # seconds in which a thaw is tried again: an agent may be busy with a freeze given up here
_SOONEST, _LATEST = 0.5, 5.0  # seconds between two tries, which double


class Guest(Protocol):
    """A guest with or without an agent; see `Domain`."""

    who: str

    @property
    def thaw_by_hand(self) -> str:
        """The command that thaws it, for people."""

    def agent(self, command: str, timeout: int) -> object:
        """Give the agent a command; IslandError if no answer comes within `timeout` seconds.

        RefusedError if the agent answers that it did not do it.
        """

    def renew(self) -> None:
        """Connect again; NotFoundError or RefusedError if the guest does not run any more."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What holds for the volumes at that moment: as after a freeze, or as after a power cut, and why.

    `stuck` is a sentence about a guest that may be frozen even now, "" where it is not.
    """

    consistency: str
    reason: str
    stuck: str = ""


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds that pass, and waiting for some."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def at_one_moment(guest: Guest, freeze: str, work: Callable[[], None], clock: Clock | None = None) -> Moment:
    """Do `work` while the guest is frozen, as far as `freeze`, one of FREEZES, says.

    With "require" it is a RefusedError if the guest could not be frozen, or was not for all of the time;
    `work` may have been done then. What `work` raises comes out, after the thaw. That a guest may still be
    frozen is logged as a warning, too, since work may go on for long.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_at_one_moment, guest, freeze, work, clock or Clock()).result()


def _at_one_moment(guest: Guest, freeze: str, work: Callable[[], None], clock: Clock) -> Moment:
    if freeze == "never":
        work()
        return Moment(CRASH, "no freeze was asked for")
    if why_not := _unable(guest):
        thawed = _Thawed()
    else:
        done, frozen = False, True
        try:
            why_not, frozen = _frozen(guest)
            if not why_not:
                work()
                done = True
        finally:
            thawed = _thawed(guest, clock) if frozen else _Thawed()
        if done:
            if thawed.early:
                _refuse(guest, freeze, thawed.early)
                return Moment(CRASH, thawed.early, thawed.stuck)
            return Moment(FILESYSTEM, "the guest's file systems were frozen")
    _refuse(guest, freeze, why_not)
    work()
    return Moment(CRASH, why_not, thawed.stuck)


def _refuse(guest: Guest, freeze: str, why_not: str) -> None:
    if freeze == "require":
        raise RefusedError(
            f"{guest.who} was not frozen: {why_not}; mend that in the guest, or use --freeze auto"
        )


def _unable(guest: Guest) -> str:
    """Why the guest cannot be frozen now; "" if it can. One that somebody else froze is not thawed either."""
    try:
        status = guest.agent("guest-fsfreeze-status", _LOOK)
    except IslandError as error:
        return str(error)
    return "" if status == "thawed" else "somebody else froze it, and may thaw it at any time"


def _frozen(guest: Guest) -> tuple[str, bool]:
    """Freeze; returns why that failed, "" if it did not, and whether some file systems may be frozen now.

    An agent that refuses has undone its freeze, or was frozen by somebody else meanwhile, whose thaw it is.
    """
    try:
        count = guest.agent("guest-fsfreeze-freeze", _FREEZE)
    except RefusedError as error:
        return str(error), False
    except IslandError as error:
        return str(error), True
    return "" if _some(count) else "its agent found no file system to freeze", True


@dataclass(frozen=True, slots=True)
class _Thawed:
    """How a thaw ended: why the guest may have been thawed before; in a sentence, if it may be frozen."""

    early: str = ""
    stuck: str = ""


def _thawed(guest: Guest, clock: Clock) -> _Thawed:
    """Thaw, and try again for _PATIENCE seconds until the agent says that it did."""
    until = clock.now() + _PATIENCE
    pause = _SOONEST
    while True:
        try:
            count = guest.agent("guest-fsfreeze-thaw", _THAW)
            return _Thawed("" if _some(count) else "it was thawed by something else, perhaps too early")
        except IslandError as error:
            trouble = error
        if clock.now() + pause > until:
            break
        clock.sleep(pause)
        pause = min(2 * pause, _LATEST)
        try:
            guest.renew()
        except (NotFoundError, RefusedError) as error:
            return _Thawed(f"it ended while it was frozen: {error}")
        except IslandError:
            pass  # the next try tells
    stuck = f"{guest.who} may still be frozen ({trouble}); run '{guest.thaw_by_hand}', or restart its agent"
    _LOG.warning("%s", stuck)
    return _Thawed(f"whether it was frozen all the time cannot be told: {trouble}", stuck)


def _some(count: object) -> bool:
    return isinstance(count, int) and count > 0
