"""Volumes, files and snapshots that exist without Cinder, and that Cinder can take over ("manage").

A reference is one of

    {"source-name": NAME}                               a volume that was unmanaged
    {"source-name": FILE}                               a qcow2 file in the folder of volumes
    {"source-name": LINEAGE@SNAPSHOT}                   a snapshot in the host's own repository
    {"source-name": LINEAGE@SNAPSHOT, "repository": R}  one in the repository called R in cinder.conf
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
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
    """What a host's volumes and repositories hold, by reference. Sizes are in GiB, rounded up."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes

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
        size = self.size(reference) * _GIB
        if name in self._local_records():
            self._volumes.rename(name, volume)
        else:
            self._import_file(self._check_file(name), volume)
        self._volumes.extend(volume, size)

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
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_uid != os.geteuid():
            raise RefusedError(f"{path} must be a regular file of this service's user, with no other name")
        with Image.open(path) as image:
            if image.header.version < 3:
                raise RefusedError(f"{path} has qcow2 version 2; run 'qemu-img amend -o compat=1.1' on it")
            if writer_present(image.fd):
                raise RefusedError(f"{path} is open for writing in another process; end that process first")
            refuse_held(path, image.fd, to_write=True)
        return path

    def _import_file(self, file: Path, volume: str) -> None:
        """Move a file into the folder of a new volume, as its image."""
        records = self._volumes.records
        size = volume_size(file)
        records.create_folder(volume)
        os.chmod(file, 0o600)
        if not link_new(str(file), str(records.image_path(volume))):
            raise RefusedError(f"volume {volume} has an image already")
        records.write(volume, VolumeRecord(size, made=True))
        file.unlink(missing_ok=True)
        sync_folder(records.folder)

    def list_volumes(self, known: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return the host's volumes and loose qcow2 files as entries of Cinder's list of manageable volumes.

        `known` are the volumes that Cinder has, from name to id.
        """
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
