"""Doing something while a guest's file systems are frozen, by the agent inside it (QEMU's guest agent).

A guest that stays frozen is worse than any snapshot that fails. So what is frozen is thawed whatever happens;
and freezing, work and thawing are done in a thread, which no signal interrupts, unlike the main one.
The commands are in qemu's qga/qapi-schema.json: each of the two counts file systems, and a freeze that
the guest ended by itself (as Windows does after seconds) shows in a thaw that finds none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from island_fast.errors import IslandError, RefusedError

__all__ = ["CRASH", "FILESYSTEM", "FREEZES", "Guest", "Moment", "at_one_moment"]

_LOG = logging.getLogger(__name__)

CRASH = "crash"
FILESYSTEM = "filesystem"
FREEZES = ("auto", "require", "never")
"""Freeze if the guest's agent answers; do nothing without; do not ask it."""

_LOOK = 5  # seconds for an agent to answer, without which there is none
_FREEZE = 60  # seconds in which a guest has written what it holds in memory
_THAW = 20  # seconds
_THAWS = 3  # times that a thaw is tried


class Guest(Protocol):
    """A guest with or without an agent; see `Domain`."""

    name: str
    who: str

    def agent(self, command: str, timeout: int) -> object:
        """Give the agent a command; IslandError if it is not done within `timeout` seconds."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What holds for the volumes at that moment: as after a freeze, or as after a power cut, and why."""

    consistency: str
    reason: str


def at_one_moment(guest: Guest, freeze: str, work: Callable[[], None]) -> Moment:
    """Do `work` while the guest is frozen, as far as `freeze`, one of FREEZES, says.

    With "require" it is a RefusedError if the guest could not be frozen, or was not for all of the time;
    `work` may have been done then. What `work` raises comes out, after the thaw.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_at_one_moment, guest, freeze, work).result()


def _at_one_moment(guest: Guest, freeze: str, work: Callable[[], None]) -> Moment:
    if freeze == "never":
        work()
        return Moment(CRASH, "no freeze was asked for")
    if not (why_not := _unable(guest)):
        done = False
        try:
            if not (why_not := _frozen(guest)):
                work()
                done = True
        finally:
            ended = _thawed(guest)
        if done and not ended:
            return Moment(FILESYSTEM, "the guest's file systems were frozen")
        if done:
            _refuse(guest, freeze, ended)
            return Moment(CRASH, ended)
    _refuse(guest, freeze, why_not)
    work()
    return Moment(CRASH, why_not)


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


def _frozen(guest: Guest) -> str:
    """Freeze, and return why that failed, "" if it did not; some file systems may be frozen even then."""
    try:
        count = guest.agent("guest-fsfreeze-freeze", _FREEZE)
    except IslandError as error:
        return str(error)
    return "" if isinstance(count, int) and count > 0 else "its agent found no file system to freeze"


def _thawed(guest: Guest) -> str:
    """Thaw, and return why the guest may not have been frozen until then; told if it may still be."""
    for _ in range(_THAWS):
        try:
            count = guest.agent("guest-fsfreeze-thaw", _THAW)
            frozen = isinstance(count, int) and count > 0
            return "" if frozen else "it was thawed by something else, perhaps too early"
        except IslandError as error:
            trouble = error
    _LOG.warning(
        "%s may still be frozen (%s); run 'virsh domfsthaw %s', or restart its agent",
        guest.who, trouble, guest.name,
    )  # fmt: skip
    return f"whether it was frozen all the time cannot be told: {trouble}"
