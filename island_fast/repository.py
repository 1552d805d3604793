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

from island_fast.answer import SnapshotTaken
from island_fast.choosing import Request, choose
from island_fast.errors import DamagedError, RefusedError, UsageError
from island_fast.health import knows_damage
from island_fast.lineage import Lineage
from island_fast.opening import OpenRepository
from island_fast.progress import Progress, silent
from island_fast.source import FULL_SCAN, TABLE_DIFF, Backing, Qcow2Source, RawSource, Source, pinned_lineage
from island_fast.taking import take

if TYPE_CHECKING:
    from island_fast.results import (
        Adopted,
        Copied,
        Deleted,
        Difference,
        DomainTaken,
        ImageInfo,
        Restored,
        Retained,
        Snapshot,
        SnapshotShown,
        Swept,
        Usage,
        Verified,
    )
    from island_fast.retention import Keep

__all__ = ["Repository"]

_LOG = logging.getLogger(__name__)


class Repository(OpenRepository):
    """The verbs on a repository: the Python API.

    Opened by `Repository.open(url)`; a context manager. Not thread-safe.
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

        `volume` names the lineage (default: that of the image's pin, else what this host remembers of the
        file, else the file's stem). `qmp` is the monitor socket of the process that has the image open.
        Without `pin` the image is left untouched and scanned in full; `at` stores an existing internal
        snapshot; `full` scans in full although a table diff would be sound. `backing` lists the image's
        backing files, nearest first, as "qcow2:FILE" or "raw:FILE"; what is stored is the volume as a guest
        sees it, through all of them. `compression` of what is sent is "zstd" or "none".
        """
        if compression not in ("zstd", "none"):
            raise UsageError(f"{compression!r} is no compression; use zstd or none")
        if qmp and (not pin or image_format == "raw"):
            raise UsageError("a volume in use is read through a pin; leave out --no-pin and --format raw")
        path = Path(os.path.realpath(image))
        held: Source
        files = [Backing.parse(text) for text in backing]
        if image_format == "raw":
            if files:
                raise UsageError("a raw image has no backing files; leave out --backing")
            held = RawSource(path)
        else:
            held = Qcow2Source(
                path, Path(qmp) if qmp else None, as_it_is=not pin and at is None, backing=files
            )
        with held as source:
            if at is not None:
                source.named(at)  # before anything is made
            lineage = self._lineage_for(source, volume)
            compress = compression == "zstd"
            facts = dict(properties or {})
            request = Request(self.id, self.state.writer, label, pin, at, full, compress, facts)
            if knows_damage(lineage):
                from island_fast.healing import mend_known

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
        rest is as in `snapshot`; `volume` only for one disk. If some disks cannot be stored, the others are,
        and the error tells which.
        """
        from island_fast.domains import Wish, take_domain

        if compression not in ("zstd", "none"):
            raise UsageError(f"{compression!r} is no compression; use zstd or none")
        wish = Wish(domain, disks, freeze, connect, volume, label, full, compression == "zstd")
        return take_domain(self, self._lineage_for, wish, progress)

    def _lineage_for(self, source: Source, volume: str | None) -> Lineage:
        """The lineage that a snapshot of `source` goes to, refreshed; refused if it is another image's."""
        name = volume
        if name is None and self._id is not None:
            if pinned := self._pinned_lineage(source):
                return pinned
            name = self.state.lineage_of(self.id, source.path)
        lineage = self.lineage(name or source.path.stem)
        self._refresh(lineage)
        if lineage.exists:
            lineage.require_owner(self.state.writer)
            known = lineage.files.image() in (None, str(source.path))
            if not known and not _holds_pin(source, lineage):
                raise RefusedError(
                    f"{self.store.location} already has a volume {lineage.name}, and {source.path} neither "
                    f"has its pin nor is it known as its image; give another name with --volume, or run "
                    f"'island adopt {lineage.name}' if it is that volume"
                )
        return lineage

    def _pinned_lineage(self, source: Source) -> Lineage | None:
        """The lineage, refreshed and owned by this host, that the image holds a valid pin of."""
        pinned = [pinned_lineage(self.id, s.name) for s in reversed(source.internals)]
        for name in dict.fromkeys(filter(None, pinned)):
            lineage = self.lineage(name)
            self._refresh(lineage)
            if lineage.exists and lineage.owner == self.state.writer and _holds_pin(source, lineage):
                return lineage
        return None

    def outlook(
        self, image: str | Path, *, volume: str | None = None, backing: Sequence[str] = ()
    ) -> ImageInfo:
        """What a qcow2 image is, and how the next snapshot of it would find the change, and why."""
        from island_fast.inspecting import image_info

        path = Path(os.path.realpath(image))
        info = image_info(path)
        if self._id is None:
            first = "it is the first snapshot of the volume"
            return replace(info, volume=volume or path.stem, next_rule=FULL_SCAN, next_reason=first)
        files = [Backing.parse(text) for text in backing]
        try:
            with Qcow2Source(path, look_only=True, backing=files) as source:
                lineage = self._lineage_for(source, volume)
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

        A qcow2 without `pin` is as one that was never snapshotted: for a volume of another name.
        """
        from island_fast.packreader import deletion_told
        from island_fast.restoring import Target, restore

        found = self.find(reference)
        with deletion_told(found.lineage, found.row, "restored"):
            manifest = found.lineage.manifest(found.row)
        make = Target(Path(target), image_format, pin)
        return restore(found.lineage, found.row, manifest, make, progress)

    def snapshots(self, volume: str | None = None) -> list[Snapshot]:
        """The live snapshots, oldest first within a volume; all volumes that a listing shows, or one."""
        from island_fast.deleting import describe

        return [
            describe(lineage, row) for lineage in self.lineages(volume) for row in lineage.state.live.values()
        ]

    def show(self, reference: str) -> SnapshotShown:
        """One snapshot, and what deleting it would free."""
        from island_fast.deleting import show

        return show(self.find(reference))

    def delete(self, references: Sequence[str], *, dry_run: bool = False) -> list[Deleted]:
        """Take snapshots out of the catalog, in the order given; all are found before the first goes."""
        from island_fast.deleting import delete

        return delete([self.find(one) for one in references], self.state.writer, dry_run)

    def retain(
        self, keep: Keep, *, volume: str | None = None, dry_run: bool = False, progress: Progress = silent
    ) -> list[Retained]:
        """Delete what `keep` does not keep from `volume`, or from every one that this host owns.

        Each volume is decided for itself. What could not be deleted is told as kept; `left_out` tells why.
        UsageError for a policy without rules, ConflictError if `volume` belongs to another host.
        """
        from island_fast.retaining import retain

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

        One that cannot be swept is passed over: see `left_out`.
        """
        from island_fast.sweeping import sweep

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
        """
        from island_fast.copying import copy

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
        """
        from island_fast import verifying

        files = [Backing.parse(text) for text in backing]
        image = Path(os.path.realpath(against)) if against is not None else None
        request = verifying.Request(self.state.writer, sample, since, image, files, heal)
        return verifying.verify(self, reference, request, progress)

    def diff(self, since: str, reference: str) -> Difference:
        """What may differ in the snapshot `reference` from the snapshot `since` of the same volume."""
        from island_fast.comparing import compare

        before, after = self.find(since), self.find(reference)
        if before.lineage.name != after.lineage.name:
            raise UsageError(
                f"{since} is a snapshot of volume {before.lineage.name} and {reference} one of "
                f"{after.lineage.name}; give two of one volume"
            )
        lineage = after.lineage
        return compare(lineage.manifest(before.row), lineage.manifest(after.row), lineage.numbers)

    def usage(self, volume: str | None = None, *, progress: Progress = silent) -> Usage:
        """What the snapshots take: of `volume`, or of each that a listing shows, and in all.

        A volume whose manifests cannot be read is passed over: see `left_out`.
        """
        from island_fast.measuring import measure, summed

        volumes = []
        for lineage in self.lineages(volume):
            try:
                volumes.append(measure(lineage, progress))
            except (DamagedError, RefusedError) as error:
                if volume is not None:
                    raise
                self.left_out.append(error)
        return summed(volumes)

    def adopt(self, volume: str) -> Adopted:
        """Make this host the owner of `volume`'s lineage; the next snapshot's image becomes its image."""
        from island_fast.results import Adopted

        lineage = self._existing(volume)
        with lineage.locked():
            lineage.adopt(self.state.writer)
            lineage.files.set_image(None)
            return Adopted(volume, len(lineage.state.live), lineage.epoch)


def _holds_pin(source: Source, lineage: Lineage) -> bool:
    """Whether the image holds the pin of a snapshot of the lineage, by its whole identity."""
    pins = [row.pin for row in lineage.state.live.values()]
    for retired in lineage.files.retired():
        manifest = lineage.cached_manifest(retired.snapshot, retired.attempt)
        pins += [manifest.pin] if manifest else []
    return any(source.find(pin) for pin in pins)
