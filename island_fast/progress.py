"""How long work tells that it goes on: a phase's name, units done, and units in all."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int, int], None]
"""Called as progress(phase, done, total), in bytes, also from workers; an exception of it ends the work.

Phases are "scan", "send", "commit" (once, with 0 of 0: from here on the snapshot may exist), "restore",
"compare" and "zero" (before "restore", where that is onto an image; from "zero" on it is changed), "sweep",
"copy", "retain" (bytes that the snapshots which go had written), "usage" (bytes of manifests), and of a
verification "look", "verify", "compare" and "mend".
"""


def silent(phase: str, done: int, total: int) -> None:
    """Tell nobody."""
