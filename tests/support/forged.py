"""Repositories in a directory whose objects have right checksums and claim more than they hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from island_fast.formats import columns
from island_fast.formats.frame import Kind, Section, json_bytes, seal
from island_fast.formats.names import catalog_name, manifest_name

__all__ = ["SNAPSHOT", "forge"]

SNAPSHOT = "ab" * 16
VOLUME = "v"
_PIN = {"name": "p", "id": "1", "seconds": 1, "nanoseconds": 1, "disk_size": 1 << 30}


def forge(
    root: Path, *, packs: int = 0, repeated: int = 0, runs: int = 0, dead: int = 0, json: bytes = b""
) -> None:
    """Write a repository of one volume with one snapshot.

    The state has `packs` different packs and `repeated` rows of one, and `dead` rows of dead slots; the
    manifest has `runs` runs in all of the packs, and `json` is the beginning of more JSON in the record.
    """
    _put(root, Kind.REPOSITORY, "repository", [_json({"id": "cd" * 16, "created": 1, "keys": []})])
    meta = {
        "lineage": VOLUME, "snapshot": SNAPSHOT, "attempt": 0, "parent": None, "group": None,
        "volume_size": max(runs, 1) << 16, "block_size": 65536, "created": 1, "label": "",
        "rule": "full-scan", "reason": "", "digest": 1, "seed": 1, "key": 0, "pin": _PIN, "properties": {},
        "lineages": [VOLUME], "snapshots": [SNAPSHOT], "packs": max(packs, 1) if runs else 0, "runs": runs,
    }  # fmt: skip
    used = max(packs, 1) if runs else 0
    back = np.ones(runs, np.uint8)
    if runs:
        back[:: -(-runs // used)] = 0
    sections = [_json(meta), *(_zeros(16 + i, used) for i in range(3)), _zeros(32, runs), _zeros(33, runs)]
    sections += [Section(34, [back.tobytes()]), _zeros(35, runs)]
    size, checksum = _put(root, Kind.MANIFEST, manifest_name(VOLUME, SNAPSHOT, 0), sections)
    row = {
        "id": SNAPSHOT, "parent": None, "attempt": 0, "checksum": checksum.hex(), "manifest_size": size,
        "created": 1, "label": "", "volume_size": max(runs, 1) << 16, "stored": 1, "pin": _PIN,
    }  # fmt: skip
    count = packs + repeated
    meta = {
        "lineage": VOLUME, "epoch": 0, "number": 0, "writer": "ef" * 16, "host": "h", "previous": None,
        "time": 1, "event": "owner", "seed": 1, "key": 0, "snapshot": None, "deleted": [], "swept": [],
        "snapshots": [SNAPSHOT], "checkpoint": {"live": [row], "dropped": []},
        "rows_16": 0, "rows_32": 0, "rows_48": 0, "rows_64": count, "rows_80": dead,
    }  # fmt: skip
    text = json_bytes(meta)[:-1] + json + b"}"
    numbers = np.append(np.arange(packs), np.zeros(repeated, np.int64))
    slots = np.full(count, 4096)
    table = [_zeros(64 + i, count) for i in range(7)]
    table[1], table[5] = (Section(k, [columns.encode(c)]) for k, c in ((65, numbers), (69, slots)))
    sections = [
        Section(1, [text]),
        *(_zeros(16 + i, 0) for i in range(7)), *(_zeros(32 + i, 0) for i in range(2)),
        *(_zeros(48 + i, 0) for i in range(4)),
        *table,
        *(_zeros(80 + i, dead) for i in range(4)),
    ]  # fmt: skip
    _put(root, Kind.RECORD, catalog_name(VOLUME, 0, 0), sections)


def _json(meta: dict[str, object]) -> Section:
    return Section(1, [json_bytes(meta)])


def _zeros(kind: int, rows: int) -> Section:
    return Section(kind, [bytes(rows)])


def _put(root: Path, kind: Kind, name: str, sections: list[Section]) -> tuple[int, bytes]:
    parts, checksum = seal(kind, name, sections)
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(parts))
    return path.stat().st_size, checksum
