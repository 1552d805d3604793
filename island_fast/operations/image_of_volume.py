"""Whether an image is the one that a volume belongs to.

A volume has one image, and a pin proves only that an image comes from it: a copy of the image holds the same
pins. Two guests that share a volume would each lose snapshots to the other's retention. So local state
remembers the image: a file by path, device, inode and time of creation, because the inode of a deleted file
is given to the next one; a block device by path, number and the name that it keeps (`device_names.py`),
because at the next start another one can have its path and its number. A file is still the same image if it
was renamed, or replaced at its path, or moved and the old path is gone. A file beside the one that is known
is refused, and so is another device at the same path.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from island_fast.errors import RefusedError
from island_fast.files import birth_time, open_fd
from island_fast.images.device_names import find_stable_name
from island_fast.images.source import Source
from island_fast.repository.lineage import Lineage
from island_fast.repository.local_state import ImageFile

__all__ = ["accept_image", "describe_image", "holds_pin", "is_other_device", "is_renamed"]


def describe_image(source: Source) -> ImageFile:
    """Describe the very file or device that a source has open; its path has no symbolic links."""
    return _describe(source.path, source.fd) if source.fd >= 0 else _describe_present(str(source.path))


def _describe(path: Path, fd: int) -> ImageFile:
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return ImageFile(str(path), status.st_rdev, name=find_stable_name(status.st_rdev))
    return ImageFile(str(path), status.st_dev, status.st_ino, birth_time(fd))


def _describe_present(path: str) -> ImageFile:
    """Describe what is at `path` now."""
    try:
        with open_fd(path, os.O_PATH | os.O_CLOEXEC) as fd:
            return _describe(Path(path), fd)
    except OSError:
        return ImageFile(path)


def holds_pin(source: Source, lineage: Lineage) -> bool:
    """Return whether the image holds a pin of the lineage, by its whole identity."""
    pins = [row.pin for row in lineage.state.live.values()]
    for deleted in lineage.files.deleted_snapshots():
        manifest = lineage.read_cached_manifest(deleted.snapshot, deleted.attempt)
        pins += [manifest.pin] if manifest else []
    return any(source.find_pinned(pin) for pin in pins)


def is_renamed(known: ImageFile, here: ImageFile) -> bool:
    """Return whether `here` is the very file that was `known` at another path, where it is no more.

    Or the very device, wherever it is: another one can have its path by now.
    """
    if known.name or here.name:
        return known.name == here.name
    same = known.born != 0 and _identity(known) == _identity(here)
    return same and _identity(_describe_present(known.path)) != _identity(known)


def is_other_device(known: ImageFile, here: ImageFile) -> bool:
    """Return whether a device has the path that another one was `known` by."""
    if known.path != here.path:
        return False
    numbered = known.device != 0 and known.inode == 0  # a device, noted with its number
    return known.name != here.name if known.name else numbered and _identity(known) != _identity(here)


def accept_image(lineage: Lineage, source: Source) -> str | None:
    """Return a sentence about what is to be known of the volume's image, or None; RefusedError if it is not.

    `lineage` exists and was refreshed. Nothing is changed.
    """
    known, here = lineage.files.image(), describe_image(source)
    if known is None:
        return None
    if is_other_device(known, here):
        raise RefusedError(
            f"{here.path} is another device than at the last snapshot of volume {lineage.name}: it was "
            f"{_title(known)}, and is {_title(here)}; name the volume's device as it is called now, give "
            f"this one a volume of its own with --volume, or if it takes the other's place, run "
            f"'island adopt {lineage.name}'"
        )
    if known.path == here.path:
        replaced = known.inode != 0 and (known.inode, known.born or here.born) != (here.inode, here.born)
        if not replaced or source.reason_not_pinnable is not None or holds_pin(source, lineage):
            return None
        return (
            f"{here.path} is not the file of the last snapshot of volume {lineage.name} and holds no pin of "
            "it, so everything was read; if it belongs to another guest, use another --volume from now on"
        )
    if is_renamed(known, here) or _is_same_file(known, here):
        return None
    if not holds_pin(source, lineage):
        raise RefusedError(
            f"{lineage.store.location} already has a volume {lineage.name}, and {source.path} is not known "
            "as its image and does not hold its pin; give another name with --volume, or if it is that "
            f"volume, run 'island adopt {lineage.name}'"
        )
    if _is_image(known.path):
        raise RefusedError(
            f"{source.path} holds a pin of volume {lineage.name}, whose image is another file, {known.path}; "
            "if it is a copy, give it a volume of its own with --volume, or if it takes that one's place, "
            f"run 'island adopt {lineage.name}'"
        )
    if not os.path.isabs(known.path) or not known.inode:
        return None
    return f"{here.path} is the image of volume {lineage.name} from now on; {known.path} is gone"


def _identity(image: ImageFile) -> tuple[int, int, int]:
    return image.device, image.inode, image.born


def _title(image: ImageFile) -> str:
    """Return what a message calls a device."""
    return image.name or f"number {os.major(image.device)}:{os.minor(image.device)}"


def _is_same_file(known: ImageFile, here: ImageFile) -> bool:
    """Return whether both paths lead to one file, such as through a bind mount or by a hard link."""
    now = _describe_present(known.path)
    return here.device != 0 and _identity(now) == _identity(here) and not is_other_device(known, now)


def _is_image(path: str) -> bool:
    """Return whether there is a file or a device at `path`."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)
