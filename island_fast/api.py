"""The Python API: a repository, with one method for each verb.

The methods check their arguments, find the lineages and call `operations/`, where the work is done. They
import what they need themselves, except for what the snapshot of an unchanged volume needs: importing the
rest would take longer than that snapshot.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from island_fast.errors import (
    AccessDeniedError,
    ConflictError,
    DamagedError,
    RefusedError,
    UsageError,
    refuse_one_text,
)
from island_fast.images.backing import Backing
from island_fast.images.open import open_source
from island_fast.images.pins import pinned_snapshot
from island_fast.images.qcow2_source import Qcow2Source
from island_fast.images.source import FULL_SCAN, TABLE_DIFF
from island_fast.operations.parent import ParentChoice, SnapshotRequest, choose_parent, lineage_for_image
from island_fast.operations.snapshot import take_snapshot
from island_fast.progress import Progress, silent
from island_fast.repository.health import has_known_damage
from island_fast.repository.lineage import Lineage
from island_fast.repository.open import RepositoryBase
from island_fast.results_base import SnapshotTaken

if TYPE_CHECKING:
    from island_fast.operations.retain import Keep
    from island_fast.results import (
        Adopted,
        Copied,
        Deleted,
        Difference,
        DomainTaken,
        ImageInfo,
        Marked,
        Restored,
        RestoredOnto,
        Retained,
        Snapshot,
        SnapshotShown,
        Swept,
        Usage,
        Verified,
    )

__all__ = ["Repository"]

_LIST = "snapshots, such as [reference]"
_LOG = logging.getLogger(__name__)


class Repository(RepositoryBase):
    """A repository and the verbs on it: the Python API.

    `Repository.open(url)` opens one. It is a context manager, and not thread-safe. Several processes and
    hosts can work on one repository at the same time: docs/reliability.md.

    A `reference` names a snapshot as on the command line: an id, an unambiguous beginning of one, VOLUME@ID,
    VOLUME@latest or VOLUME@label:TEXT. NotFoundError if there is no such snapshot, UsageError if several
    match. Sizes are in bytes, times in seconds. The methods return the classes of `island_fast.results`.

    Besides the errors that each method lists, all of them raise StoreError if the store cannot be reached,
    DamagedError if something that they need is damaged, RefusedError if continuing could lose or mix up data,
    and OSError if the operating system refuses something, such as space. An error leaves earlier snapshots as
    they were. `progress` is also called from worker threads; an exception that it raises ends the work and
    reaches the caller.
    """

    def snapshot(
        self,
        image: str | Path,
        *,
        volume: str | None = None,
        label: str = "",
        qmp: str | Path | None = None,
        pin: bool = True,
        at: str | None = None,
        full: bool = False,
        image_format: str = "qcow2",
        backing: Sequence[str] = (),
        compression: str = "zstd",
        properties: Mapping[str, str] | None = None,
        progress: Progress = silent,
    ) -> SnapshotTaken:
        """Take a snapshot of `image`: a qcow2 file, or a raw file or block device; see `image_format`.

        The snapshot is in the repository when this returns. After an error there is no snapshot, and what was
        sent is kept for the next attempt. The exception is a StoreError in phase "commit" (see `progress`):
        the snapshot may exist then, and this host's next call settles it. The first snapshot creates a
        repository that was opened with `create`.

        `volume` names the volume (default: the one that the image's pin names, otherwise the one that this
        host remembers for the file, otherwise the file's name without its suffix). `qmp` is the monitor
        socket of the process that has the image open. Without `pin`, the image is left untouched and scanned
        in full. `at` names an existing internal snapshot to store. `full` scans in full even if a table diff
        would be sound. `image_format` is "qcow2" or "raw"; the format is never guessed. `backing` lists the
        image's backing files, nearest first, as "qcow2:FILE" or "raw:FILE"; the volume is stored as a guest
        sees it, through all of them. `compression` of what is sent is "zstd" or "none". `properties` are
        texts to keep in the manifest.

        UsageError for arguments that contradict each other, or a volume name that is not valid; NotFoundError
        if the image, or its internal snapshot `at`, does not exist; ImageInUseError if another process has
        the image open for writing and `qmp` is not given; UnsupportedImageError or DamagedImageError if the
        image cannot be read; ConflictError if another host owns the volume; RefusedError if the volume
        belongs to another image, or a snapshot of this image is in progress.
        """
        compress = _is_compressed(compression)
        if qmp and (not pin or image_format == "raw"):
            raise UsageError("a volume in use is read through a pin; leave out --no-pin and --format raw")
        monitor, unpinned_scan = Path(qmp) if qmp else None, not pin and at is None
        with open_source(
            image, image_format, qmp=monitor, unpinned_scan=unpinned_scan, backing=backing
        ) as source:
            if at is not None:
                source.find_named(at)  # before anything is made
            lineage = lineage_for_image(self, source, volume)
            self.remember()
            facts = dict(properties or {})
            request = SnapshotRequest(self.id, label, pin, at, full, compress, facts)
            if has_known_damage(lineage):
                from island_fast.operations.heal import heal_known_damage

                heal_known_damage(lineage, source, progress)
            return take_snapshot(lineage, source, request, progress)

    def snapshot_domain(
        self,
        domain: str,
        *,
        disks: Sequence[str] = (),
        freeze: str = "auto",
        connect: str | None = None,
        volume: str | None = None,
        label: str = "",
        full: bool = False,
        compression: str = "zstd",
        progress: Progress = silent,
    ) -> DomainTaken:
        """Take snapshots of the disks of a running libvirt guest at one moment, one for each disk's volume.

        `disks` are names of disks in libvirt, such as "vda" (default: all that the guest can write to). Their
        images must be qcow2 files. `freeze`: "auto" freezes the guest's file systems if its agent answers,
        "require" fails if they cannot be frozen, "never" does not try. `connect` is the URI of libvirt on
        this host. `volume` is allowed for a single disk only; the other parameters are as in `snapshot`.

        If some disks cannot be stored, the others are, and `left_out` holds an error for each that is
        missing, and one if the guest may still be frozen. If no disk can be stored, that is an error.
        """
        from island_fast.operations.snapshot_domain import DomainRequest, snapshot_domain

        compress = _is_compressed(compression)
        refuse_one_text(disks, 'disks, such as ["vda"]')
        request = DomainRequest(domain, disks, freeze, connect, volume, label, full, compress)
        return snapshot_domain(self, request, progress)

    def outlook(
        self, image: str | Path, *, volume: str | None = None, backing: Sequence[str] = ()
    ) -> ImageInfo:
        """Describe a qcow2 image, and how its next snapshot would find what changed, and why in that way.

        Nothing is changed. If the next snapshot would be refused, that is not an error: `next_reason` gives
        the reason. NotFoundError if the image does not exist; UnsupportedImageError or DamagedImageError if
        it cannot be read.
        """
        from island_fast.images.inspect import read_image_info

        path = Path(os.path.realpath(image))
        info = replace(read_image_info(path), refuses_overwrites=self.refuses_overwrites)
        if not self.exists:
            first = "it is the first snapshot of the volume"
            return replace(info, volume=volume or path.stem, next_rule=FULL_SCAN, next_reason=first)
        files = Backing.parse_all(backing)
        try:
            with Qcow2Source(path, lock=False, backing=files) as source:
                lineage = lineage_for_image(self, source, volume)
                choice = choose_parent(lineage, source, SnapshotRequest(self.id))
        except RefusedError as error:  # the next snapshot would be refused, too
            return replace(info, next_reason=str(error))
        return replace(
            info,
            volume=lineage.name,
            pinned_base=pinned_snapshot(choice.base.internal.name) if choice.base else None,
            next_rule=TABLE_DIFF if choice.base else FULL_SCAN,
            next_reason=choice.why_not or _describe_base(choice),
        )

    def restore(
        self,
        reference: str,
        target: str | Path,
        *,
        image_format: str = "qcow2",
        pin: bool = True,
        salvage: bool = False,
        progress: Progress = silent,
    ) -> Restored:
        """Write a snapshot's volume to a new file `target`, as "qcow2" or "raw".

        The file gets its name when it is complete and on disk; an error leaves no file. A qcow2 file holds
        the snapshot's pin, so that its next snapshot is incremental. Without `pin` it has no history: use
        that for a copy that becomes a volume of another name. Every block is checked against its digest.

        With `salvage`, a block that is lost is no error: it is zero in the file, and listed in the answer,
        which is a `Salvaged`. Such a file never holds a pin, because it need not be the volume.

        RefusedError if `target` exists; IslandError if it cannot be created; DamagedObjectError, which names
        the object, if a block is lost, or with `salvage` if the manifest says no more where blocks are.
        """
        from island_fast.operations.restore import RestoreTarget, restore, restore_salvaged

        found = self.find(reference)
        with found.lineage.deletion_explained(found.row, "restored"):
            if salvage:
                return restore_salvaged(found, Path(target), image_format, progress)
            manifest = found.lineage.manifest(found.row)
            return restore(found, manifest, RestoreTarget(Path(target), image_format, pin), progress)

    def restore_onto(
        self,
        reference: str,
        target: str | Path,
        *,
        image_format: str = "qcow2",
        dry_run: bool = False,
        progress: Progress = silent,
    ) -> RestoredOnto:
        """Turn `target`, an existing "qcow2" or "raw" image or block device, into a snapshot's volume.

        Only blocks whose digests differ are fetched and written. Anything past the end of the volume is
        zeroed. Internal snapshots in the target stay as they are. With `dry_run` nothing is changed. If
        interrupted, the target is a mix of old and new: the same call resumes it, given the snapshot's id,
        because "latest" can name another snapshot by then.

        NotFoundError if the target does not exist; RefusedError if it is smaller than the volume, or in use
        by another process.
        """
        from island_fast.images.target import open_target
        from island_fast.operations.restore import restore_onto

        found = self.find(reference)
        path = Path(os.path.realpath(target))
        with found.lineage.deletion_explained(found.row, "restored"):
            manifest = found.lineage.manifest(found.row)
            was_raw = manifest.properties.get("format") == "raw"
            with open_target(
                path, image_format, manifest.volume_size, read_only=dry_run, was_raw=was_raw
            ) as existing:
                return restore_onto(found, manifest, existing, dry_run, progress)

    def snapshots(self, volume: str | None = None) -> list[Snapshot]:
        """Return the snapshots of all volumes, or of `volume`; within a volume the oldest first.

        NotFoundError if `volume` has no snapshots. If all volumes are meant, those that cannot be read are
        skipped: see `left_out`.
        """
        from island_fast.operations.show import snapshot_info

        return [
            snapshot_info(lineage, row)
            for lineage in self.lineages(volume)
            for row in lineage.state.live.values()
        ]

    def show(self, reference: str) -> SnapshotShown:
        """Return one snapshot, and what deleting it would free. Nothing is changed."""
        from island_fast.operations.show import show

        return show(self.find(reference))

    def delete(self, references: Sequence[str], *, dry_run: bool = False) -> list[Deleted]:
        """Delete snapshots from the catalog, in the order given.

        Nothing is deleted unless all references are found. All other snapshots stay complete. The next
        `sweep` frees the space. With `dry_run` nothing is changed.

        After a StoreRefusedError, the snapshot at which it ended was not deleted; after another StoreError
        that is unknown. The same call can be repeated within a day: it reports what was deleted before, and
        VOLUME@latest does not come to mean the next snapshot. ConflictError if another host owns the volume;
        RefusedError if a snapshot or copy in progress is based on one of them.
        """
        from island_fast.operations.delete import delete

        refuse_one_text(references, _LIST)
        return delete(self, references, dry_run)

    def keep(self, references: Sequence[str], *, release: bool = False) -> list[Marked]:
        """Mark snapshots that must not be deleted, or with `release` remove their marks.

        `delete` refuses a marked snapshot, and `retain` keeps it whatever its rules say. Nothing is marked
        unless all references are found. ConflictError if another host owns a volume.
        """
        from island_fast.operations.keep import keep

        refuse_one_text(references, _LIST)
        return keep(self.find_all(references), release=release)

    def retain(
        self, keep: Keep, *, volume: str | None = None, dry_run: bool = False, progress: Progress = silent
    ) -> list[Retained]:
        """Delete the snapshots that no rule of `keep` keeps, of `volume` or of all volumes of this host.

        The rules apply to each volume separately. With `dry_run` nothing is changed. A snapshot that could
        not be deleted counts as kept, and `left_out` holds the reason; so it does for a volume that cannot be
        read. UsageError if `keep` has no rules; ConflictError if another host owns `volume`, or other hosts
        own all volumes.
        """
        from island_fast.operations.retain import retain

        if not keep:
            raise UsageError("no rule is given that keeps a snapshot; give one, such as --keep-daily 7")
        answers, others = [], []
        for lineage in self.lineages(volume):
            if volume is None and not lineage.owned_here:
                others.append(lineage.name)
                continue
            with self._skip_if_unusable(volume is None):
                retained, errors = retain(lineage, keep, dry_run, progress)
                answers.append(retained)
                self.left_out += errors
        self._refuse_if_all_are_others(others, bool(answers))
        if others:
            _LOG.warning("skipped, because another host owns them: %s", ", ".join(others))
        return answers

    def sweep(
        self,
        *,
        grace: float | None = None,
        unknown: bool = False,
        dry_run: bool = False,
        progress: Progress = silent,
    ) -> list[Swept]:
        """Remove the objects that no snapshot needs, from all volumes that this host owns.

        Objects younger than `grace` seconds, by the store's clock, stay (default: 24 hours in Swift, 0 in a
        directory). A shorter grace is safe only if nothing else uses the repository meanwhile. What no record
        names is removed only if this host stored it, or an earlier record named it; the rest is counted, and
        stays unless `unknown` is true: a former owner can have left it, and so can anybody else. With
        `dry_run` nothing is changed. A volume that cannot be swept is skipped: see `left_out`, which also
        holds an error for a volume with packs that could not be rewritten for want of room. ConflictError if
        other hosts own all volumes.
        """
        from island_fast.operations.sweep import sweep

        grace = self.store.grace if grace is None else grace
        answers, others = [], []
        for lineage in self.lineages():
            if not lineage.owned_here:
                others.append(lineage.name)
                continue
            with self._skip_if_unusable():
                swept, errors = sweep(lineage, grace, dry_run, unknown, progress)
                answers.append(swept)
                self.left_out += errors
        self._refuse_if_all_are_others(others, bool(answers))
        return answers

    def _refuse_if_all_are_others(self, others: Sequence[str], worked: bool) -> None:
        """Raise ConflictError if other hosts own all volumes: a timer may run on the wrong host."""
        if others and not worked and not self.left_out:
            raise ConflictError(
                f"nothing was done in {self.store.location}, because other hosts or users own its volumes "
                f"({', '.join(others)}); run it there, or if that host is gone, run "
                f"'island adopt {others[0]}' here"
            )

    def copy(
        self,
        to: Repository,
        references: Sequence[str] | None = None,
        *,
        volume: str | None = None,
        progress: Progress = silent,
    ) -> list[Copied]:
        """Copy snapshots to the repository `to`, opened with `create`: those named, or all (of `volume`).

        Copies keep their ids, and their parents as far as those are in `to`. What `to` holds already is not
        sent again. Of all snapshots, those stay away that were deleted in `to`, as retention does there; one
        that is named is copied again. This host must own the volumes in `to`. A snapshot that cannot be
        copied is skipped, and if all volumes are meant, so is a volume: see `left_out`.

        ConflictError if another host owns a volume in `to`; RefusedError if `to` is this repository, or holds
        a different volume of the same name.
        """
        from island_fast.operations.copy import copy

        refuse_one_text(references, _LIST)
        chosen: dict[str, tuple[Lineage, set[str]]] = {}
        if references is None:
            chosen = {one.name: (one, set(one.state.live)) for one in self.lineages(volume)}
        else:
            for found in self.find_all(references):
                chosen.setdefault(found.lineage.name, (found.lineage, set()))[1].add(found.row.id)
        every = references is None and volume is None
        self.left_out = self.left_out if every else []
        answers: list[Copied] = []
        for lineage, wanted in (one for one in chosen.values() if one[1]):
            self._refuse_same(to)
            to.remember()
            with self._skip_if_unusable(every):
                named = wanted if references is not None else None
                copied, errors = copy(lineage, to.lineage(lineage.name), named, progress)
                answers += copied
                self.left_out += errors
        return answers

    def _refuse_same(self, to: Repository) -> None:
        """Raise RefusedError if `to` has this repository's id: local state could not tell them apart."""
        if to.id == self.id:
            raise RefusedError(
                f"{to.store.location} is the same repository as {self.store.location}, or was copied from it "
                "file by file; give another place"
            )

    def verify(
        self,
        reference: str | None = None,
        *,
        sample: float | None = None,
        since: float | None = None,
        against: str | Path | None = None,
        backing: Sequence[str] = (),
        heal: bool = False,
        progress: Progress = silent,
    ) -> Verified:
        """Check that all objects of a snapshot, or of all snapshots, exist and are undamaged.

        Damage is part of the answer, not an error. Every object is checked by name and size. With `sample` or
        `since`, objects are also read in full, and every block is checked against its digest: those that this
        host has not read for `since` seconds, up to the fraction `sample` of all bytes, starting with what
        has gone unread for longest. `against` is an image that holds the snapshot's pin, with its `backing`
        files: the snapshot is compared with the pin. With `heal`, damaged objects are repaired wherever an
        intact copy of the data exists. Volumes that this version cannot read are skipped: see `left_out`.

        UsageError for `against` without a `reference`, or a `sample` that is not in (0, 1]; NotFoundError if
        the image does not hold the pin.
        """
        from island_fast.operations.verify import VerifyRequest, verify

        if sample is not None and not 0 < sample <= 1:
            raise UsageError(f"{sample} is not a valid share; give a fraction above 0 and up to 1")
        files = Backing.parse_all(backing)
        image = Path(os.path.realpath(against)) if against is not None else None
        request = VerifyRequest(sample, since, image, files, heal)
        return verify(self, reference, request, progress)

    def diff(self, since: str, reference: str) -> Difference:
        """Return what can differ in the snapshot `reference` from the snapshot `since` of the same volume.

        Either can be the older one. Only the two manifests are read, no data. UsageError if the snapshots are
        of different volumes.
        """
        from island_fast.operations.diff import diff_snapshots

        before, after = self.find_all([since, reference])
        if before.lineage.name != after.lineage.name:
            raise UsageError(
                f"{since} is a snapshot of volume {before.lineage.name} and {reference} one of "
                f"{after.lineage.name}; give two snapshots of one volume"
            )
        lineage = after.lineage
        return diff_snapshots(lineage.manifest(before.row), lineage.manifest(after.row), lineage.numbers)

    def usage(self, volume: str | None = None, *, progress: Progress = silent) -> Usage:
        """Return how much data the snapshots of all volumes, or of `volume`, hold, and the space they use.

        Only catalogs and manifests are read, no data. If all volumes are meant, those that cannot be read are
        skipped: see `left_out`.
        """
        from island_fast.operations.usage import add_up, measure_usage

        volumes = []
        for lineage in self.lineages(volume):
            with self._skip_if_unusable(volume is None):
                volumes.append(measure_usage(lineage, progress))
        return add_up(volumes)

    def adopt(self, volume: str) -> Adopted:
        """Make this host the owner of `volume`; the image of its next snapshot becomes the volume's image.

        The former owner's next change fails there with a ConflictError. NotFoundError if there is no such
        volume; DamagedError, with nothing changed, if the store does not hold what this host knows of the
        catalog, or does not give what its listing shows.
        """
        from island_fast.results import Adopted

        lineage = self.existing_lineage(volume)
        lineage.require_standing()  # before anything is given up
        with lineage.hold_lock(give_up=True):
            lineage.require_standing()
            lineage.adopt()
            lineage.files.set_image(None)
            self.remember()
            return Adopted(volume, len(lineage.state.live), lineage.epoch)

    @contextmanager
    def _skip_if_unusable(self, skip: bool = True) -> Iterator[None]:
        """Run the body for one of several volumes; with `skip`, add what concerns it alone to `left_out`."""
        try:
            yield
        except (DamagedError, RefusedError, AccessDeniedError) as error:
            if not skip:
                raise
            self.left_out.append(error)


def _is_compressed(compression: str) -> bool:
    """Return whether `compression` asks for any; UsageError unless it is "zstd" or "none"."""
    if compression not in ("zstd", "none"):
        raise UsageError(f"{compression!r} is not a compression; use zstd or none")
    return compression == "zstd"


def _describe_base(choice: ParentChoice) -> str:
    """Return whose pin the image holds: the parent's, or that of a snapshot that was deleted since."""
    pinned = pinned_snapshot(choice.base.internal.name) if choice.base else None
    if choice.parent is not None and pinned != choice.parent.id:
        return f"the pinned base is in the image; its snapshot was deleted, the parent is {choice.parent.id}"
    return "the pinned base is in the image"
