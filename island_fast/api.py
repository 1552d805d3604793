"""The orchestrator: a repository and the verbs on it.

Each verb brings the layers below into their order; the order in which objects become durable (packs,
manifest, record) is in `taking.py`, for sweeps in `sweeping.py`. What a snapshot of an unchanged volume does
not need is imported by the verbs that do: it would cost more time than the snapshot.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from island_fast.errors import DamagedError, RefusedError, UsageError, refuse_one_text
from island_fast.formats.manifest import Manifest
from island_fast.images.backing import Backing
from island_fast.images.open import open_source
from island_fast.images.qcow2_source import Qcow2Source
from island_fast.images.source import FULL_SCAN, TABLE_DIFF
from island_fast.operations.parent import Request, choose
from island_fast.operations.snapshot import take
from island_fast.progress import Progress, silent
from island_fast.repository.health import knows_damage
from island_fast.repository.lineage import Lineage
from island_fast.repository.open import Found, OpenRepository
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


class Repository(OpenRepository):
    """The verbs on a repository: the Python API.

    Opened by `Repository.open(url)`; a context manager. Not thread-safe. Processes and hosts may work on one
    repository at the same time: docs/reliability.md.

    A `reference` names a snapshot as on the command line: an id, an unambiguous beginning of it, VOLUME@ID or
    VOLUME@latest; NotFoundError if there is none, UsageError if it could be several. Sizes are in bytes,
    times in seconds. What verbs answer is in `island_fast.results`.

    Beside what each verb tells, all of them raise StoreError if the store cannot be reached, DamagedError if
    what they need is damaged, RefusedError if going on could lose or mix data, and OSError where the system
    refuses something, such as space. After an error earlier snapshots are as they were. `progress` is called
    from worker threads, too; what it raises ends the work, as an error would.
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
        """Take a snapshot of `image`, a "qcow2" file or a "raw" one or block device; it is never probed.

        It is in the repository when this returns. An error makes none, and what was sent is kept for the next
        try; only after a StoreError in "commit" (see `progress`) it may exist: this host's next call settles
        that. The first one makes a repository that was opened with `create`.

        `volume` names the lineage (default: that of the image's pin, else what this host remembers of the
        file, else the file's stem). `qmp` is the monitor socket of the process that has the image open.
        Without `pin` the image is left untouched and scanned in full; `at` stores an existing internal
        snapshot; `full` scans in full although a table diff would be sound. `backing` lists the image's
        backing files, nearest first, as "qcow2:FILE" or "raw:FILE"; what is stored is the volume as a guest
        sees it, through all of them. `compression` of what is sent is "zstd" or "none". `properties` are
        texts to keep in its manifest.

        UsageError for what does not go together or cannot be a name; NotFoundError without the image, or the
        internal snapshot `at`; ImageInUseError if another process has it open for writing and `qmp` is not
        given; UnsupportedImageError and DamagedImageError for images that are not read; ConflictError if the
        volume belongs to another host; RefusedError if it is known as that of another image, or if a snapshot
        of this image is being taken.
        """
        if compression not in ("zstd", "none"):
            raise UsageError(f"{compression!r} is no compression; use zstd or none")
        if qmp and (not pin or image_format == "raw"):
            raise UsageError("a volume in use is read through a pin; leave out --no-pin and --format raw")
        monitor, unpinned_scan = Path(qmp) if qmp else None, not pin and at is None
        with open_source(
            image, image_format, qmp=monitor, unpinned_scan=unpinned_scan, backing=backing
        ) as source:
            if at is not None:
                source.find_named(at)  # before anything is made
            lineage = self.lineage_for(source, volume)
            compress = compression == "zstd"
            facts = dict(properties or {})
            request = Request(self.id, self.state.writer, label, pin, at, full, compress, facts)
            if knows_damage(lineage):
                from island_fast.operations.heal import mend_known

                mend_known(lineage, source, self.state.writer, progress)
            return take(lineage, source, request, progress)

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
        """Take snapshots of the disks of a running libvirt guest at one moment, each of its own volume.

        `disks` are their names in libvirt, such as "vda"; without, all that the guest may write to, which
        must be qcow2 files. `freeze`: "auto" freezes the guest's file systems if its agent answers, "require"
        fails where that is impossible, "never" does not ask. `connect` is libvirt's URI, of this host. The
        rest is as in `snapshot`; `volume` only for one disk. If some disks cannot be stored, the others are:
        see `left_out`, which tells of a guest that may still be frozen, too. If none can, it is an error.
        """
        from island_fast.operations.domain import Wish, take_domain

        if compression not in ("zstd", "none"):
            raise UsageError(f"{compression!r} is no compression; use zstd or none")
        refuse_one_text(disks, 'disks, such as ["vda"]')
        wish = Wish(domain, disks, freeze, connect, volume, label, full, compression == "zstd")
        return take_domain(self, self.lineage_for, wish, progress)

    def outlook(
        self, image: str | Path, *, volume: str | None = None, backing: Sequence[str] = ()
    ) -> ImageInfo:
        """What a qcow2 image is, and how the next snapshot of it would find the change, and why.

        Nothing is changed. A snapshot that would be refused is no error here: `next_reason` tells why.
        NotFoundError without the image; UnsupportedImageError and DamagedImageError if it cannot be read.
        """
        from island_fast.images.inspect import read_image_info

        path = Path(os.path.realpath(image))
        info = read_image_info(path)
        if self._id is None:
            first = "it is the first snapshot of the volume"
            return replace(info, volume=volume or path.stem, next_rule=FULL_SCAN, next_reason=first)
        files = Backing.parse_all(backing)
        try:
            with Qcow2Source(path, lock=False, backing=files) as source:
                lineage = self.lineage_for(source, volume)
                start = choose(lineage, source, Request(self.id, writer=""))
        except RefusedError as error:  # so would the next snapshot be
            return replace(info, next_reason=str(error))
        return replace(
            info,
            volume=lineage.name,
            pinned_base=start.parent.id if start.parent and start.base else None,
            next_rule=TABLE_DIFF if start.base else FULL_SCAN,
            next_reason=start.why_not or "the pinned base is in the image",
        )

    def restore(
        self,
        reference: str,
        target: str | Path,
        *,
        image_format: str = "qcow2",
        pin: bool = True,
        progress: Progress = silent,
    ) -> Restored:
        """Write a snapshot's volume to `target`, which must not exist, as "qcow2" or "raw".

        It gets its name when it is whole and on disk; nothing is left after an error. A qcow2 holds the
        snapshot's pin, so that its next snapshot is incremental; without `pin` it is as one that was never
        snapshotted: for a volume of another name. Every block is checked against its digest.

        RefusedError if `target` exists; IslandError if it cannot be made; DamagedObjectError, which names the
        object, if a block is lost.
        """
        from island_fast.operations.restore import Target, restore

        found, manifest = self._to_restore(reference)
        make = Target(Path(target), image_format, pin)
        return restore(found.lineage, found.row, manifest, make, progress)

    def restore_onto(
        self,
        reference: str,
        target: str | Path,
        *,
        image_format: str = "qcow2",
        dry_run: bool = False,
        progress: Progress = silent,
    ) -> RestoredOnto:
        """Make `target`, a "qcow2" or "raw" image or a block device that is there, a snapshot's volume.

        Only blocks that differ, by their digests, are fetched and written. What the target has behind the
        volume's end becomes zero; a smaller one, or one in use, is a RefusedError. Internal snapshots in it
        stay as they are. If it ends early the target is partly what it was: the same call goes on,
        by the snapshot's id, for "latest" may name another by then.
        """
        from island_fast.images.target import open_target
        from island_fast.operations.restore import overwrite

        found, manifest = self._to_restore(reference)
        path = Path(os.path.realpath(target))
        was_raw = manifest.properties.get("format") == "raw"
        with open_target(
            path, image_format, manifest.volume_size, read_only=dry_run, was_raw=was_raw
        ) as existing:
            return overwrite(found, manifest, existing, dry_run, progress)

    def _to_restore(self, reference: str) -> tuple[Found, Manifest]:
        """A snapshot and its manifest."""
        from island_fast.repository.lineage import deletion_told

        found = self.find(reference)
        with deletion_told(found.lineage, found.row, "restored"):
            return found, found.lineage.manifest(found.row)

    def snapshots(self, volume: str | None = None) -> list[Snapshot]:
        """The live snapshots, oldest first within a volume; all volumes that a listing shows, or one.

        NotFoundError if `volume` has none. Of all, volumes that cannot be read are passed over: see
        `left_out`.
        """
        from island_fast.operations.show import describe

        return [
            describe(lineage, row) for lineage in self.lineages(volume) for row in lineage.state.live.values()
        ]

    def show(self, reference: str) -> SnapshotShown:
        """One snapshot, and what deleting it would free. Nothing is changed."""
        from island_fast.operations.show import show

        return show(self.find(reference))

    def delete(self, references: Sequence[str], *, dry_run: bool = False) -> list[Deleted]:
        """Take snapshots out of the catalog, in the order given; all are found before the first goes.

        All others stay whole; the space is freed by the next `sweep`. With `dry_run` nothing is changed.
        ConflictError if the volume belongs to another host; RefusedError if a snapshot or copy that is under
        way is based on one.
        """
        from island_fast.operations.delete import delete

        refuse_one_text(references, _LIST)
        return delete([self.find(one) for one in references], self.state.writer, dry_run)

    def retain(
        self, keep: Keep, *, volume: str | None = None, dry_run: bool = False, progress: Progress = silent
    ) -> list[Retained]:
        """Delete what `keep` does not keep from `volume`, or from every one that this host owns.

        Each volume is decided for itself. What could not be deleted is told as kept; `left_out` tells why.
        UsageError for a policy without rules, ConflictError if `volume` belongs to another host.
        """
        from island_fast.operations.retain import retain

        if not keep:
            raise UsageError("no rule would keep a snapshot; give at least one, such as --keep-daily 7")
        answers, others = [], []
        for lineage in self.lineages(volume):
            if volume is None and lineage.owner != self.state.writer:
                others.append(lineage.name)
                continue
            try:
                retained, errors = retain(lineage, self.state.writer, keep, dry_run, progress)
            except (DamagedError, RefusedError) as error:
                if volume is not None:
                    raise
                self.left_out.append(error)
            else:
                answers.append(retained)
                self.left_out += errors
        if others:
            _LOG.warning("left out, for other hosts own them: %s", ", ".join(others))
        return answers

    def sweep(
        self, *, grace: float | None = None, dry_run: bool = False, progress: Progress = silent
    ) -> list[Swept]:
        """Remove what no snapshot needs from every lineage that this host owns.

        What is younger than `grace` seconds, by the store's clock, stays (default: 24 hours in Swift, 0 in a
        directory); less than the default is safe only if nothing else uses the repository now. With `dry_run`
        nothing is changed. A lineage that cannot be swept is passed over: see `left_out`.
        """
        from island_fast.operations.sweep import sweep

        grace = self.store.grace if grace is None else grace
        answers = []
        for lineage in self.lineages():
            try:
                if lineage.owner == self.state.writer:
                    answers.append(sweep(lineage, self.state.writer, grace, dry_run, progress))
            except (DamagedError, RefusedError) as error:
                self.left_out.append(error)
        return answers

    def copy(
        self,
        to: OpenRepository,
        references: Sequence[str] | None = None,
        *,
        volume: str | None = None,
        progress: Progress = silent,
    ) -> list[Copied]:
        """Copy snapshots to the repository `to`, opened with `create`: the named ones, or all (of `volume`).

        They keep their ids, and their parents as far as those are there; what is there already is not sent
        again. This host must own the volumes there. A snapshot that cannot be copied is passed over, and when
        all volumes are meant a volume, too: see `left_out`.

        ConflictError if another host owns a volume there; RefusedError if `to` is this repository, or has a
        volume of that name that is another one.
        """
        from island_fast.operations.copy import copy

        refuse_one_text(references, _LIST)
        chosen: dict[str, tuple[Lineage, set[str]]] = {}
        if references is None:
            chosen = {one.name: (one, set(one.state.live)) for one in self.lineages(volume)}
        else:
            for found in map(self.find, references):
                chosen.setdefault(found.lineage.name, (found.lineage, set()))[1].add(found.row.id)
        every = references is None and volume is None
        self.left_out = self.left_out if every else []
        answers: list[Copied] = []
        for lineage, wanted in (one for one in chosen.values() if one[1]):
            self._check_other(to)
            try:
                copied, errors = copy(lineage, to.lineage(lineage.name), wanted, self.state.writer, progress)
            except (DamagedError, RefusedError) as error:
                if not every:
                    raise
                errors, copied = [error], []
            answers += copied
            self.left_out += errors
        return answers

    def _check_other(self, to: OpenRepository) -> None:
        """Refuse what has this repository's id: local state would take the one for the other."""
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
        """Whether what a snapshot, or every one, needs is there and as it was written; damage is no error.

        Packs are looked for by name and size. Read whole, every block against its digest, are those that this
        host did not for `since` seconds, up to `sample`, a fraction, of all bytes; what was not read for the
        longest comes first. `against` is an image that holds the snapshot's pin, with its `backing` files:
        the two are compared. With `heal`, what is damaged is mended where the same bytes are still to be had.
        Volumes that this version cannot read are passed over: see `left_out`.

        UsageError for `against` without a `reference`, or a `sample` that is no fraction; NotFoundError if
        the image does not hold the pin.
        """
        from island_fast.operations import verify

        if sample is not None and not 0 < sample <= 1:
            raise UsageError(f"{sample} is no share; give a fraction above 0, and at most 1")
        files = Backing.parse_all(backing)
        image = Path(os.path.realpath(against)) if against is not None else None
        request = verify.Request(self.state.writer, sample, since, image, files, heal)
        return verify.verify(self, reference, request, progress)

    def diff(self, since: str, reference: str) -> Difference:
        """What may differ in the snapshot `reference` from the snapshot `since` of the same volume.

        Either may be the older one. Told from manifests: no data is read. UsageError for two volumes.
        """
        from island_fast.operations.diff import diff_snapshots

        before, after = self.find(since), self.find(reference)
        if before.lineage.name != after.lineage.name:
            raise UsageError(
                f"{since} is a snapshot of volume {before.lineage.name} and {reference} one of "
                f"{after.lineage.name}; give two of one volume"
            )
        lineage = after.lineage
        return diff_snapshots(lineage.manifest(before.row), lineage.manifest(after.row), lineage.numbers)

    def usage(self, volume: str | None = None, *, progress: Progress = silent) -> Usage:
        """What the snapshots take: of `volume`, or of each that a listing shows, and in all.

        Told from catalogs and manifests: no data is read. A volume whose manifests cannot be read is passed
        over, when all are meant: see `left_out`.
        """
        from island_fast.operations.usage import add_up, measure_usage

        volumes = []
        for lineage in self.lineages(volume):
            try:
                volumes.append(measure_usage(lineage, progress))
            except (DamagedError, RefusedError) as error:
                if volume is not None:
                    raise
                self.left_out.append(error)
        return add_up(volumes)

    def adopt(self, volume: str) -> Adopted:
        """Make this host the owner of `volume`'s lineage; the next snapshot's image becomes its image.

        Its former owner's next record fails (ConflictError there). NotFoundError if there is no such volume.
        """
        from island_fast.results import Adopted

        lineage = self._existing(volume)
        with lineage.locked():
            lineage.adopt(self.state.writer)
            lineage.files.set_image(None)
            return Adopted(volume, len(lineage.state.live), lineage.epoch)
