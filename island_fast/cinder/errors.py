"""Our errors as Cinder's: translated once, the sentences as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from cinder import exception
from oslo_log import log as logging

from island_fast.errors import DamagedImageError, IslandError, NotFoundError, RefusedError, UsageError

__all__ = ["referenced", "translated"]

_NOT_TO_BE_MANAGED = (UsageError, NotFoundError, RefusedError, DamagedImageError)

LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def translated(resource: Any = None) -> Iterator[None]:
    """Turn an error of ours into Cinder's, the sentence as it is."""
    try:
        yield
    except IslandError as error:
        LOG.error("%s%s", _named(resource), error, resource=resource)
        raise exception.VolumeDriverException(message=str(error)) from error
    except OSError as error:
        LOG.exception("%sthe file system refused", _named(resource), resource=resource)
        said = f"{error.filename or 'the file system of the volumes'}: {error.strerror or error}"
        raise exception.VolumeDriverException(message=said) from error


def _named(resource: Any) -> str:
    """The beginning of a line about a volume or snapshot; oslo.log's own formats do not show `resource`."""
    return f"{type(resource).__name__.lower()} {resource.id}: " if resource else ""


@contextlib.contextmanager
def referenced(existing_ref: Mapping[str, str]) -> Iterator[None]:
    """Turn an error about a reference into Cinder's."""
    try:
        yield
    except exception.VolumeDriverException as error:
        if isinstance(error.__cause__, _NOT_TO_BE_MANAGED):
            raise exception.ManageExistingInvalidReference(
                existing_ref=existing_ref, reason=str(error.__cause__)
            ) from error
        raise
