"""What a host knows of a volume: its size, its lineage, and what its image is to be made from.

Layout, below the folder of volumes (0700, files 0600):

    <volume>/volume.json        the record: the fields of `VolumeRecord`, as JSON
    <volume>/image.qcow2        the image, once it is made
    <volume>/<other names>      images that are being made; what a crash leaves is used or removed later
    owner.json                  the one service that uses the folder: a JSON object with its name as "service"
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from island_fast.errors import DamagedError, NotFoundError, RefusedError, UsageError
from island_fast.files import link_new, make_folder, make_folders, sync_folder, write_scratch
from island_fast.formats.names import LINEAGE_PATTERN, SNAPSHOT_PATTERN

__all__ = ["VOLUME_PATTERN", "SnapshotRef", "VolumeRecord", "VolumeRecords"]

VOLUME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
"""What the folder of a volume can be called."""
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_OWNER = "owner.json"
_MAX_RECORD = 1 << 16  # bytes
_MAX_SIZE = 1 << 60  # bytes of a volume


@dataclass(frozen=True, slots=True)
class SnapshotRef:
    """The name of one snapshot. `repository` is "" for the host's own repository.

    Its text form, [REPOSITORY:]LINEAGE@SNAPSHOT, is what volume records and Cinder's database hold.
    """

    lineage: str
    snapshot: str
    repository: str = ""

    def __str__(self) -> str:
        return f"{self.repository}:{self.reference}" if self.repository else self.reference

    @property
    def reference(self) -> str:
        """The name that the command `island` takes: LINEAGE@SNAPSHOT."""
        return f"{self.lineage}@{self.snapshot}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read [REPOSITORY:]LINEAGE@SNAPSHOT; raise UsageError if the text has another form."""
        repository, _, reference = text.rpartition(":")
        lineage, _, snapshot = reference.partition("@")
        valid = not repository or _REPOSITORY.fullmatch(repository)
        if not (valid and LINEAGE_PATTERN.fullmatch(lineage) and SNAPSHOT_PATTERN.fullmatch(snapshot)):
            raise UsageError(
                f"{text!r} does not name a snapshot; write LINEAGE@SNAPSHOT with all 32 digits of its id, as "
                "'island list --json' shows them"
            )
        return cls(lineage, snapshot, repository)


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """What is known of a volume. `size` is in bytes.

    `lineage` holds the volume's snapshots; it is None before the first one. `origin` is the snapshot that the
    image is to be made from; it is None if the image is made already or is to be blank. With `passing`, that
    snapshot was taken only to bring the volume to this host, and is deleted once the image is made; until
    that is done, both stay beside `made`. With `made`, an image has been made; if the file is missing, it was
    lost. `label` is the label of the last snapshot that was started.
    """

    size: int
    lineage: str | None = None
    origin: SnapshotRef | None = None
    passing: bool = False
    made: bool = False
    label: str | None = None

    @property
    def in_transit(self) -> bool:
        """Whether a migration has put the content into the repository, and another host may have it now."""
        return self.passing and not self.made


