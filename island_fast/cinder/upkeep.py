"""What is looked after while a service runs: daemons that died, free space, sweeps."""

from __future__ import annotations

import logging
import os
import time

from island_fast.cinder.attach.exports import State
from island_fast.cinder.volumes import Volumes
from island_fast.errors import IslandError

__all__ = ["Tending"]

_LOG = logging.getLogger(__name__)
_PATIENCE = 60.0  # seconds after pins could not be dropped, until it is tried again


class Tending:
    """Looks after a host's volumes, a little at each call; an error is told, and met again next time.

    `reserve` is the part of the volumes' file system that is kept free: with less, pins are dropped, those of
    the largest images first, and with less than half of it snapshots under way are given up. An image keeps
    the space that its pin held, and uses it before it grows again.
    """

    def __init__(self, volumes: Volumes, reserve: float) -> None:
        self._volumes = volumes
        self._reserve = reserve
        self._dead: set[str] = set()
        self._failed = -_PATIENCE

    def look(self) -> None:
        """Tell of daemons that died, and see that guests do not run out of space."""
        self._tell_of_the_dead()
        if self._is_below(self._reserve) and time.monotonic() - self._failed > _PATIENCE:
            self._drop_pins()

    def _tell_of_the_dead(self) -> None:
        exports = self._volumes.exports
        dead = {volume for volume in exports.volumes() if exports.state(volume) is State.DEAD}
        for volume in dead - self._dead:
            _LOG.error(
                "the daemon of volume %s died, and its device gives errors: detach the volume and attach it "
                "again, or stop and start the server; the daemon's log is beside its sockets",
                volume,
            )
        self._dead = dead

    def _is_below(self, part: float) -> bool:
        try:
            disk = os.statvfs(self._volumes.records.folder)
        except OSError as error:
            _LOG.error("the space for volumes cannot be told: %s", error)
            return False
        return disk.f_bavail < disk.f_blocks * part

    def _drop_pins(self) -> None:
        give_up = self._is_below(self._reserve / 2)
        for volume in self._volumes.pinned():
            try:
                dropped = self._volumes.drop_pins(volume, give_up=give_up)
            except IslandError as error:
                _LOG.error("space is short, and the pins of volume %s stay: %s", volume, error)
                self._failed = time.monotonic()
                continue
            if dropped:
                _LOG.warning(
                    "space is short: %d pins of volume %s dropped; its next snapshot scans it in full",
                    *(dropped, volume),
                )

    def sweep(self) -> None:
        """Sweep what this host writes, deleted volumes' lineages included."""
        try:
            self._volumes.own.sweep()
        except IslandError as error:
            _LOG.warning("the sweep failed, and is tried again at its next time: %s", error)
