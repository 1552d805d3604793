"""What a host knows of a volume: its size, its lineage, and what its image is to be made from.

Layout, below the folder of volumes (0700, files 0600):

    <volume>/volume.json        the record
    <volume>/image.qcow2        the image, once it is made
    <volume>/<other names>      images that are being made; what a crash left is used or removed
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from island_fast.errors import DamagedError, NotFoundError, UsageError
from island_fast.files import make_folder, sync_folder, write_scratch
from island_fast.formats.names import LINEAGE_PATTERN, SNAPSHOT_PATTERN

__all__ = ["NAME", "Origin", "Record", "Records"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
"""What a volume's folder may be called."""
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MAX_RECORD = 1 << 16  # bytes
_MAX_SIZE = 1 << 60  # bytes of a volume


@dataclass(frozen=True, slots=True)
class Origin:
    """The snapshot that a volume's content comes from; `repository` is another's name, "" for one's own."""

    lineage: str
    snapshot: str
    repository: str = ""

    def __str__(self) -> str:
        return f"{self.repository}:{self.reference}" if self.repository else self.reference

    @property
    def reference(self) -> str:
        """The name that the command `island` knows it by."""
        return f"{self.lineage}@{self.snapshot}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read [REPOSITORY:]LINEAGE@SNAPSHOT; UsageError if it is not that."""
        repository, _, reference = text.rpartition(":")
        lineage, _, snapshot = reference.partition("@")
        known = not repository or _REPOSITORY.fullmatch(repository)
        if not (known and LINEAGE_PATTERN.fullmatch(lineage) and SNAPSHOT_PATTERN.fullmatch(snapshot)):
            raise UsageError(
                f"{text!r} names no snapshot; write LINEAGE@SNAPSHOT with all 32 digits of its id, as "
                "'island list --json' shows them"
            )
        return cls(lineage, snapshot, repository)


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a volume. `size` is in bytes.

    `lineage` is where its snapshots are, None before the first. `origin` is the snapshot that the image is to
    be made from, None if it is made or is to be blank. With `passing`, that snapshot was taken only to bring
    the volume to this host, and is deleted once the image is made. `made`: there is an image, or it was lost.
    `label` is that of the snapshot that was begun last.
    """

    size: int
    lineage: str | None = None
    origin: Origin | None = None
    passing: bool = False
    made: bool = False
    label: str | None = None

    @property
    def on_its_way(self) -> bool:
        """Whether the volume's content is on its way between hosts, and this host may have given it away."""
        return self.passing and not self.made


class Records:
    """The folder of a host's volumes; made when first written to. Not locked: `Volumes` sees to that."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, volume: str) -> Path:
        """The folder of one volume; UsageError if that cannot be one's name."""
        if not NAME.fullmatch(volume):
            raise UsageError(f"{volume!r} cannot name a volume")
        return self.folder / volume

    def image(self, volume: str) -> Path:
        """Where the volume's image is, or will be."""
        return self.place(volume) / "image.qcow2"

    def volumes(self) -> list[str]:
        """The volumes that have a record, by name."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(
                entry.name
                for entry in os.scandir(self.folder)
                if NAME.fullmatch(entry.name) and os.path.exists(os.path.join(entry.path, "volume.json"))
            )
        return []

    def all(self) -> Iterator[tuple[str, Record]]:
        """Every volume with its record; one that is removed meanwhile is left out. DamagedError as `read`."""
        for volume in self.volumes():
            with contextlib.suppress(NotFoundError):
                yield volume, self.read(volume)

    def sound(self) -> Iterator[tuple[str, Record]]:
        """Every volume whose record can be read, where nothing is lost by leaving others out."""
        for volume in self.volumes():
            with contextlib.suppress(NotFoundError, DamagedError):
                yield volume, self.read(volume)

    def read(self, volume: str) -> Record:
        """The volume's record; NotFoundError if there is none, DamagedError if it is not as written."""
        path = self.place(volume) / "volume.json"
        try:
            with open(path, "rb") as file:
                return _record(json.loads(file.read(_MAX_RECORD)))
        except FileNotFoundError as error:
            raise NotFoundError(f"volume {volume} is not on this host") from error
        except (ValueError, TypeError, KeyError, UsageError) as error:
            raise DamagedError(f"{path} is damaged; put back what it held or delete the volume") from error

    def write(self, volume: str, record: Record) -> None:
        """Keep `record`; it is on disk on return."""
        place = self.prepare(volume).parent
        value = asdict(record) | {"origin": str(record.origin) if record.origin else None}
        scratch = write_scratch(str(place), [memoryview(json.dumps(value).encode())])
        os.replace(scratch, place / "volume.json")
        sync_folder(place)

    def prepare(self, volume: str) -> Path:
        """Where a new volume's image goes, its folder made."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_folder(str(self.place(volume)))
        return self.image(volume)

    def tidy(self, volume: str, keep: str) -> None:
        """Remove images that were being made when their makers died; all but the one called `keep`."""
        kept = {"volume.json", self.image(volume).name, keep}
        for entry in os.scandir(self.place(volume)):
            if entry.name not in kept:
                os.unlink(entry.path)

    def change(self, volume: str, **changes: object) -> Record:
        """Replace fields of a record; the new one."""
        record = self.read(volume)
        changed = replace(record, **changes)  # type: ignore[arg-type]
        if changed != record:
            self.write(volume, changed)
        return changed

    def remove(self, volume: str) -> None:
        """Remove the image, and then all else; nothing happens if nothing is there."""
        place = self.place(volume)
        if not place.is_dir():
            return
        self.image(volume).unlink(missing_ok=True)
        sync_folder(place)
        shutil.rmtree(place)
        sync_folder(self.folder)

    def rename(self, volume: str, name: str) -> None:
        """Give a volume another name; nothing happens if that is done already."""
        old, new = self.place(volume), self.place(name)
        if old.exists() or not new.exists():
            os.rename(old, new)
        sync_folder(self.folder)


def _record(value: dict[str, Any]) -> Record:
    size, lineage, origin = value["size"], value["lineage"], value["origin"]
    passing, made, label = value["passing"], value["made"], value["label"]
    sound = type(size) is int and 0 <= size <= _MAX_SIZE and type(passing) is type(made) is bool
    sound = sound and (label is None or isinstance(label, str))
    if not (sound and (lineage is None or LINEAGE_PATTERN.fullmatch(lineage))):
        raise ValueError(value)
    return Record(size, lineage, Origin.parse(origin) if origin else None, passing, made, label)
