"""Making the qcow2 images of volumes: each under a name of its own first, given the image's when whole."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from island_fast.errors import IslandError, RefusedError
from island_fast.files import sync_folder
from island_fast.images.pins import pinned_snapshot
from island_fast.qcow2.image import Image
from island_fast.qemu.programs import RunProgram
from island_fast.qemu.sizing import cluster_size

__all__ = ["Images", "holds_pins", "volume_size"]

_MAX_SAID = 300  # characters of qemu's own words in a message


def volume_size(image: Path) -> int:
    """The size of an image's volume in bytes, by its header."""
    with Image.open(image) as opened:
        return opened.header.size


def holds_pins(image: Path) -> bool:
    """Whether an image, which may be in use, holds internal snapshots that are pins."""
    with Image.open(image) as opened:
        return any(pinned_snapshot(internal.name) for internal in opened.snapshots)


class Images:
    """Makes, copies and resizes images by qemu-img. Formats are stated, and backing files never opened."""

    def __init__(self, execute: RunProgram) -> None:
        self._execute = execute

    def blank(self, target: Path, size: int) -> None:
        """A new image that holds nothing."""
        scratch = _scratch(target)
        self._qemu_img("create", "-q", "-f", "qcow2", "-o", _options(size), scratch, size)
        _give(scratch, target)

    def copy(self, image: Path, internal: str, target: Path, size: int) -> None:
        """A new image of `size` bytes with the content of an internal snapshot of one that may be in use."""
        scratch = _scratch(target)
        self._convert(image, internal, ["-O", "qcow2", "-o", _options(size)], scratch)
        self.resize(scratch, size)
        _give(scratch, target)

    def export(self, image: Path, internal: str, target: Path, image_format: str) -> None:
        """The content of an internal snapshot as a file of another kind, such as "raw" or "vmdk"."""
        self._convert(image, internal, ["-O", image_format], target)

    def resize(self, image: Path, size: int) -> None:
        """Give an image that nobody has open another size, in bytes; it is never made smaller."""
        now = volume_size(image)
        if now > size:
            raise RefusedError(f"{image} holds a volume of {now} B, which cannot become one of {size} B")
        if now < size:
            self._qemu_img("resize", "-q", "-f", "qcow2", image, size)

    def _convert(self, image: Path, internal: str, how: Sequence[str], target: Path) -> None:
        # -U, because the process that has the image open writes to it: not to what the snapshot holds.
        source = {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": str(image)}}
        point = f"snapshot.name={internal}"
        self._qemu_img("convert", "-q", "-U", "-l", point, *how, f"json:{json.dumps(source)}", target)

    def _qemu_img(self, verb: str, *words: object) -> None:
        done = self._execute(["qemu-img", verb, *map(str, words)])
        if done.returncode:
            said = " ".join((done.stderr or "").split())[:_MAX_SAID] or "it gave no reason"
            raise IslandError(f"qemu-img {verb} failed: {said}")


def _options(size: int) -> str:
    return f"cluster_size={cluster_size(size)},lazy_refcounts=on"


def _scratch(target: Path) -> Path:
    """A name for what is to become `target`, free: what a crash left there is removed."""
    scratch = target.with_name(f"making-{target.name}")
    scratch.unlink(missing_ok=True)
    return scratch


def _give(scratch: Path, target: Path) -> None:
    """Flush a file and give it its name."""
    os.chmod(scratch, 0o600)
    fd = os.open(scratch, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(scratch, target)
    sync_folder(target.parent)
