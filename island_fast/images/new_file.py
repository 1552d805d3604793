"""The new file that a restore writes.

While it is written it has a temporary name in the target's directory; it gets the target's name only when it
is complete and on disk. So a target is whole or does not exist, and an existing file is never replaced.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from island_fast.errors import IslandError, NotFoundError, RefusedError
from island_fast.files import link_new, sync_folder

__all__ = ["create_file"]


@contextlib.contextmanager
def create_file(target: Path) -> Iterator[int]:
    """Create a file, yield its descriptor (read and write), and name it `target` if the body succeeds.

    If the body fails, the file is removed. The descriptor is closed here. The file is flushed to disk before
    it gets its name, and its directory after. RefusedError if `target` exists, at the start or at the end, or
    if its directory holds device nodes; NotFoundError if its directory does not exist; IslandError if the
    file system fails.
    """
    if target.is_block_device():
        raise RefusedError(f"{target} is a block device; write onto it with --onto {target} --format raw")
    if _is_among_devices(target.parent):
        raise RefusedError(
            f"{target} would be a file in memory, since there is no such device; check the path"
        )
    if os.path.lexists(target):
        raise RefusedError(f"{target} already exists; name another target or remove it first")
    temporary = target.with_name(f".{target.name[:200]}.island-{os.urandom(8).hex()}")
    try:  # begins before the file exists, because a signal can come right after it was created
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as error:
            raise NotFoundError(
                f"{target} cannot be created: there is no folder {target.parent}; "
                "create it or name another target"
            ) from error
        except OSError as error:
            raise IslandError(f"{target} cannot be created: {error.strerror}; name another target") from error
        with _explain_os_errors(target):
            try:
                yield fd
                os.fsync(fd)
            finally:
                os.close(fd)
            if not link_new(str(temporary), str(target)):
                raise RefusedError(
                    f"{target} was created by another process meanwhile and is left unchanged; "
                    "name another target"
                )
            sync_folder(target.parent)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _is_among_devices(folder: Path) -> bool:
    """Return whether `folder` is one of device nodes: /dev or below it, on the same file system."""
    try:
        below = os.path.commonpath((os.path.realpath(folder), "/dev")) == "/dev"
        return below and folder.stat().st_dev == os.stat("/dev").st_dev
    except OSError:
        return False


@contextlib.contextmanager
def _explain_os_errors(target: Path) -> Iterator[None]:
    """Turn an OSError of the body into an IslandError that names the target."""
    try:
        yield
    except OSError as error:
        raise IslandError(
            f"{target} cannot be written: {error.strerror}; free space or name another target"
        ) from error
