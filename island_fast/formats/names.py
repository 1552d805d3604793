"""Names of objects, and what can name a lineage or a snapshot."""

from __future__ import annotations

import re

__all__ = ["LINEAGE_PATTERN", "SNAPSHOT_PATTERN", "catalog_name", "manifest_name", "pack_name", "stop_name"]

LINEAGE_PATTERN = re.compile(r"(?!\.\.?$)[A-Za-z0-9._-]{1,128}")
SNAPSHOT_PATTERN = re.compile(r"[0-9a-f]{32}")


def catalog_name(lineage: str, epoch: int, number: int) -> str:
    """Name of record `number` of `epoch`, below the repository's prefix."""
    return f"{lineage}/catalog/{epoch:06d}-{number:08d}"


def stop_name(lineage: str, epoch: int) -> str:
    """Name of the object whose presence ends `epoch`."""
    return f"{lineage}/catalog/{epoch:06d}-stop"


def manifest_name(lineage: str, snapshot: str, attempt: int) -> str:
    """Name of the manifest that `attempt` at `snapshot` wrote."""
    return f"{lineage}/manifests/{snapshot}-{attempt}"


def pack_name(lineage: str, snapshot: str, number: int, attempt: int, suffix: int = 0) -> str:
    """Full name of a pack; `suffix` is the random number of its repack, 0 for the first writing."""
    ending = f".{suffix:016x}" if suffix else ""
    return f"{lineage}/packs/{snapshot}/{attempt}-{number:08d}{ending}"
