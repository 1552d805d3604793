"""Names of pins: the internal snapshots that are the bases of table diffs."""

from __future__ import annotations

import re

__all__ = ["pin_name", "pinned_lineage", "pinned_snapshot"]

_PIN = re.compile(r"island-([0-9a-f]{8})\.([A-Za-z0-9._-]{1,128})-([0-9a-f]{32})")


def pin_name(repository: str, lineage: str, snapshot: str) -> str:
    """Name of the internal snapshot that pins `snapshot`; it tells repository and lineage apart."""
    return f"island-{repository[:8]}.{lineage}-{snapshot}"


def pinned_lineage(repository: str, name: str) -> str | None:
    """The lineage that an internal snapshot's name pins in this repository; None if it is no such pin."""
    match = _PIN.fullmatch(name)
    return match[2] if match and match[1] == repository[:8] else None


def pinned_snapshot(name: str) -> str | None:
    """The snapshot that an internal snapshot's name pins, in whatever repository; None if it is no pin."""
    match = _PIN.fullmatch(name)
    return match[3] if match else None
