"""Volumes and snapshots that are there without Cinder, and what may be made of them.

A reference is one of

    {"source-name": NAME}                               a volume that was unmanaged
    {"source-name": FILE}                               a qcow2 file in the folder of volumes
    {"source-name": LINEAGE@SNAPSHOT}                   a snapshot in one's own repository
    {"source-name": LINEAGE@SNAPSHOT, "repository": R}  one in the repository called R in cinder.conf
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from island_fast.cinder.images import volume_size
from island_fast.cinder.records import NAME, Origin, Record
from island_fast.cinder.volumes import Volumes
from island_fast.errors import IslandError, NotFoundError, RefusedError, UsageError
from island_fast.files import link_new, make_folder, sync_folder
from island_fast.qcow2.image import Image
from island_fast.qemu.image_lock import writer_present

__all__ = ["Manageable"]

_GIB = 1 << 30


class Manageable:
    """What a host's volumes and repositories hold, by reference. Sizes are in GiB, rounded up."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes

    def origin(self, reference: Mapping[str, str]) -> Origin:
        """The snapshot that a reference names; UsageError if it names none."""
        repository = reference.get("repository", "")
        return Origin.parse(f"{repository}:{_name(reference)}" if repository else _name(reference))

    def snapshot_size(self, reference: Mapping[str, str]) -> int:
        """The size of a snapshot's volume; NotFoundError if the repository does not have the snapshot."""
        origin = self.origin(reference)
        return _gib(self._volumes.repository(origin).size(origin))

    def size(self, reference: Mapping[str, str]) -> int:
        """The size of what a reference names."""
        name = _name(reference)
        if "@" in name:
            return self.snapshot_size(reference)
        if name in self._here():
            return _gib(self._here()[name].size)
        return _gib(volume_size(self._file(name)))

    def manage(self, volume: str, reference: Mapping[str, str]) -> None:
        """Make `volume` of what a reference names; its size becomes a whole number of GiB."""
        name = _name(reference)
        if "@" in name:
            origin = self.origin(reference)
            record = Record(self.snapshot_size(reference) * _GIB, origin=origin)
            self._volumes.create(volume, record, at_once=True)
            return
        size = self.size(reference) * _GIB
        if name in self._here():
            self._volumes.rename(name, volume)
        else:
            self._take_in(self._file(name), volume)
        self._volumes.extend(volume, size)

    def _here(self) -> dict[str, Record]:
        """The host's volumes; one that is on its way may be another host's by now."""
        return {name: record for name, record in self._volumes.records.sound() if not record.on_its_way}

    def _file(self, name: str) -> Path:
        """The loose file of this name; RefusedError unless it is a qcow2 that may become a volume's image."""
        path = self._volumes.records.folder / name
        if not NAME.fullmatch(name) or not path.is_file():
            raise NotFoundError(f"there is no volume or qcow2 file {name!r} in {path.parent}")
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_uid != os.geteuid():
            raise RefusedError(f"{path} must be a regular file of this service's user, with no other name")
        with Image.open(path) as image:
            if image.header.version < 3:
                raise RefusedError(f"{path} is of version 2 of qcow2; run qemu-img amend -o compat=1.1 on it")
            if writer_present(image.fd):
                raise RefusedError(f"{path} is open for writing in another process; stop that first")
        return path

    def _take_in(self, file: Path, volume: str) -> None:
        records = self._volumes.records
        size = volume_size(file)
        make_folder(str(records.place(volume)))
        os.chmod(file, 0o600)
        if not link_new(str(file), str(records.image(volume))):
            raise RefusedError(f"volume {volume} has an image already")
        records.write(volume, Record(size, made=True))
        file.unlink(missing_ok=True)
        sync_folder(records.folder)

    def volumes(self, known: Mapping[str, str]) -> list[dict[str, Any]]:
        """The volumes and loose files of the host, as Cinder lists them; `known` are its own, name to id."""
        entries = []
        for name, record in self._here().items():
            reason = "already managed" if name in known else None
            entries.append(_entry(name, record.size, reason, known.get(name)))
        for path in sorted(self._volumes.records.folder.glob("*.qcow2")):
            try:
                entries.append(_entry(path.name, volume_size(self._file(path.name)), None, None))
            except IslandError as error:
                entries.append(_entry(path.name, 0, str(error), None))
        return entries

    def snapshots(self, known: Mapping[str, str]) -> list[dict[str, Any]]:
        """The snapshots of the host's volumes; `known` are Cinder's own, by how it keeps them, to its ids."""
        mine = {record.lineage: name for name, record in self._volumes.records.sound() if record.lineage}
        entries = []
        for row in self._volumes.own.listed():
            if row["lineage"] in mine:
                origin = str(Origin(row["lineage"], row["snapshot"]))
                reason = "already managed" if origin in known else None
                entry = _entry(origin, row["volume_size"], reason, known.get(origin))
                entries.append(entry | {"source_reference": {"source-name": mine[row["lineage"]]}})
        return entries


def _name(reference: Mapping[str, str]) -> str:
    name = reference.get("source-name")
    if not isinstance(name, str) or not name:
        raise UsageError("give a source-name: a volume, a qcow2 file, or LINEAGE@SNAPSHOT with a repository")
    return name


def _entry(name: str, size: int, reason: str | None, cinder_id: str | None) -> dict[str, Any]:
    return {
        "reference": {"source-name": name},
        "size": _gib(size),
        "safe_to_manage": reason is None,
        "reason_not_safe": reason,
        "cinder_id": cinder_id,
        "extra_info": None,
    }


def _gib(size: int) -> int:
    return -(-size // _GIB)
