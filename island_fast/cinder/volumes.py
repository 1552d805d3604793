"""The life of a host's volumes.

Three rules hold everywhere:

1. An image is made when it is first needed, under the volume's lock. So another caller that needs it waits,
   and then finds it.
2. An image is read and snapshotted through a daemon that has it open, whether the volume is attached or not.
   So a volume can be attached, detached or extended meanwhile.
3. That daemon ends once the volume is not attached and nothing uses the daemon.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from island_fast.cinder.attach.exports import Exports, State
from island_fast.cinder.images import Images, holds_pins, volume_size
from island_fast.cinder.island_command import IslandCommand
from island_fast.cinder.records import SnapshotRef, VolumeRecord, VolumeRecords
from island_fast.errors import DamagedError, IslandError, NotFoundError, RefusedError
from island_fast.files import sync_folder
from island_fast.qcow2.header import MAX_VOLUME_SIZE
from island_fast.qemu.image_lock import ImageLock
from island_fast.qemu.programs import RunProgram

__all__ = ["Volumes"]

_LOG = logging.getLogger(__name__)
_COPY_PREFIX = "copy-"  # of internal snapshots that exist only while their content is read

GetLock = Callable[[str], AbstractContextManager[object]]
"""Returns the lock of a name. One caller in this process holds it at a time; it is not reentrant."""


class Volumes:
    """The volumes of a host. Every call can be repeated: it leaves alone what is done already.

    `repositories` are keyed by name; the host's own one has the name "". `lock` is the service's: the service
    must keep running while a caller waits for a lock. With `lazy`, an image can be made later than its
    volume.
    """

    def __init__(
        self,
        records: VolumeRecords,
        exports: Exports,
        execute: RunProgram,
        repositories: Mapping[str, IslandCommand],
        lock: GetLock,
        *,
        lazy: bool = True,
    ) -> None:
        self.records = records
        self.exports = exports
        self._images = Images(execute)
        self._repositories = repositories
        self._lock = lock
        self._lazy = lazy
        self._users: Counter[str] = Counter()  # of each volume's daemon, besides its device
        self._moving: set[str] = set()  # volumes whose image is about to be removed here
        self._aborted: set[str] = set()  # volumes whose running snapshot is to end
        self._copies: set[str] = set()  # internal snapshots that this process holds

    @property
    def own_repository(self) -> IslandCommand:
        """The repository that this host writes to."""
        return self._repositories[""]

    def repository_of(self, snapshot: SnapshotRef) -> IslandCommand:
        """Return the repository of a snapshot; raise NotFoundError if it is not configured."""
        try:
            return self._repositories[snapshot.repository]
        except KeyError as error:
            raise NotFoundError(
                f"no repository {snapshot.repository!r} is configured; add it to island_other_repositories"
            ) from error

    # From nothing to an image.

    def create(self, volume: str, record: VolumeRecord, *, at_once: bool = False) -> None:
        """Store the record of a new volume, and make its image with `at_once` or without `lazy`.

        Raises RefusedError if the volume is larger than this driver can snapshot.
        """
        with self._lock(volume):
            if self._find_record(volume) is not None:
                return
            _refuse_oversize(record.size)
            self.records.write(volume, record)
        if at_once or not self._lazy:
            self.ensure_image(volume)

    def adopt_record(self, volume: str, record: VolumeRecord) -> None:
        """Take over what Cinder's database says of a volume, if this host has no record or an older one.

        A record is older if it names another origin: the host had the volume once, and it was migrated away.
        Raises NotFoundError if Cinder says that there was an image, which then must be lost.
        """
        with self._lock(volume):  # before the look: a call that had the lock may have made the image
            known = self._find_record(volume)
            if known is None and record.made:
                raise NotFoundError(
                    f"volume {volume} has no image on this host, its host or its files were lost; revert it "
                    "to its newest snapshot, or create a volume from one"
                )
            if known is not None and record.origin and not known.made and known.origin != record.origin:
                # A cut can have left the image that the volume had when it was migrated away.
                self.records.image_path(volume).unlink(missing_ok=True)
                self.records.write(volume, record)
        self.create(volume, record)

    def ensure_image(self, volume: str) -> Path:
        """Make the volume's image if it is not made yet, and return its path."""
        with self._lock(volume):
            return self._ensure_image(volume)

    def _ensure_image(self, volume: str) -> Path:
        """Do the work of `ensure_image`; the caller holds the volume's lock."""
        record, image = self.records.read(volume), self.records.image_path(volume)
        if record.made and not image.exists():
            raise NotFoundError(
                f"{image} is gone: put it back, or revert volume {volume} to its newest snapshot"
            )
        if not record.made:
            if not image.exists():
                if record.origin:
                    self._restore_image(volume, record.origin, pin=record.passing)
                else:
                    self._images.create_blank(image, record.size)
            # Before the snapshot goes that a migration took: an image that is not "made" can be made again.
            origin = record.origin if record.passing else None
            record = self.records.change(volume, origin=origin, made=True)
        if record.origin:
            self.own_repository.adopt(record.origin.lineage)
            self.own_repository.delete(record.origin)
            self.records.change(volume, origin=None, passing=False)
        return image

    def _restore_image(self, volume: str, snapshot: SnapshotRef, *, pin: bool) -> None:
        """Make or replace the image from a snapshot; it gets at least the size of the record."""
        image = self.records.image_path(volume)
        scratch = image.with_name(f"from-{snapshot.snapshot}.qcow2")
        self.records.remove_leftovers(volume, keep=scratch.name)  # each can be as large as the volume
        if not scratch.exists():  # a file under this name is whole: an earlier attempt restored it
            self.repository_of(snapshot).restore(snapshot, scratch, pin=pin)
        size = max(self.records.read(volume).size, volume_size(scratch))
        self._images.resize(scratch, size)
        os.replace(scratch, image)
        sync_folder(image.parent)
        self.records.change(volume, size=size)

    def record_lone_images(self) -> None:
        """Make volumes of images that have no record and are the only name of their file.

        Such a file was to be managed, and was renamed and not linked, before a cut.
        """
        for volume in self.records.unrecorded():
            image = self.records.image_path(volume)
            with self._lock(volume), contextlib.suppress(FileNotFoundError, NotFoundError):
                if self._find_record(volume) is None and image.stat().st_nlink == 1:
                    self.records.write(volume, VolumeRecord(volume_size(image), made=True))

    def hold_reference(self, name: str) -> AbstractContextManager[object]:
        """Return the lock of taking over what has this name, which one caller at a time does."""
        return self._lock(f"manage-{name}")

    def clone(self, source: str, volume: str, size: int) -> None:
        """Create a volume with the present content of another one; nothing goes through the store."""
        _refuse_oversize(size)
        with self._lock(source):
            record = self.records.read(source)
            if self._find_record(volume) is not None:
                return
            if not record.made and not record.passing:
                self.records.write(volume, VolumeRecord(max(size, record.size), origin=record.origin))
                return
        with self.hold_internal_snapshot(source) as (image, internal):
            self.records.create_folder(volume)
            size = max(size, self.records.read(source).size)
            self._images.copy(image, internal, self.records.image_path(volume), size)
            self.records.write(volume, VolumeRecord(size, made=True))

    def delete(self, volume: str) -> None:
        """Remove a volume from this host; raise ImageInUseError if its device is open."""
        with self._lock(volume):
            self.exports.stop(volume)
            record = None
            with contextlib.suppress(DamagedError):  # a damaged record is removed as well
                record = self._find_record(volume)
            if record and record.passing and record.origin:
                self.own_repository.adopt(record.origin.lineage)
                self.own_repository.delete(record.origin)
            self.records.remove(volume)

    def extend(self, volume: str, size: int) -> None:
        """Enlarge a volume to `size` bytes, whether it is attached or not."""
        _refuse_oversize(size)
        with self._lock(volume):
            if self.records.read(volume).made:
                if self.exports.state(volume) in (State.SERVED, State.ATTACHED):
                    self.exports.grow(volume, size)
                else:
                    self._images.resize(self.records.image_path(volume), size)
            self.records.change(volume, size=max(size, self.records.read(volume).size))

    # In use.

    def attach(self, volume: str) -> Path:
        """Return the path of the volume's block device; make the image first if it is not made yet.

        Raises RefusedError while the volume is being migrated away.
        """
        with self._lock(volume):
            self._refuse_moving(volume)
            return self.exports.attach(volume, self._ensure_image(volume))

    def detach(self, volume: str) -> None:
        """Remove the block device; raise ImageInUseError if it is open."""
        with self._lock(volume):
            self.exports.detach(volume)
            self._stop_if_idle(volume)

    def release(self, volume: str) -> None:
        """Stop a volume that Cinder no longer manages. If it is in transit, its image is made first.

        After that the whole content is on this host, which alone knows of the volume.
        """
        known = self._find_record(volume)
        if known is not None and known.in_transit:
            self.ensure_image(volume)
        self.stop(volume)

    def give_back(self, volume: str) -> None:
        """Leave on this host's disk what was to be managed and was not; without an image nothing stays."""
        self.record_lone_images()
        known = self._find_record(volume)
        if known is not None and known.made:
            self.stop(volume)
        else:
            self.delete(volume)

    def stop(self, volume: str) -> None:
        """Remove the block device and end the daemon, whoever uses it."""
        with self._lock(volume):
            self.exports.stop(volume)

    def renew_daemons(self) -> None:
        """Restart the daemons whose program was replaced since they started, where devices can wait for that.

        That of a volume with a running snapshot stays as it is. A failure is logged.
        """
        for volume in self.exports.volumes():
            image = self.records.image_path(volume)
            with self._lock(volume):
                if not self.exports.runs_older_program(volume) or is_snapshot_running(image):
                    continue
                try:
                    self.exports.restart(volume, image)
                except IslandError as error:
                    _LOG.error("the daemon of volume %s runs an older QEMU and stays: %s", volume, error)
                else:
                    _LOG.info("the daemon of volume %s runs the QEMU that is installed now", volume)

    def _stop_if_idle(self, volume: str) -> None:
        """End the daemon if nobody uses it: not a device, not this process, and no running snapshot.

        A snapshot that an earlier run of the service started may still be running.
        """
        idle = self.exports.state(volume) is State.SERVED and not self._users[volume]
        if idle and not is_snapshot_running(self.records.image_path(volume)):
            self.exports.stop(volume)

    @contextmanager
    def _hold_daemon(self, volume: str) -> Iterator[Path]:
        """Keep a daemon serving the volume's image while the body runs; yield the image's path."""
        with self._lock(volume):
            image = self._ensure_image(volume)
            self.exports.serve(volume, image)
            self._users[volume] += 1
        try:
            yield image
        finally:
            with self._lock(volume):
                self._users[volume] -= 1
                self._stop_if_idle(volume)

    @contextmanager
    def hold_internal_snapshot(self, volume: str) -> Iterator[tuple[Path, str]]:
        """Take an internal snapshot, and drop it when the body ends; yield the image's path and its name."""
        name = f"{_COPY_PREFIX}{secrets.token_hex(8)}"
        with self._hold_daemon(volume) as image:
            with self._lock(volume):
                for left in self.exports.internal_snapshots(volume):
                    if left.startswith(_COPY_PREFIX) and left not in self._copies:
                        self.exports.drop_internal_snapshot(volume, left)  # of a process that was killed
                self._copies.add(name)
                self.exports.take_internal_snapshot(volume, name)
            try:
                yield image, name
            finally:
                with self._lock(volume):
                    self.exports.drop_internal_snapshot(volume, name)
                self._copies.discard(name)

    def export(self, volume: str, target: Path, image_format: str) -> None:
        """Write the volume's present content to a file of a format, such as "raw" or "vmdk"."""
        with self.hold_internal_snapshot(volume) as (image, internal):
            self._images.export(image, internal, target, image_format)

    # Snapshots.

    def snapshot(self, volume: str, label: str) -> SnapshotRef:
        """Take a snapshot of a volume, after those that were requested before.

        It goes into the volume's lineage, or into a new one with the volume's name. If `label` is that of the
        last snapshot that was started, and it was stored although no caller learned of it, it is returned and
        no new one is taken.
        """
        with self._lock(f"snapshots-{volume}"), self._hold_daemon(volume) as image:
            record = self.records.read(volume)
            lineage = record.lineage or volume
            for taken in self.own_repository.find_by_label(lineage, label) if record.label == label else []:
                self.records.change(volume, lineage=lineage)
                return taken
            self.records.change(volume, label=label)
            monitor = self._require_monitor(volume)
            self._aborted.discard(volume)
            try:
                taken = self.own_repository.snapshot(
                    image, lineage, label, monitor, lambda: volume in self._aborted
                )
            except IslandError as error:
                if volume not in self._aborted:
                    raise
                raise IslandError(
                    f"the snapshot of volume {volume} was aborted because the host's disk is nearly full; "
                    "take it again when there is more space"
                ) from error
            self.records.change(volume, lineage=taken.lineage)
            return taken

    def delete_snapshot(self, volume: str, snapshot: SnapshotRef) -> None:
        """Delete a snapshot of a volume; raise RefusedError if volumes are yet to be made from it."""
        if dependants := self.find_dependants(snapshot):
            raise RefusedError(
                f"snapshot {snapshot} is needed by {', '.join(dependants)}, whose image is not made yet; "
                "attach or delete them first"
            )
        with self._lock(f"snapshots-{volume}"):
            self._adopt_if_image_lost(volume, snapshot.lineage)
            self.own_repository.delete(snapshot)

    def _adopt_if_image_lost(self, volume: str, lineage: str) -> None:
        """Adopt the lineage of a volume whose image is not on this host: the host that had it is lost."""
        if not self.records.image_path(volume).exists():
            self.own_repository.adopt(lineage)

    def forget_snapshot(self, volume: str, label: str) -> None:
        """Remove what a failed or interrupted snapshot with this label left, its pin in the image included.

        Raises RefusedError if a process of an earlier run of this service is still sending it.
        """
        with self._lock(f"snapshots-{volume}"):
            record = self._find_record(volume)
            if record is None or not record.made:
                return
            if is_snapshot_running(self.records.image_path(volume)):
                raise RefusedError(f"a snapshot of volume {volume} is still being taken; try again later")
            for snapshot in self.own_repository.find_by_label(record.lineage or volume, label):
                self.own_repository.delete(snapshot)
            self._unpin(volume, orphans=True)

    def _find_record(self, volume: str) -> VolumeRecord | None:
        """Return the volume's record, or None if this host does not know the volume."""
        with contextlib.suppress(NotFoundError):
            return self.records.read(volume)
        return None

    def find_dependants(self, snapshot: SnapshotRef) -> list[str]:
        """Return the volumes whose image is yet to be made from a snapshot."""
        return [name for name, record in self.records.read_all() if record.origin == snapshot]

    def _unpin(self, volume: str, *, orphans: bool) -> int:
        """Drop the pins of a volume's image, or only the orphans, and return their number."""
        with self._hold_daemon(volume) as image:
            return self.own_repository.unpin(image, self._require_monitor(volume), orphans=orphans)

    def _require_monitor(self, volume: str) -> Path:
        monitor = self.exports.monitor(volume)
        if monitor is None:
            raise IslandError(f"the daemon of volume {volume} ended just now; try again")
        return monitor

    def revert(self, volume: str, record: VolumeRecord, snapshot: SnapshotRef) -> None:
        """Give a detached volume the content of a snapshot of its own lineage.

        `record` is used if this host does not know the volume, because its host was lost; this host then
        becomes the owner of the lineage. Until the content is restored, the volume counts as lost: it has no
        image and cannot be attached, so no guest ever sees a blank disk.
        """
        with self._lock(f"snapshots-{volume}"), self._lock(volume):
            self._refuse_moving(volume)
            self.exports.stop(volume)
            self._adopt_if_image_lost(volume, snapshot.lineage)
            known = self._find_record(volume)
            if known is None or not known.made:
                self.records.write(volume, replace(record, made=True))
            self._restore_image(volume, snapshot, pin=True)
            self.records.change(volume, lineage=snapshot.lineage, origin=None, passing=False, made=True)

    def drop_pins(self, volume: str, *, abort_snapshot: bool) -> int:
        """Drop a volume's pins to free space, and return their number.

        While a snapshot is running, none are dropped. With `abort_snapshot` it is then asked to end, and a
        later call can drop the pins.
        """
        try:
            return self._unpin(volume, orphans=False)
        except RefusedError:
            if not is_snapshot_running(self.records.image_path(volume)):
                return self._unpin(volume, orphans=False)  # it has just ended, or this raises the real cause
            if abort_snapshot and volume not in self._aborted:
                self._aborted.add(volume)
                _LOG.warning("space is short: aborting the running snapshot of volume %s", volume)
            return 0

    def volumes_with_pins(self) -> list[str]:
        """Return the volumes whose images hold pins, the largest image files first."""
        sizes = {}
        for volume, record in self.records.read_undamaged():
            image = self.records.image_path(volume)
            with contextlib.suppress(IslandError, OSError):
                if record.made and holds_pins(image):
                    sizes[volume] = image.stat().st_blocks
        return sorted(sizes, key=lambda volume: -sizes[volume])

    def provisioned_bytes(self) -> int:
        """Return the bytes that the volumes can grow to: their sizes, and once more what pins can hold."""
        pinned = 0
        for volume in self.volumes_with_pins():
            with contextlib.suppress(OSError):
                pinned += self.records.image_path(volume).stat().st_blocks * 512
        return pinned + sum(record.size for _, record in self.records.read_undamaged())

    # To other names and hosts.

    def prepare_migration(self, volume: str, label: str) -> VolumeRecord:
        """Bring a detached volume to where another host can make it; return the record for that host.

        Nobody can write to it from before its last snapshot on. The image is removed once the store has been
        asked for all that it is to be made from. If anything is missing there, this raises IslandError, and
        the volume stays as it is. The record stays, so that the image can be made here again if no host takes
        the volume over. If the image is yet to be made from a snapshot, it is made first, because no other
        host can know that this snapshot must be kept. A volume that is yet to be blank is removed altogether.

        Raises ImageInUseError if its device is open.
        """
        record = self.records.read(volume)
        if not record.made and not record.origin:
            self.delete(volume)
            return record
        self._moving.add(volume)
        try:
            if not record.in_transit:
                self._send_away(volume, label)
            with self._lock(volume):
                self.exports.stop(volume)
                self.records.image_path(volume).unlink(missing_ok=True)
        finally:
            self._moving.discard(volume)
        return self.records.read(volume)

    def _send_away(self, volume: str, label: str) -> None:
        """Take a snapshot that another host is to make the volume from, and note that it can.

        The snapshot of an earlier attempt does not do: a guest can have written since.
        """
        with self._lock(volume):
            self.exports.detach(volume)
        tried = self.records.read(volume).label == label
        self.records.change(volume, label=None)
        snapshot = self.snapshot(volume, label)
        self._require_stored(volume, snapshot)
        for old in self.own_repository.find_by_label(snapshot.lineage, label) if tried else []:
            if old != snapshot:
                self.own_repository.delete(old)
        self.records.change(volume, origin=snapshot, passing=True, made=False)

    def forget(self, volume: str, record: VolumeRecord) -> None:
        """Remove what this host has of a volume that another one took over, unless its record has changed."""
        with self._lock(volume):
            if self._find_record(volume) == record:
                self.records.remove(volume)

    def _refuse_moving(self, volume: str) -> None:
        if volume in self._moving:
            raise RefusedError(
                f"volume {volume} is being migrated to another host; try again when it is there"
            )

    def _require_stored(self, volume: str, snapshot: SnapshotRef) -> None:
        """Raise IslandError unless another host can make the volume of a snapshot; a retry takes another."""
        try:
            self.own_repository.require_stored(snapshot)
        except IslandError as error:
            self.records.change(volume, label=None)
            raise IslandError(
                f"volume {volume} stays on this host, because the store does not have all of snapshot "
                f"{snapshot}, which was to bring it to another one: {error}; see 'island verify {snapshot}', "
                "delete that snapshot, and try again"
            ) from error

    def rename(self, volume: str, name: str) -> None:
        """Give a volume another name; it keeps its lineage."""
        with self._lock(volume), self._lock(name):
            self.exports.stop(volume)
            self.records.rename(volume, name)
            record = self.records.read(name)
            if record.lineage:
                self.own_repository.adopt(record.lineage)  # the path of its image has changed


def _refuse_oversize(size: int) -> None:
    """Raise RefusedError if no snapshot of a volume of `size` bytes could be taken."""
    if size > MAX_VOLUME_SIZE:
        raise RefusedError(
            f"a volume of {size >> 30} GiB cannot be snapshotted, so it is not created; choose a size of at "
            f"most {MAX_VOLUME_SIZE >> 30} GiB"
        )


def is_snapshot_running(image: Path) -> bool:
    """Return whether some process is taking a snapshot of the image."""
    try:
        with ImageLock(image):
            return False
    except NotFoundError:
        return False
    except RefusedError:
        return True
