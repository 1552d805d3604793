"""The one tree of errors.

Each class carries the exit code that the command line gives for it. An error is made where the fact is
known, with one sentence that names the cause and the way out; each door (command line, Cinder driver)
translates it once.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "UNREADABLE",
    "ConflictError",
    "DamagedError",
    "DamagedImageError",
    "DamagedObjectError",
    "ImageInUseError",
    "IslandError",
    "NotFoundError",
    "ObjectMissingError",
    "RefusedError",
    "StoreError",
    "UnsupportedImageError",
    "UnsupportedObjectError",
    "UsageError",
    "refuse_one_text",
]


class IslandError(Exception):
    """Something failed; the message is one sentence for the user. Exit code 1."""

    exit_code: ClassVar[int] = 1


class UsageError(IslandError):
    """The call was wrong: a bad name, option or combination of them. Exit code 2."""

    exit_code = 2


class NotFoundError(IslandError):
    """A snapshot, volume, file, container or repository that was named is not there. Exit code 3."""

    exit_code = 3


class ObjectMissingError(NotFoundError):
    """The store confirms that no object of this name exists (asked of every replica)."""


class RefusedError(IslandError):
    """Going on could lose data or mix two volumes, so nothing was done. Exit code 4."""

    exit_code = 4


class UnsupportedImageError(RefusedError):
    """The image uses a feature that is not read, named in the message."""


class UnsupportedObjectError(RefusedError):
    """An object of the repository has a format version, feature or codec that this reader lacks."""


class ImageInUseError(RefusedError):
    """Another process holds the image open for writing."""


class ConflictError(RefusedError):
    """A write-once name already holds other bytes, or another writer owns the lineage."""


class StoreError(IslandError):
    """The store did not answer, or its answer leaves the outcome unknown. Exit code 5."""

    exit_code = 5


class DamagedError(IslandError):
    """Bytes are not what was written. Exit code 6."""

    exit_code = 6


class DamagedObjectError(DamagedError):
    """An object of the repository fails its checksum or contradicts itself."""


class DamagedImageError(DamagedError):
    """An image contradicts its own format (an offset outside the file, an invalid entry, a cut stream)."""


UNREADABLE = (DamagedObjectError, UnsupportedObjectError)
"""What an object raises that does not come as it was written: a flipped bit may look like a newer version."""


def refuse_one_text(values: object, such_as: str) -> None:
    """UsageError for a str where a list of texts is meant: its letters would be taken one by one."""
    if isinstance(values, str):
        raise UsageError(f"give a list of {such_as}, not one text")
