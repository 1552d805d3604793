"""What a running service does regularly: report dead daemons and remove what they left, keep space, sweep."""

from __future__ import annotations

import logging
import os
import time

from island_fast.cinder.attach.exports import State
from island_fast.cinder.volumes import Volumes
from island_fast.errors import IslandError

__all__ = ["Upkeep"]

_LOG = logging.getLogger(__name__)
_RETRY_AFTER = 60.0  # seconds after a volume's pins could not be dropped, or what its daemon left was open


class Upkeep:
    """Looks after a host's volumes, a little at each call. Errors are logged, and retried at a later call.

    `reserve` is the share of the volumes' file system that is kept free. With less than that free, pins are
    dropped, those of the largest images first. With less than half of it, running snapshots are aborted. The
    space that a pin held stays in its image, which uses it before it grows again.
    """

    def __init__(self, volumes: Volumes, reserve: float) -> None:
        self._volumes = volumes
        self._reserve = reserve
        self._dead: set[str] = set()
        self._failed_at: dict[str, float] = {}  # by volume: when its pins could not be dropped
        self._cared_at: dict[str, float] = {}  # by volume: when its daemon's disk was last looked after

    def check_volumes(self) -> None:
        """Log every daemon that died, care for its disk, and drop pins before guests run out of space."""
        self._log_dead_daemons()
        self._care_for_left_disks()
        if self._has_less_free_than(self._reserve):
            self._drop_pins()

    def _log_dead_daemons(self) -> None:
        exports = self._volumes.exports
        dead = {volume for volume in exports.volumes() if exports.state(volume) is State.DEAD}
        for volume in dead - self._dead:
            _LOG.error(
                "the daemon of volume %s died, and its device returns errors: detach the volume and attach "
                "it again, or stop and start the server; the daemon's log is in island_run_dir",
                volume,
            )
        self._dead = dead

    def _care_for_left_disks(self) -> None:
        """Look after the disks of dead daemons: at once, and then again until nobody has them open."""
        exports, now = self._volumes.exports, time.monotonic()
        left = {volume for volume in exports.volumes() if exports.needs_care(volume)}
        self._cared_at = {one: at for one, at in self._cared_at.items() if one in left}
        for volume in sorted(left):
            looked = now - self._cared_at.get(volume, -_RETRY_AFTER) < _RETRY_AFTER
            if looked and not exports.hangs(volume):
                continue
            self._cared_at[volume] = now
            try:
                exports.care(volume)
            except IslandError as error:
                _LOG.error("what the dead daemon of volume %s left could not be removed: %s", volume, error)
                del self._cared_at[volume]

    def _has_less_free_than(self, share: float) -> bool:
        try:
            disk = os.statvfs(self._volumes.records.folder)
        except OSError as error:
            _LOG.error("cannot find out how much space is free for volumes: %s", error)
            return False
        return disk.f_bavail < disk.f_blocks * share

    def _drop_pins(self) -> None:
        """Drop all pins; a volume whose pins could not be dropped a moment ago holds up no other."""
        abort_snapshot = self._has_less_free_than(self._reserve / 2)
        now = time.monotonic()
        self._failed_at = {one: at for one, at in self._failed_at.items() if now - at <= _RETRY_AFTER}
        for volume in self._volumes.volumes_with_pins():
            if volume in self._failed_at:
                continue
            try:
                dropped = self._volumes.drop_pins(volume, abort_snapshot=abort_snapshot)
            except IslandError as error:
                if not self._volumes.records.image_path(volume).exists():
                    continue  # it was deleted meanwhile
                _LOG.error(
                    "space is short, and the pins of volume %s could not be dropped: %s", volume, error
                )
                self._failed_at[volume] = now
                continue
            if dropped:
                _LOG.warning(
                    "space is short: %d pins of volume %s dropped; its next snapshot is a full scan",
                    *(dropped, volume),
                )

    def sweep(self) -> None:
        """Sweep every lineage that this host owns, those of deleted volumes included."""
        try:
            self._volumes.own_repository.sweep()
        except IslandError as error:
            _LOG.warning("the sweep failed and is retried after island_sweep_interval: %s", error)
