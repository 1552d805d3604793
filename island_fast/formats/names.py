"""Names of objects, and the patterns of names of lineages and snapshots."""

from __future__ import annotations

import re

from island_fast.errors import DamagedObjectError

__all__ = [
    "LINEAGE_PATTERN",
    "SNAPSHOT_PATTERN",
    "catalog_name",
    "claim_name",
    "epoch_stem",
    "is_object_name",
    "manifest_name",
    "pack_name",
    "parse_claim",
    "parse_snapshot",
    "stop_name",
]

LINEAGE_PATTERN = re.compile(r"(?!\.\.?$)[A-Za-z0-9._-]{1,128}")
SNAPSHOT_PATTERN = re.compile(r"[0-9a-f]{32}")
_CATALOG = re.compile(r"catalog/[0-9]{6}-(?:[0-9]{8}|stop)")
_CLAIM = re.compile(r"(repository|.+/catalog/[0-9]{6})-claim-([0-9a-f]{32})-([0-9a-f]{32})")
_NUMBER = r"(?:0|[1-9][0-9]*)"
_STORED = re.compile(
    rf"manifests/([0-9a-f]{{32}})-{_NUMBER}|packs/([0-9a-f]{{32}})/{_NUMBER}-[0-9]{{8,}}(?:\.[0-9a-f]{{16}})?"
)


def is_object_name(lineage: str, name: str) -> bool:
    """Return whether `name` is that of a record, a stop object, a manifest or a pack of `lineage`."""
    folder, _, below = name.partition("/")
    return folder == lineage and bool(_CATALOG.fullmatch(below) or _STORED.fullmatch(below))


def catalog_name(lineage: str, epoch: int, number: int) -> str:
    """Return the name of record `number` of `epoch`, below the repository's prefix.

    DamagedObjectError for one that cannot be: whoever looks for the end of a catalog would go on for ever.
    """
    if not (epoch < 10**6 and number < 10**8):
        raise DamagedObjectError(
            f"volume {lineage}: the store lists a catalog record {epoch}-{number}, which cannot exist; "
            "check the store, and the proxies between it and this host"
        )
    return f"{lineage}/catalog/{epoch:06d}-{number:08d}"


def stop_name(lineage: str, epoch: int) -> str:
    """Return the name of the object whose presence ends `epoch`."""
    return f"{lineage}/catalog/{epoch:06d}-stop"


def epoch_stem(lineage: str, epoch: int) -> str:
    """Return what the names of all records of `epoch`, of its stop and of the claims on it begin with."""
    return catalog_name(lineage, epoch, 0).rpartition("-")[0]


def claim_name(stem: str, writer: str, token: str) -> str:
    """Return the name of a claim by `writer` on the names that begin with `stem`. `token`: 32 hex digits."""
    return f"{stem}-claim-{writer}-{token}"


def parse_claim(name: str) -> tuple[str, str, str] | None:
    """Return stem, writer and token of the claim that has this name; None for any other name."""
    found = _CLAIM.fullmatch(name)
    return (found[1], found[2], found[3]) if found else None


def manifest_name(lineage: str, snapshot: str, attempt: int) -> str:
    """Return the name of the manifest that `attempt` at `snapshot` wrote."""
    return f"{lineage}/manifests/{snapshot}-{attempt}"


def pack_name(lineage: str, snapshot: str, number: int, attempt: int, suffix: int = 0) -> str:
    """Return the name of a pack; `suffix` is a random number, or 0 if it has not been written again."""
    ending = f".{suffix:016x}" if suffix else ""
    return f"{lineage}/packs/{snapshot}/{attempt}-{number:08d}{ending}"


def parse_snapshot(lineage: str, name: str) -> str | None:
    """Return the snapshot whose manifest or pack has this name in `lineage`; None for any other name."""
    found = _STORED.fullmatch(name.removeprefix(f"{lineage}/")) if name.startswith(f"{lineage}/") else None
    return (found[1] or found[2]) if found else None
