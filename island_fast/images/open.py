"""Open the image that a snapshot is taken of: the source for each format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from island_fast.errors import UsageError
from island_fast.images.backing import Backing
from island_fast.images.qcow2_source import Qcow2Source
from island_fast.images.raw_source import RawSource
from island_fast.images.source import Source

__all__ = ["open_source"]


def open_source(
    image: str | Path, image_format: str, *, qmp: Path | None, unpinned_scan: bool, backing: Sequence[str]
) -> Source:
    """Open an image as a source, which the caller must close; for `qmp` and `unpinned_scan` see Qcow2Source.

    `image_format` is "qcow2" or "raw", and never probed. Symbolic links in `image` are followed. `backing`
    lists the backing files as FORMAT:FILE, nearest first.

    UsageError for an unknown format, for a text that is not a valid backing file, and for backing files of a
    raw image.
    """
    path = Path(os.path.realpath(image))
    files = Backing.parse_all(backing)
    if image_format == "qcow2":
        return Qcow2Source(path, qmp, unpinned_scan=unpinned_scan, backing=files)
    if image_format != "raw":
        raise UsageError(f"{image_format!r} is not a known format; use qcow2 or raw")
    if files:
        raise UsageError("a raw image has no backing files; leave out --backing")
    return RawSource(path)
