"""Volumes, files and snapshots that exist without Cinder, and that Cinder can take over ("manage").

A reference is one of

    {"source-name": NAME}                               a volume that was unmanaged
    {"source-name": FILE}                               a qcow2 file in the folder of volumes
    {"source-name": LINEAGE@SNAPSHOT}                   a snapshot in the host's own repository
    {"source-name": LINEAGE@SNAPSHOT, "repository": R}  one in the repository called R in cinder.conf

A file becomes an image in three steps: it gets a second name, that of the image; the volume gets its record;
the first name goes. Where files cannot have two names, it is renamed, and an image without a record is given
one later. If that is cut off anywhere, the file can be managed again, as the same volume or as
another one. There is never more than one volume with the same file.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from island_fast.cinder.images import volume_size
from island_fast.cinder.records import VOLUME_PATTERN, SnapshotRef, VolumeRecord
from island_fast.cinder.volumes import Volumes
from island_fast.errors import IslandError, NotFoundError, RefusedError, UsageError
from island_fast.files import link_new, sync_folder
from island_fast.qcow2.image import Image
from island_fast.qemu.image_lock import writer_present
from island_fast.qemu.open_files import refuse_held

__all__ = ["ManageableVolumes"]

_GIB = 1 << 30


class ManageableVolumes:
    """What a host's volumes and repositories hold, by reference. Sizes are in GiB, rounded up.

    `is_managed` returns whether Cinder has a volume of this name; such a volume is left alone.
    """

    def __init__(self, volumes: Volumes, is_managed: Callable[[str], bool] = lambda _: False) -> None:
        self._volumes = volumes
        self._is_managed = is_managed

    def parse_snapshot(self, reference: Mapping[str, str]) -> SnapshotRef:
        """Return the snapshot that a reference names; raise UsageError if it does not name one."""
        repository, name = reference.get("repository", ""), _source_name(reference)
        return SnapshotRef.parse(f"{repository}:{name}" if repository else name)

    def snapshot_size(self, reference: Mapping[str, str]) -> int:
        """Return the size of a snapshot's volume; raise NotFoundError if the snapshot does not exist."""
        snapshot = self.parse_snapshot(reference)
        return _to_gib(self._volumes.repository_of(snapshot).volume_size(snapshot))

    def size(self, reference: Mapping[str, str]) -> int:
        """Return the size of what a reference names."""
        name = _source_name(reference)
        if "@" in name:
            return self.snapshot_size(reference)
        records = self._local_records()
        return _to_gib(records[name].size if name in records else volume_size(self._check_file(name)))

    def manage(self, volume: str, reference: Mapping[str, str]) -> None:
        """Make `volume` of what a reference names; its size becomes a whole number of GiB."""
        name = _source_name(reference)
        if "@" in name:
            snapshot = self.parse_snapshot(reference)
            record = VolumeRecord(self.snapshot_size(reference) * _GIB, origin=snapshot)
            self._volumes.create(volume, record, at_once=True)
            return
        with self._volumes.hold_reference(name):
            self._manage_local(volume, name, reference)

    def _manage_local(self, volume: str, name: str, reference: Mapping[str, str]) -> None:
        """Make `volume` of another volume or a file; the caller holds the reference's lock."""
        self._volumes.record_lone_images()
        records = self._local_records()
        if volume in records and name not in records and not (self._volumes.records.folder / name).exists():
            size = _to_gib(records[volume].size) * _GIB  # an earlier call came this far
        else:
            size = self.size(reference) * _GIB
            self._take_over(name, volume)
        self._volumes.extend(volume, size)

    def _take_over(self, name: str, volume: str) -> None:
        """Give an unmanaged volume, or a file that is made one first, the name `volume`."""
        if name not in self._local_records():
            name = self._import_file(self._check_file(name), volume)
        if name == volume:
            return
        if self._is_managed(name):
            raise RefusedError(f"Cinder manages volume {name} already; unmanage it first")
        self._volumes.rename(name, volume)

    def _local_records(self) -> dict[str, VolumeRecord]:
        """Return the host's volumes, except those in transit: another host may have taken them over."""
        return {
            name: record for name, record in self._volumes.records.read_undamaged() if not record.in_transit
        }

    def _check_file(self, name: str) -> Path:
        """Return the path of a file in the folder of volumes, if it can become the image of a volume.

        Raises NotFoundError if there is no such file, RefusedError if it is open elsewhere or not usable.
        """
        path = self._volumes.records.folder / name
        if not VOLUME_PATTERN.fullmatch(name) or not path.is_file():
            raise NotFoundError(f"there is no volume or qcow2 file {name!r} in {path.parent}")
        found = path.lstat()
        names = 1 if self._find_import(found) is None else 2
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != names or found.st_uid != os.geteuid():
            raise RefusedError(f"{path} must be a regular file of this service's user, with no other name")
        with Image.open(path) as image:
            if image.header.version < 3:
                raise RefusedError(f"{path} has qcow2 version 2; run 'qemu-img amend -o compat=1.1' on it")
            if writer_present(image.fd):
                raise RefusedError(f"{path} is open for writing in another process; end that process first")
            refuse_held(path, image.fd, to_write=True)
        return path

    def _find_import(self, file: os.stat_result) -> str | None:
        """Return the volume whose image is this file, because an earlier import of it was cut off."""
        records = self._volumes.records
        for entry in records.folder.iterdir():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, UsageError):
                if os.path.samestat(records.image_path(entry.name).lstat(), file):
                    return entry.name
        return None

    def _import_file(self, file: Path, volume: str) -> str:
        """Make a file the image of a volume, and return the volume's name.

        That is `volume`, unless an earlier import of the file got as far as the record of another volume.
        """
        records = self._volumes.records
        size = volume_size(file)
        begun = self._find_import(file.lstat())
        if begun is not None and begun not in (volume, *records.volumes()):
            records.remove(begun)  # it has no record yet, so this removes only a second name of the file
            begun = None
        if begun is None:
            records.create_folder(volume)
            os.chmod(file, 0o600)
            if not link_new(str(file), str(records.image_path(volume))):
                raise RefusedError(f"volume {volume} has an image already")
        name = begun or volume
        if name not in records.volumes():
            records.write(name, VolumeRecord(size, made=True))
        file.unlink(missing_ok=True)
        sync_folder(records.folder)
        return name

    def list_volumes(self, known: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return the host's volumes and loose qcow2 files as entries of Cinder's list of manageable volumes.

        `known` are the volumes that Cinder has, from name to id.
        """
        self._volumes.record_lone_images()
        entries = []
        for name, record in self._local_records().items():
            reason = "already managed" if name in known else None
            entries.append(_make_entry(name, record.size, reason, known.get(name)))
        for path in sorted(self._volumes.records.folder.glob("*.qcow2")):
            try:
                entries.append(_make_entry(path.name, volume_size(self._check_file(path.name)), None, None))
            except IslandError as error:
                entries.append(_make_entry(path.name, 0, str(error), None))
        return entries

    def list_snapshots(self, known: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return the snapshots of the host's volumes as entries of Cinder's list of manageable snapshots.

        `known` are the snapshots that Cinder has, from the text of a `SnapshotRef` to Cinder's id.
        """
        volumes = {
            record.lineage: name for name, record in self._volumes.records.read_undamaged() if record.lineage
        }
        entries = []
        for row in self._volumes.own_repository.list_snapshots():
            if row["lineage"] in volumes:
                snapshot = str(SnapshotRef(row["lineage"], row["snapshot"]))
                reason = "already managed" if snapshot in known else None
                entry = _make_entry(snapshot, row["volume_size"], reason, known.get(snapshot))
                entries.append(entry | {"source_reference": {"source-name": volumes[row["lineage"]]}})
        return entries


def _source_name(reference: Mapping[str, str]) -> str:
    name = reference.get("source-name")
    if not isinstance(name, str) or not name:
        raise UsageError("give a source-name: a volume, a qcow2 file, or LINEAGE@SNAPSHOT with a repository")
    return name


def _make_entry(name: str, size: int, reason: str | None, cinder_id: str | None) -> dict[str, Any]:
    return {
        "reference": {"source-name": name},
        "size": _to_gib(size),
        "safe_to_manage": reason is None,
        "reason_not_safe": reason,
        "cinder_id": cinder_id,
        "extra_info": None,
    }


def _to_gib(size: int) -> int:
    return -(-size // _GIB)
