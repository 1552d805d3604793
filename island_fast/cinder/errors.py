"""Turn this project's errors into Cinder's, with the same sentences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from cinder import exception
from oslo_log import log as logging

from island_fast.errors import DamagedImageError, IslandError, NotFoundError, RefusedError, UsageError

__all__ = ["translate_errors", "translate_reference_errors"]

_INVALID_REFERENCE = (UsageError, NotFoundError, RefusedError, DamagedImageError)

LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def translate_errors(resource: Any = None) -> Iterator[None]:
    """Turn an error of the body into VolumeDriverException, with the same sentence, and log it.

    `resource` is the volume or snapshot that the body works on.
    """
    try:
        yield
    except IslandError as error:
        LOG.error("%s%s", _log_prefix(resource), error, resource=resource)
        raise exception.VolumeDriverException(message=str(error)) from error
    except OSError as error:
        LOG.exception("%sthe file system reported an error", _log_prefix(resource), resource=resource)
        message = f"{error.filename or 'the file system of the volumes'}: {error.strerror or error}"
        raise exception.VolumeDriverException(message=message) from error


def _log_prefix(resource: Any) -> str:
    """Return how a log line about a volume or snapshot begins: oslo.log's formats do not show `resource`."""
    return f"{type(resource).__name__.lower()} {resource.id}: " if resource else ""


@contextlib.contextmanager
def translate_reference_errors(existing_ref: Mapping[str, str]) -> Iterator[None]:
    """Turn what `translate_errors` raised about a reference into Cinder's error for references."""
    try:
        yield
    except exception.VolumeDriverException as error:
        if isinstance(error.__cause__, _INVALID_REFERENCE):
            raise exception.ManageExistingInvalidReference(
                existing_ref=existing_ref, reason=str(error.__cause__)
            ) from error
        raise
