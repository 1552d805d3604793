"""Checks of the records of a catalog: each is whole, and follows the one before it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from island_fast.errors import UNREADABLE, DamagedObjectError, ObjectMissingError
from island_fast.formats.catalog import CHECKPOINT_EVERY, OwnerChanged, decode_record
from island_fast.formats.frame import LIMITS, Kind
from island_fast.formats.keys import SnapshotNumbers
from island_fast.formats.names import catalog_name
from island_fast.repository.integrity.objects import CONTRADICTION, MISSING, ROT, Finding
from island_fast.repository.lineage import Lineage
from island_fast.stores.checked_read import get_checked

__all__ = ["check_records", "find_catalog_damage"]

_RECORD = re.compile(r".*/([0-9]{6})-([0-9]{8})")


def check_records(lineage: Lineage, names: Sequence[str]) -> tuple[list[Finding], int]:
    """Return what is wrong in the store with these records, which follow each other, and the bytes read.

    All are read from the store, also those that this host has in its cache.
    """
    found: list[Finding] = []
    before, size = None, 0
    for name in names:
        record = _read_record(lineage, name)
        if isinstance(record, Finding):
            found.append(record)
            before = None
        else:
            found += _find_contradictions(lineage, name, record, before)
            before, size = record, size + len(record.data)
    return found, size


def find_catalog_damage(lineage: Lineage, error: Exception) -> list[Finding]:
    """Return what is wrong with a catalog that cannot be read to its end, for which `error` was raised."""
    listed = (_RECORD.fullmatch(info.name) for info in lineage.store.list(f"{lineage.name}/catalog/"))
    epoch, last = max(((int(m[1]), int(m[2])) for m in listed if m), default=(0, 0))
    numbers = range(last - last % CHECKPOINT_EVERY, last + 1)
    found, _ = check_records(lineage, [catalog_name(lineage.name, epoch, number) for number in numbers])
    return found or [Finding(f"{lineage.name}/catalog", CONTRADICTION, str(error))]


@dataclass(frozen=True, slots=True)
class _StoredRecord:
    """A record in the store: its checksum, the one it states for the record before it, and its bytes.

    `previous` is None for an `owner` record: the record before it need not count.
    """

    checksum: str
    previous: str | None
    data: bytes


def _read_record(lineage: Lineage, name: str) -> _StoredRecord | Finding:
    """Read a record from the store; return what is wrong with it if it cannot be read."""

    def check(data: memoryview) -> _StoredRecord:
        record, checksum = decode_record(name, data, SnapshotNumbers())
        begins = isinstance(record.event, OwnerChanged)
        return _StoredRecord(checksum, None if begins else record.previous, bytes(data))

    try:
        return get_checked(lineage.store, name, check, limit=LIMITS[Kind.RECORD].size, newest=True)
    except ObjectMissingError:
        return Finding(name, MISSING, f"record {name} is missing from {lineage.store.location}")
    except UNREADABLE as error:
        return Finding(name, ROT, str(error))


def _find_contradictions(
    lineage: Lineage, name: str, record: _StoredRecord, before: _StoredRecord | None
) -> Iterator[Finding]:
    """Yield in what a record contradicts the one before it, or this host's copy of it."""
    cached = lineage.files.cache.read(name)
    if before and record.previous not in (None, before.checksum):
        yield Finding(name, CONTRADICTION, f"record {name} does not follow the one before it")
    elif cached is not None and cached != record.data and _is_record(name, cached):
        yield Finding(name, CONTRADICTION, f"record {name} is not the one that this host knows")


def _is_record(name: str, data: bytes) -> bool:
    with contextlib.suppress(DamagedObjectError):
        decode_record(name, data, SnapshotNumbers())
        return True
    return False
