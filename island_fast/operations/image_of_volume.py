"""Whether an image is the one that a volume belongs to.

A volume has one image, and a pin proves only that an image comes from it: a copy of the image holds the same
pins. Two guests that share a volume would each lose snapshots to the other's retention. So local state
remembers the file, by path, device and inode. It is still the same image if it was renamed, or replaced at
its path, or moved and the old path is gone. A file beside the one that is known is refused.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from island_fast.errors import RefusedError
from island_fast.images.source import Source
from island_fast.repository.lineage import Lineage
from island_fast.repository.local_state import ImageFile

__all__ = ["accept_image", "find_image_file", "holds_pin", "is_renamed"]


def find_image_file(path: Path) -> ImageFile:
    """Describe the file or device at `path`, which has no symbolic links."""
    try:
        status = os.stat(path)
    except OSError:
        return ImageFile(str(path))
    return ImageFile(str(path), status.st_dev, status.st_ino)


def holds_pin(source: Source, lineage: Lineage) -> bool:
    """Return whether the image holds a pin of the lineage, by its whole identity."""
    pins = [row.pin for row in lineage.state.live.values()]
    for deleted in lineage.files.deleted_snapshots():
        manifest = lineage.read_cached_manifest(deleted.snapshot, deleted.attempt)
        pins += [manifest.pin] if manifest else []
    return any(source.find_pinned(pin) for pin in pins)


def is_renamed(known: ImageFile, here: ImageFile) -> bool:
    """Return whether `here` is the very file that was `known` at another path, where it is no more."""
    same = known.inode != 0 and (known.device, known.inode) == (here.device, here.inode)
    return same and not _is_at(known)


def accept_image(lineage: Lineage, source: Source) -> str | None:
    """Return a sentence about what is to be known of the volume's image, or None; RefusedError if it is not.

    `lineage` exists and was refreshed. Nothing is changed.
    """
    known, here = lineage.files.image(), find_image_file(source.path)
    if known is None:
        return None
    if known.path == here.path:
        replaced = known.inode not in (0, here.inode)
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


def _is_at(known: ImageFile) -> bool:
    """Return whether the file is at its path, still or again."""
    now = find_image_file(Path(known.path))
    return now.inode != 0 and now.inode == known.inode


def _is_same_file(known: ImageFile, here: ImageFile) -> bool:
    """Return whether both paths lead to one file, such as through a bind mount or by a hard link."""
    now = find_image_file(Path(known.path))
    return here.inode != 0 and (now.device, now.inode) == (here.device, here.inode)


def _is_image(path: str) -> bool:
    """Return whether there is a file or a device at `path`."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)
