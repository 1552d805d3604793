"""A new image for a restore, which gets its name when it is whole and on disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from island_fast.errors import IslandError, NotFoundError, RefusedError
from island_fast.files import link_new, sync_folder


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[int]:
    """A descriptor of a new file that becomes `target` when the body ends well, and else disappears.

    The file is on disk before it gets its name; a target that exists is refused, also at the last moment.
    """
    if os.path.lexists(target):
        raise RefusedError(f"{target} exists already; name another target or remove it first")
    temporary = target.with_name(f".{target.name[:200]}.island-{os.urandom(8).hex()}")
    try:  # from before the file is there: a signal may come between its making and the next line
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as error:
            raise NotFoundError(
                f"{target} cannot be made: there is no folder {target.parent}; make it or name another target"
            ) from error
        except OSError as error:
            raise IslandError(f"{target} cannot be made: {error.strerror}") from error
        with _named(target):
            try:
                yield fd
                os.fsync(fd)
            finally:
                os.close(fd)
            if not link_new(str(temporary), str(target)):
                raise RefusedError(f"{target} was made by someone else meanwhile; it is left alone")
            sync_folder(target.parent)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """Turn a failure of the target's file system into a sentence."""
    try:
        yield
    except OSError as error:
        raise IslandError(
            f"{target} cannot be written: {error.strerror}; free space or name another place"
        ) from error