class VolumeRecords:
    """The records of a host's volumes, in one folder, which the first write creates.

    `Volumes` makes sure that one call at a time works on a volume's image. But a volume can grow while it is
    snapshotted, so `change` is the way to alter a record of which another call may alter another field.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._changing = threading.Lock()

    def refuse_other_owner(self, service: str) -> None:
        """Raise RefusedError if the folder belongs to another service than the one of this name."""
        path = self.folder / _OWNER
        try:
            owner = json.loads(path.read_bytes())["service"]
        except FileNotFoundError:
            return
        except (ValueError, TypeError, KeyError) as error:
            raise DamagedError(f"{path} is damaged; delete it if only {service} uses this folder") from error
        if owner != service:
            raise RefusedError(
                f"the volumes in {self.folder} belong to the service {owner}, and this is {service}; give "
                "each section of cinder.conf an island_volumes_dir of its own, or, if there is no "
                f"{owner} any more, delete {path}"
            )

    def claim(self, service: str) -> None:
        """Make the folder that of a service; raise RefusedError if it is another's."""
        make_folders(self.folder)
        scratch = write_scratch(str(self.folder), [memoryview(json.dumps({"service": service}).encode())])
        link_new(scratch, str(self.folder / _OWNER))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)
        sync_folder(self.folder)
        self.refuse_other_owner(service)

    def folder_of(self, volume: str) -> Path:
        """Return the path of a volume's folder; raise UsageError if a volume cannot have that name."""
        if not VOLUME_PATTERN.fullmatch(volume):
            raise UsageError(f"{volume!r} cannot name a volume")
        return self.folder / volume

    def image_path(self, volume: str) -> Path:
        """Return where the volume's image is, or will be."""
        return self.folder_of(volume) / "image.qcow2"

    def volumes(self) -> list[str]:
        """Return the names of the volumes that have a record, sorted."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(
                entry.name
                for entry in os.scandir(self.folder)
                if VOLUME_PATTERN.fullmatch(entry.name)
                and os.path.exists(os.path.join(entry.path, "volume.json"))
            )
        return []

    def unrecorded(self) -> list[str]:
        """Return the names under which there is an image and no record."""
        with contextlib.suppress(FileNotFoundError):
            return [
                name
                for name in sorted(os.listdir(self.folder))
                if VOLUME_PATTERN.fullmatch(name)
                and self.image_path(name).exists()
                and not (self.folder / name / "volume.json").exists()
            ]
        return []

    def read_all(self) -> Iterator[tuple[str, VolumeRecord]]:
        """Yield every volume with its record, except one that is removed meanwhile; errors as in `read`."""
        for volume in self.volumes():
            with contextlib.suppress(NotFoundError):
                yield volume, self.read(volume)

    def read_undamaged(self) -> Iterator[tuple[str, VolumeRecord]]:
        """Yield every volume whose record can be read, for callers that can do without the others."""
        for volume in self.volumes():
            with contextlib.suppress(NotFoundError, DamagedError):
                yield volume, self.read(volume)

    def read(self, volume: str) -> VolumeRecord:
        """Return the volume's record; raise NotFoundError without one, DamagedError if it is not valid."""
        path = self.folder_of(volume) / "volume.json"
        try:
            with open(path, "rb") as file:
                return _parse_record(json.loads(file.read(_MAX_RECORD)))
        except FileNotFoundError as error:
            raise NotFoundError(f"volume {volume} is not on this host") from error
        except (ValueError, TypeError, KeyError, UsageError) as error:
            raise DamagedError(f"{path} is damaged; restore the file or delete the volume") from error

    def write(self, volume: str, record: VolumeRecord) -> None:
        """Store `record`; on return it is on disk."""
        folder = self.create_folder(volume)
        value = asdict(record) | {"origin": str(record.origin) if record.origin else None}
        scratch = write_scratch(str(folder), [memoryview(json.dumps(value).encode())])
        os.replace(scratch, folder / "volume.json")
        sync_folder(folder)

    def create_folder(self, volume: str) -> Path:
        """Create the volume's folder if it does not exist, and return its path."""
        make_folders(self.folder)
        folder = self.folder_of(volume)
        make_folder(str(folder))
        return folder

    def remove_leftovers(self, volume: str, keep: str) -> None:
        """Remove images whose makers died before they were finished, except the one called `keep`."""
        kept = {"volume.json", self.image_path(volume).name, keep}
        for entry in os.scandir(self.folder_of(volume)):
            if entry.name not in kept:
                os.unlink(entry.path)

    def change(self, volume: str, **changes: object) -> VolumeRecord:
        """Replace fields of a record, and return the new record; of two threads, none undoes the other's."""
        with self._changing:
            record = self.read(volume)
            changed = replace(record, **changes)  # type: ignore[arg-type]
            if changed != record:
                self.write(volume, changed)
            return changed

    def remove(self, volume: str) -> None:
        """Remove the volume's image, then the rest of its folder; do nothing if there is no folder."""
        folder = self.folder_of(volume)
        if not folder.is_dir():
            return
        self.image_path(volume).unlink(missing_ok=True)
        sync_folder(folder)
        shutil.rmtree(folder)
        sync_folder(self.folder)

    def rename(self, volume: str, name: str) -> None:
        """Give a volume another name; do nothing if that is done already."""
        old, new = self.folder_of(volume), self.folder_of(name)
        if old.exists() or not new.exists():
            os.rename(old, new)
        sync_folder(self.folder)


def _parse_record(value: dict[str, Any]) -> VolumeRecord:
    """Return the record that `volume.json` holds; raise ValueError or KeyError if it is not valid."""
    size, lineage, origin = value["size"], value["lineage"], value["origin"]
    passing, made, label = value["passing"], value["made"], value["label"]
    valid = type(size) is int and 0 <= size <= _MAX_SIZE and type(passing) is type(made) is bool
    valid = valid and (label is None or isinstance(label, str))
    if not (valid and (lineage is None or LINEAGE_PATTERN.fullmatch(lineage))):
        raise ValueError(value)
    return VolumeRecord(size, lineage, SnapshotRef.parse(origin) if origin else None, passing, made, label)
