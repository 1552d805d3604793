"""All errors that island raises, in one tree.

Each class has the exit code that the command ends with. An error is raised where its cause is known, with one
sentence that gives the cause and what to do. The command line and the Cinder driver each translate it once.
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
    "MemoryBudgetError",
    "NotFoundError",
    "ObjectMissingError",
    "RefusedError",
    "StoreError",
    "StoreFullError",
    "StoreRefusedError",
    "UnsupportedImageError",
    "UnsupportedObjectError",
    "UsageError",
    "refuse_one_text",
]


class IslandError(Exception):
    """An operation failed; the message is one sentence for the user. Exit code 1."""

    exit_code: ClassVar[int] = 1


class UsageError(IslandError):
    """The call is not valid: a bad name, or options that contradict each other. Exit code 2."""

    exit_code = 2


class NotFoundError(IslandError):
    """A snapshot, volume, file, container or repository that the call names does not exist. Exit code 3."""

    exit_code = 3


class ObjectMissingError(NotFoundError):
    """The store confirms, after asking every replica, that no object of this name exists."""


class RefusedError(IslandError):
    """Continuing could lose data or mix up two volumes, so nothing was done. Exit code 4."""

    exit_code = 4


class UnsupportedImageError(RefusedError):
    """The image uses a feature that island does not read; the message names it."""


class UnsupportedObjectError(RefusedError):
    """An object of the repository has a format version, feature or codec that this version cannot read."""


class ImageInUseError(RefusedError):
    """Another process has the image open for writing."""


class ConflictError(RefusedError):
    """Another host owns the volume, or an object of this name already exists with other content."""


class StoreError(IslandError):
    """The store did not answer, denied access, or left the outcome unknown. Exit code 5."""

    exit_code = 5


class StoreRefusedError(StoreError):
    """The store refused to write or delete an object, so that is certain: it was not done, and never will be.

    Any other StoreError of a write leaves its outcome unknown.
    """


class StoreFullError(StoreRefusedError):
    """The store has no room for an object: its disk is full, or its quota is used up."""


class DamagedError(IslandError):
    """Data is not what was written. Exit code 6."""

    exit_code = 6


class DamagedObjectError(DamagedError):
    """An object of the repository fails its checksum or contradicts itself or another object."""


class DamagedImageError(DamagedError):
    """An image violates its format: an offset outside the file, an invalid entry, a truncated stream."""


class MemoryBudgetError(DamagedError):
    """Reading something would take more memory than this host has for it.

    It need not be damaged: it is neither read again nor repaired.
    """


UNREADABLE = (DamagedObjectError, UnsupportedObjectError)
"""Errors of an object that is not as it was written: a flipped bit can make it look like a newer version."""


def refuse_one_text(values: object, such_as: str) -> None:
    """Raise UsageError if `values` is a str instead of a list: each of its letters would count as a value."""
    if isinstance(values, str):
        raise UsageError(f"give a list of {such_as}, not one text")
