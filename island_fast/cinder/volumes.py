"""The life of a host's volumes.

Three rules hold everywhere. An image is made when it is first needed, under the volume's lock, so that
whoever needs it meanwhile waits and finds it. Whoever reads or snapshots an image does so through a daemon
that has it open, be it attached or not, so that a volume may be attached, detached or extended meanwhile.
That daemon ends when the volume is not attached and nobody uses it.
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
from island_fast.cinder.island_command import Commands
from island_fast.cinder.records import Origin, Record, Records
from island_fast.errors import DamagedError, IslandError, NotFoundError, RefusedError
from island_fast.files import sync_folder
from island_fast.qemu.image_lock import ImageLock
from island_fast.qemu.programs import RunProgram

__all__ = ["Volumes"]

_LOG = logging.getLogger(__name__)
_COPY = "copy-"  # begins the name of an internal snapshot that lasts as long as its content is read

Lock = Callable[[str], AbstractContextManager[object]]
"""Gives a lock by its name: held by one at a time in this process, and not by the same one twice."""


class Volumes:
    """The volumes of a host. Every call may be repeated: what is done already is left as it is.

    `repositories` are by name, one's own under "". `lock` is the service's: waiting for one must let the
    service go on. `lazy` says whether an image may be made later than its volume.
    """

    def __init__(
        self,
        records: Records,
        exports: Exports,
        execute: RunProgram,
        repositories: Mapping[str, Commands],
        lock: Lock,
        *,
        lazy: bool = True,
    ) -> None:
        self.records = records
        self.exports = exports
        self._images = Images(execute)
        self._repositories = repositories
        self._lock = lock
        self._lazy = lazy
        self._users: Counter[str] = Counter()
        self._given_up: set[str] = set()
        self._copies: set[str] = set()

    @property
    def own(self) -> Commands:
        """The repository that this host writes to."""
        return self._repositories[""]

    def repository(self, origin: Origin) -> Commands:
        """The repository that a snapshot is in; NotFoundError if no such one is configured."""
        try:
            return self._repositories[origin.repository]
        except KeyError as error:
            raise NotFoundError(
                f"no repository {origin.repository!r} is configured; add it to island_other_repositories"
            ) from error

    # From nothing to an image.

    def create(self, volume: str, record: Record, *, at_once: bool = False) -> None:
        """Keep a record of a new volume; its image is made now if it may not wait."""
        with self._lock(volume):
            with contextlib.suppress(NotFoundError):
                self.records.read(volume)
                return
            self.records.write(volume, record)
        if at_once or not self._lazy:
            self.make(volume)

    def learn(self, volume: str, kept: Record) -> None:
        """Know a volume that came here by what is kept of it elsewhere.

        What this host knows of it is older where it says another origin: it had the volume once, and gave it
        away. NotFoundError if there was an image, which must have been lost.
        """
        known = self._known(volume)
        if known is None and kept.made:
            raise NotFoundError(
                f"volume {volume} has no image on this host, its host or its files were lost; revert it to "
                "its newest snapshot, or create a volume from one"
            )
        if known is not None and kept.origin and not known.made and known.origin != kept.origin:
            with self._lock(volume):
                self.records.write(volume, kept)
        self.create(volume, kept)

    def make(self, volume: str) -> Path:
        """The volume's image, made if it is not there yet."""
        with self._lock(volume):
            return self._make(volume)

    def _make(self, volume: str) -> Path:
        record, image = self.records.read(volume), self.records.image(volume)
        if record.made:
            if not image.exists():
                raise NotFoundError(
                    f"{image} is gone: put it back, or revert volume {volume} to its newest snapshot"
                )
            return image
        if not image.exists():
            if record.origin:
                self._restore(volume, record.origin, pin=record.passing)
            else:
                self._images.blank(image, record.size)
        if record.origin and record.passing:
            self.own.adopt(record.origin.lineage)
            self.own.delete(record.origin)
        self.records.change(volume, origin=None, passing=False, made=True)
        return image

    def _restore(self, volume: str, origin: Origin, *, pin: bool) -> None:
        """Make the image from a snapshot, or replace it; it is of the record's size, at least."""
        image = self.records.image(volume)
        scratch = image.with_name(f"from-{origin.snapshot}.qcow2")
        self.records.tidy(volume, keep=scratch.name)  # each could be as large as the volume
        if not scratch.exists():  # what is there under its own name is whole, from an attempt before
            self.repository(origin).restore(origin, scratch, pin=pin)
        size = max(self.records.read(volume).size, volume_size(scratch))
        self._images.resize(scratch, size)
        os.replace(scratch, image)
        sync_folder(image.parent)
        self.records.change(volume, size=size)

    def clone(self, source: str, volume: str, size: int) -> None:
        """A new volume with the content of another one as it is now; nothing goes through the store."""
        with self._lock(source):
            record = self.records.read(source)
            if self._known(volume) is not None:
                return
            if not record.made and not record.passing:
                self.records.write(volume, Record(max(size, record.size), origin=record.origin))
                return
        with self.frozen(source) as (image, internal):
            target = self.records.prepare(volume)
            size = max(size, self.records.read(source).size)
            self._images.copy(image, internal, target, size)
            self.records.write(volume, Record(size, made=True))

    def delete(self, volume: str) -> None:
        """Remove a volume from this host; ImageInUseError if someone has its device open."""
        with self._lock(volume):
            self.exports.stop(volume)
            record = None
            with contextlib.suppress(DamagedError):  # it goes all the same
                record = self._known(volume)
            if record and record.passing and record.origin:
                self.own.adopt(record.origin.lineage)
                self.own.delete(record.origin)
            self.records.remove(volume)

    def extend(self, volume: str, size: int) -> None:
        """Make a volume larger, attached or not; `size` in bytes."""
        with self._lock(volume):
            if self.records.read(volume).made:
                if self.exports.state(volume) in (State.SERVED, State.ATTACHED):
                    self.exports.grow(volume, size)
                else:
                    self._images.resize(self.records.image(volume), size)
            self.records.change(volume, size=max(size, self.records.read(volume).size))

    # In use.

    def attach(self, volume: str) -> Path:
        """The path of the volume's block device, the image made first if need be."""
        with self._lock(volume):
            return self.exports.attach(volume, self._make(volume))

    def detach(self, volume: str) -> None:
        """Take the block device away; ImageInUseError if someone has it open."""
        with self._lock(volume):
            self.exports.detach(volume)
            self._settle(volume)

    def leave(self, volume: str) -> None:
        """Stop a volume that nobody knows from now on but this host; its content is on it."""
        known = self._known(volume)
        if known is not None and known.on_its_way:
            self.make(volume)
        self.stop(volume)

    def stop(self, volume: str) -> None:
        """Take the block device away, and end the daemon, whoever uses it."""
        with self._lock(volume):
            self.exports.stop(volume)

    def _settle(self, volume: str) -> None:
        """End a daemon that nobody uses. A snapshot of an earlier run of the service may still use it."""
        idle = self.exports.state(volume) is State.SERVED and not self._users[volume]
        if idle and not snapshot_under_way(self.records.image(volume)):
            self.exports.stop(volume)

    @contextmanager
    def _served(self, volume: str) -> Iterator[Path]:
        """Have a daemon serve the volume's image while the body runs."""
        with self._lock(volume):
            image = self._make(volume)
            self.exports.serve(volume, image)
            self._users[volume] += 1
        try:
            yield image
        finally:
            with self._lock(volume):
                self._users[volume] -= 1
                self._settle(volume)

    @contextmanager
    def frozen(self, volume: str) -> Iterator[tuple[Path, str]]:
        """The volume's image and an internal snapshot of it as it is now, while the body runs."""
        name = f"{_COPY}{secrets.token_hex(8)}"
        with self._served(volume) as image:
            with self._lock(volume):
                for left in self.exports.internals(volume):
                    if left.startswith(_COPY) and left not in self._copies:
                        self.exports.thaw(volume, left)  # by a process that was killed
                self._copies.add(name)
                self.exports.freeze(volume, name)
            try:
                yield image, name
            finally:
                with self._lock(volume):
                    self.exports.thaw(volume, name)
                self._copies.discard(name)

    def export(self, volume: str, target: Path, image_format: str) -> None:
        """Write the volume as it is now to a file, such as "raw" or "vmdk"."""
        with self.frozen(volume) as (image, internal):
            self._images.export(image, internal, target, image_format)

    # Snapshots.

    def snapshot(self, volume: str, label: str) -> Origin:
        """Take a snapshot, after those of this volume that were asked for before.

        The lineage is the one that the volume has, or a new one of its name. Asked for again with the label
        of the last one, which may be finished though nobody was told, it is that one.
        """
        with self._lock(f"snapshots-{volume}"), self._served(volume) as image:
            record = self.records.read(volume)
            lineage = record.lineage or volume
            for taken in self.own.labelled(lineage, label) if record.label == label else []:
                self.records.change(volume, lineage=lineage)
                return taken
            self.records.change(volume, label=label)
            monitor = self._monitor(volume)
            self._given_up.discard(volume)
            try:
                taken = self.own.snapshot(image, lineage, label, monitor, lambda: volume in self._given_up)
            except IslandError as error:
                if volume not in self._given_up:
                    raise
                raise IslandError(
                    f"the snapshot of volume {volume} was given up, because the host's disk is nearly full; "
                    "take it again when there is room"
                ) from error
            self.records.change(volume, lineage=taken.lineage)
            return taken

    def delete_snapshot(self, volume: str, snapshot: Origin) -> None:
        """Delete a snapshot of the volume; RefusedError names the volumes that are yet to be made from it."""
        if needing := self.needing(snapshot):
            raise RefusedError(
                f"snapshot {snapshot} is needed by {', '.join(needing)}, whose image is not made yet; attach "
                "or delete them first"
            )
        with self._lock(f"snapshots-{volume}"):
            self._inherit(volume, snapshot.lineage)
            self.own.delete(snapshot)

    def _inherit(self, volume: str, lineage: str) -> None:
        """Own the lineage of a volume whose image is not here: the host that had it is lost."""
        if not self.records.image(volume).exists():
            self.own.adopt(lineage)

    def forget_snapshot(self, volume: str, label: str) -> None:
        """Remove what a failed or interrupted snapshot with this label left, its pin in the image included.

        RefusedError if it is still being sent, by a process of an earlier run of this service.
        """
        with self._lock(f"snapshots-{volume}"):
            record = self._known(volume)
            if record is None or not record.made:
                return
            if snapshot_under_way(self.records.image(volume)):
                raise RefusedError(f"a snapshot of volume {volume} is still being taken; try again later")
            for snapshot in self.own.labelled(record.lineage or volume, label):
                self.own.delete(snapshot)
            self._unpin(volume, orphans=True)

    def _known(self, volume: str) -> Record | None:
        with contextlib.suppress(NotFoundError):
            return self.records.read(volume)
        return None

    def needing(self, snapshot: Origin) -> list[str]:
        """The volumes whose image is yet to be made from a snapshot."""
        return [name for name, record in self.records.all() if record.origin == snapshot]

    def _unpin(self, volume: str, *, orphans: bool) -> int:
        with self._served(volume) as image:
            return self.own.unpin(image, self._monitor(volume), orphans=orphans)

    def _monitor(self, volume: str) -> Path:
        monitor = self.exports.monitor(volume)
        if monitor is None:
            raise IslandError(f"the daemon of volume {volume} ended just now; try again")
        return monitor

    def revert(self, volume: str, record: Record, snapshot: Origin) -> None:
        """Give a volume that is not attached the content of a snapshot of its own lineage.

        `record` is for a volume that this host does not know, because the host that had it was lost: then
        this one becomes the owner of its lineage. Until the content is there the volume has no image, and is
        never a blank one.
        """
        with self._lock(f"snapshots-{volume}"), self._lock(volume):
            self.exports.stop(volume)
            self._inherit(volume, snapshot.lineage)
            known = self._known(volume)
            if known is None or not known.made:
                self.records.write(volume, replace(record, made=True))
            self._restore(volume, snapshot, pin=True)
            self.records.change(volume, lineage=snapshot.lineage, origin=None, passing=False, made=True)

    def drop_pins(self, volume: str, *, give_up: bool) -> int:
        """Drop a volume's pins to win space; how many.

        While a snapshot is being taken none go; with `give_up` that is ended, and they can go afterwards.
        """
        try:
            return self._unpin(volume, orphans=False)
        except RefusedError:
            if not snapshot_under_way(self.records.image(volume)):
                return self._unpin(volume, orphans=False)  # one has just ended; or this tells what else it is
            if give_up and volume not in self._given_up:
                self._given_up.add(volume)
                _LOG.warning(
                    "space is short: the snapshot of volume %s that is being taken is given up", volume
                )
            return 0

    def pinned(self) -> list[str]:
        """The volumes whose images hold pins, those with the largest files first."""
        sizes = {}
        for volume, record in self.records.sound():
            with contextlib.suppress(IslandError, OSError):
                if record.made and holds_pins(self.records.image(volume)):
                    sizes[volume] = self.records.image(volume).stat().st_blocks
        return sorted(sizes, key=lambda volume: -sizes[volume])

    def provisioned(self) -> int:
        """Bytes that the volumes could come to take: their sizes, and once more what pins may hold."""
        held = 0
        for volume in self.pinned():
            with contextlib.suppress(OSError):
                held += self.records.image(volume).stat().st_blocks * 512
        return held + sum(record.size for _, record in self.records.sound())

    # To other names and hosts.

    def depart(self, volume: str, label: str) -> Record:
        """Bring a detached volume to where another host can make it; what that host must keep of it.

        The image goes; the record stays, so that it can be made here again if it was not taken over. One that
        is to be made from a snapshot is made first, for no other host can see that the snapshot is kept. Of
        one that is to be blank nothing is left.
        """
        record = self.records.read(volume)
        if not record.made and not record.origin:
            self.delete(volume)
            return record
        if not record.on_its_way:
            snapshot = self.snapshot(volume, label)
            self.records.change(volume, origin=snapshot, passing=True, made=False)
            with self._lock(volume):
                self.exports.stop(volume)
                self.records.image(volume).unlink(missing_ok=True)
        return self.records.read(volume)

    def rename(self, volume: str, name: str) -> None:
        """Go on with a volume under another name, its lineage as it is."""
        with self._lock(volume), self._lock(name):
            self.exports.stop(volume)
            self.records.rename(volume, name)
            record = self.records.read(name)
            if record.lineage:
                self.own.adopt(record.lineage)  # its image has another path now


def snapshot_under_way(image: Path) -> bool:
    """Whether some process is taking a snapshot of the image."""
    try:
        with ImageLock(image):
            return False
    except NotFoundError:
        return False
    except RefusedError:
        return True
