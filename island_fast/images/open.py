"""What a snapshot is taken of: an image, held, pinned where it can be, and asked what changed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from island_fast.errors import UsageError
from island_fast.images.backing import Backing
from island_fast.images.pins import pin_name, pinned_lineage, pinned_snapshot
from island_fast.images.qcow2_source import Qcow2Source
from island_fast.images.raw_source import RawSource
from island_fast.images.source import FULL_SCAN, TABLE_DIFF, Base, Change, Source, View

__all__ = [
    "FULL_SCAN",
    "TABLE_DIFF",
    "Backing",
    "Base",
    "Change",
    "Qcow2Source",
    "RawSource",
    "Source",
    "View",
    "held",
    "pin_name",
    "pinned_lineage",
    "pinned_snapshot",
]


def held(
    image: str | Path, image_format: str, *, qmp: Path | None, as_it_is: bool, backing: Sequence[str]
) -> Source:
    """The image as a source, a context manager; `qmp` and `as_it_is` are those of a Qcow2Source.

    UsageError for a format that is not known, and for what is no backing file or cannot have one.
    """
    path = Path(os.path.realpath(image))
    files = Backing.parsed(backing)
    if image_format == "qcow2":
        return Qcow2Source(path, qmp, as_it_is=as_it_is, backing=files)
    if image_format != "raw":
        raise UsageError(f"{image_format!r} is no format that is known; use qcow2 or raw")
    if files:
        raise UsageError("a raw image has no backing files; leave out --backing")
    return RawSource(path)
