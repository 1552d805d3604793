"""Make the qcow2 images of volumes. Each is written under a scratch name, and renamed once it is whole."""

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

_MAX_ERROR_TEXT = 300  # characters of qemu's own words in a message


def volume_size(image: Path) -> int:
    """Return the size of an image's volume in bytes, as the image's header states it."""
    with Image.open(image) as opened:
        return opened.header.size


def holds_pins(image: Path) -> bool:
    """Return whether an image, which may be in use, holds pins."""
    with Image.open(image) as opened:
        return any(pinned_snapshot(internal.name) for internal in opened.snapshots)


class Images:
    """Makes, copies and resizes images with qemu-img.

    The format is always stated, never guessed from the content, and backing files are never opened.
    """

    def __init__(self, execute: RunProgram) -> None:
        self._execute = execute

    def create_blank(self, target: Path, size: int) -> None:
        """Create an image of `size` bytes without data."""
        scratch = _free_scratch_path(target)
        self._run_qemu_img("create", "-q", "-f", "qcow2", "-o", _create_options(size), scratch, size)
        _publish(scratch, target)

    def copy(self, image: Path, internal: str, target: Path, size: int) -> None:
        """Create an image of `size` bytes from an internal snapshot of another one, which may be in use."""
        scratch = _free_scratch_path(target)
        self._convert(image, internal, ["-O", "qcow2", "-o", _create_options(size)], scratch)
        self.resize(scratch, size)
        _publish(scratch, target)

    def export(self, image: Path, internal: str, target: Path, image_format: str) -> None:
        """Write the content of an internal snapshot to a file of a format, such as "raw" or "vmdk"."""
        self._convert(image, internal, ["-O", image_format], target)

    def resize(self, image: Path, size: int) -> None:
        """Enlarge an image that no process has open to `size` bytes; raise RefusedError if it is larger."""
        now = volume_size(image)
        if now > size:
            raise RefusedError(f"{image} holds a volume of {now} B, which cannot become one of {size} B")
        if now < size:
            self._run_qemu_img("resize", "-q", "-f", "qcow2", image, size)

    def _convert(self, image: Path, internal: str, options: Sequence[str], target: Path) -> None:
        # -U (no lock), because a daemon writes to the image; it never writes to what the snapshot holds.
        source = {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": str(image)}}
        point = f"snapshot.name={internal}"
        self._run_qemu_img("convert", "-q", "-U", "-l", point, *options, f"json:{json.dumps(source)}", target)

    def _run_qemu_img(self, verb: str, *words: object) -> None:
        done = self._execute(["qemu-img", verb, *map(str, words)])
        if done.returncode:
            said = " ".join((done.stderr or "").split())[:_MAX_ERROR_TEXT] or "it gave no reason"
            raise IslandError(f"qemu-img {verb} failed: {said}")


def _create_options(size: int) -> str:
    return f"cluster_size={cluster_size(size)},lazy_refcounts=on"


def _free_scratch_path(target: Path) -> Path:
    """Return the scratch name of what is to become `target`; remove what a crash left there."""
    scratch = target.with_name(f"making-{target.name}")
    scratch.unlink(missing_ok=True)
    return scratch


def _publish(scratch: Path, target: Path) -> None:
    """Flush a file and rename it to `target`; on return it has that name on disk."""
    os.chmod(scratch, 0o600)
    fd = os.open(scratch, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(scratch, target)
    sync_folder(target.parent)
