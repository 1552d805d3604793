"""Progress callbacks for long operations."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int, int], None]
"""Called as progress(phase, done, total), in bytes, also by worker threads; if it raises, the work ends.

A snapshot has the phases "scan", "send" and "commit" (once, with 0 of 0: from here on the snapshot may
exist). A restore has "restore"; onto an existing image, first "compare", and from "zero" on the image
changes. "sweep" and "copy" count the bytes of objects and of volumes. "retain" counts the bytes that the
deleted snapshots had written, "usage" the bytes of manifests. A verification has "look" (objects that are
only looked up), "verify" (objects that are read in full), "compare" and "mend".
"""


def silent(phase: str, done: int, total: int) -> None:
    """Ignore progress: the default."""
