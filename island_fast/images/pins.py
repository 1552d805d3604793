"""Names of pins: what makes an internal snapshot ours, and whose it is.

A pin is the internal snapshot that a snapshot leaves in a qcow2 image, so that the next snapshot can be
compared with it. Its name is `island-<first 8 hex digits of the repository id>.<lineage>-<snapshot id>`; see
"Pinned base" in docs/format.md. A name proves nothing: anybody can give an internal snapshot such a name, so
a pin is used as a base only when its whole identity matches the one that the snapshot recorded
(`InternalSnapshot.identity`).
"""

from __future__ import annotations

import re

__all__ = ["pin_name", "pinned_lineage", "pinned_snapshot"]

_PIN = re.compile(r"island-([0-9a-f]{8})\.([A-Za-z0-9._-]{1,128})-([0-9a-f]{32})")


def pin_name(repository: str, lineage: str, snapshot: str) -> str:
    """Return the name of the internal snapshot that pins `snapshot`; `repository` is the repository's id."""
    return f"island-{repository[:8]}.{lineage}-{snapshot}"


def pinned_lineage(repository: str, name: str) -> str | None:
    """Return the lineage that a pin of this repository belongs to; None for any other name."""
    match = _PIN.fullmatch(name)
    return match[2] if match and match[1] == repository[:8] else None


def pinned_snapshot(name: str) -> str | None:
    """Return the id of the snapshot that a pin of any repository pins; None for any other name."""
    match = _PIN.fullmatch(name)
    return match[3] if match else None
