"""The catalog: a lineage's numbered records, and the state that reading them in order gives.

A record has an event, which says what happened: a host became the owner, a snapshot was made, snapshots were
deleted, a sweep removed or renamed packs. Some records carry the whole state (a checkpoint), so that a reader
need not start at the first record. This module converts between bytes and values; `repository/lineage.py`
reads and appends. Layout: docs/format.md, "Catalog".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from island_fast.arrays import Bools, Buffer, Int64s
from island_fast.dirtymap import NO_INTERVALS, distinct, merge_intervals, subtract_intervals
from island_fast.errors import DamagedObjectError, UnsupportedObjectError
from island_fast.formats import columns
from island_fast.formats.frame import (
    LIMITS,
    Kind,
    Section,
    bounded_time,
    integer,
    json_bytes,
    open_frame,
    seal,
)
from island_fast.formats.keys import (
    MAX_PACK_NUMBER,
    PACK_BITS,
    SLOT_BITS,
    SnapshotNumbers,
    pack_keys,
)
from island_fast.formats.manifest import pin_from_json
from island_fast.formats.names import LINEAGE_PATTERN, SNAPSHOT_PATTERN
from island_fast.formats.pack import MAX_SLOTS
from island_fast.memory import require_memory
from island_fast.qcow2.snapshots import PinnedBase

__all__ = [
    "CHECKPOINT_EVERY",
    "CLAIMED",
    "KNOWN_WRITE_FEATURES",
    "MOST_SWEPT",
    "Event",
    "ObjectsSwept",
    "OwnerChanged",
    "Packs",
    "Record",
    "SnapshotAdded",
    "SnapshotRow",
    "SnapshotsDeleted",
    "SnapshotsMarked",
    "State",
    "decode_record",
    "encode_record",
]


CHECKPOINT_EVERY = 32
_KEEPS = 1  # write feature: a live snapshot is marked to be kept, which an older writer would forget
CLAIMED = 2
"""Write feature: nobody begins an epoch of the lineage, or writes in one, without a claim on it."""
KNOWN_WRITE_FEATURES = _KEEPS | CLAIMED
MOST_SWEPT = 1024
"""How many of the snapshots that sweeps removed a state remembers, the last ones."""

_MAX_ROWS = 1 << 28
# A table's rows are all different: no encoder stores hundreds of them in a byte. Ours stores 110 at most.
_ROWS_FREE = 1 << 18  # whatever they are compressed to
_ROWS_PER_BYTE = 512  # more of them for each stored byte of the table
_ROW_MEMORY = 16  # bytes for each row and column while a record is decoded

_META = 1
_PACKS, _GONE, _DEAD, _STATE_PACKS, _STATE_DEAD = 16, 32, 48, 64, 80  # first section of each table


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """A live snapshot as the catalog describes it. Sizes in bytes, `created` in ns since 1970 UTC.

    `checksum` and `manifest_size` are its manifest's; `stored` is the size of the packs it wrote. `keep`: it
    is marked, and must not be deleted.
    """

    id: str
    parent: str | None
    attempt: int
    checksum: str
    manifest_size: int
    created: int
    label: str
    volume_size: int
    stored: int
    pin: PinnedBase
    keep: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return the row as records and checkpoints store it."""
        row = {name: getattr(self, name) for name in self.__slots__ if name not in ("pin", "keep")}
        if self.keep:
            row["keep"] = True
        return row | {"pin": {name: getattr(self.pin, name) for name in self.pin.__slots__}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SnapshotRow:
        """Return the row that `as_json` stored; ValueError, KeyError or TypeError for anything else."""
        parent = value["parent"]
        if not SNAPSHOT_PATTERN.fullmatch(value["id"]):
            raise ValueError(value["id"])
        if parent is not None and not SNAPSHOT_PATTERN.fullmatch(parent):
            raise ValueError(parent)
        bytes.fromhex(value["checksum"])
        return cls(
            id=value["id"],
            parent=parent,
            attempt=integer(value["attempt"]),
            checksum=value["checksum"],
            manifest_size=integer(value["manifest_size"]),
            created=bounded_time(value["created"]),
            label=str(value["label"]),
            volume_size=integer(value["volume_size"]),
            stored=integer(value["stored"]),
            pin=pin_from_json(value["pin"]),
            keep=value.get("keep", False) is True,
        )


@dataclass(frozen=True, slots=True)
class Packs:
    """Columns of packs, sorted by pack key: where each is and what of it is dead.

    key: pack keys; attempt and suffix: for its full name; size: of the object, bytes; slots: their number;
    dead: stored bytes of its dead slots.
    """

    key: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    attempt: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    suffix: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    size: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    slots: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    dead: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return int(self.key.size)

    def rows(self, mask: NDArray[Any]) -> Packs:
        """Return the rows that `mask` (booleans or indices) selects."""
        return Packs(*(getattr(self, name)[mask] for name in self.__slots__))

    def update(self, other: Packs) -> Packs:
        """Return these packs with those of `other` added; a row of `other` replaces one with the same key."""
        kept = self.rows(~np.isin(self.key, other.key))
        both = [
            np.concatenate([getattr(kept, n), getattr(other, n)]).astype(np.int64) for n in self.__slots__
        ]
        order = np.argsort(both[0], kind="stable")
        return Packs(*(column[order] for column in both))

    def find(self, keys: Int64s) -> Int64s:
        """Return the row of each of `keys`; -1 where there is none."""
        if not len(self):
            return np.full(keys.size, -1, np.int64)
        at = np.minimum(np.searchsorted(self.key, keys), len(self) - 1)
        return np.where(self.key[at] == keys, at, -1)


@dataclass(frozen=True, slots=True)
class OwnerChanged:
    """A host created or adopted the lineage: the record says which. Record 0 of every epoch, nowhere else."""

    kind: ClassVar = "owner"


@dataclass(frozen=True, slots=True)
class SnapshotAdded:
    """A snapshot was made. `packs` are those that it wrote, `dead` slots in them that it does not need."""

    kind: ClassVar = "snapshot"
    snapshot: SnapshotRow
    packs: Packs = field(default_factory=Packs)
    dead: Int64s = field(default_factory=lambda: NO_INTERVALS)


@dataclass(frozen=True, slots=True)
class SnapshotsDeleted:
    """Snapshots were deleted, by id. `dead` are the slots that nobody needs any more, `packs` their packs."""

    kind: ClassVar = "delete"
    deleted: tuple[str, ...]
    packs: Packs = field(default_factory=Packs)
    dead: Int64s = field(default_factory=lambda: NO_INTERVALS)


@dataclass(frozen=True, slots=True)
class SnapshotsMarked:
    """Live snapshots were marked to be kept, or their marks were removed, by id."""

    kind: ClassVar = "keep"
    kept: tuple[str, ...] = ()
    released: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ObjectsSwept:
    """A sweep removes packs and manifests, or it or a repair wrote packs again.

    `swept` are deleted snapshots whose manifests go, `gone` the keys of packs that go, `packs` the rows of
    packs that have new names.
    """

    kind: ClassVar = "sweep"
    swept: tuple[str, ...] = ()
    packs: Packs = field(default_factory=Packs)
    gone: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))


Event = OwnerChanged | SnapshotAdded | SnapshotsDeleted | SnapshotsMarked | ObjectsSwept
_EVENTS: Mapping[str, type[Event]] = {
    event.kind: event
    for event in (OwnerChanged, SnapshotAdded, SnapshotsDeleted, SnapshotsMarked, ObjectsSwept)
}


@dataclass(frozen=True, slots=True)
class Record:
    """An event and its place in the catalog.

    `writer` and `host` name the owner; `previous` is the checksum of the record before, hex, None for the
    first of epoch 0. `state` is a checkpoint: the state after the record. Pack keys and slot keys are in the
    numbering of the reader's SnapshotNumbers; they are stored by snapshot id.
    """

    lineage: str
    epoch: int
    number: int
    writer: str
    host: str
    previous: str | None
    time: int
    seed: int
    event: Event
    state: State | None = None
    write_features: int = 0  # of its object: bits that the next writer must know

    def apply_to(self, state: State) -> State:
        """Return the state after this record; DamagedObjectError if it does not fit `state`."""
        if self.state is not None:
            return self.state
        try:
            return state.after(self.event)
        except DamagedObjectError as error:
            raise DamagedObjectError(
                f"lineage {self.lineage}: record {self.epoch}-{self.number} does not fit the ones before it: "
                f"{error}; nothing is deleted until the catalog is repaired"
            ) from error


@dataclass(frozen=True, slots=True)
class State:
    """What is live in a lineage after its newest record.

    `live` is by snapshot id, in the order of their records; `dropped` are deleted snapshots whose manifests
    no sweep has removed yet; `dead` are the slot keys that no snapshot needs in packs that still exist,
    int64[n, 2], sorted and disjoint. `swept` are the last MOST_SWEPT snapshots that sweeps removed, by id: a
    copy of everything leaves them out. One that was copied here again is live all the same.
    """

    live: Mapping[str, SnapshotRow] = field(default_factory=dict)
    dropped: Mapping[str, SnapshotRow] = field(default_factory=dict)
    packs: Packs = field(default_factory=Packs)
    dead: Int64s = field(default_factory=lambda: NO_INTERVALS)
    swept: tuple[str, ...] = ()

    def after(self, event: Event) -> State:
        """Return the state after `event`; DamagedObjectError if it does not fit this one."""
        match event:
            case OwnerChanged():
                return self
            case SnapshotAdded():
                return self._add_snapshot(event)
            case SnapshotsDeleted():
                return self._drop_snapshots(event)
            case SnapshotsMarked():
                return self._mark_snapshots(event)
            case ObjectsSwept():
                return self._sweep(event)

    def _add_snapshot(self, event: SnapshotAdded) -> State:
        """Return the state with a new snapshot; refuse one whose id, or a pack of which, is known already."""
        row = event.snapshot
        used = row.id in self.live or row.id in self.dropped
        if used or bool((self.packs.find(event.packs.key) >= 0).any()):
            raise DamagedObjectError(f"snapshot {row.id} was made before")
        return self._update_packs(event.packs, event.dead, live={**self.live, row.id: row})

    def _drop_snapshots(self, event: SnapshotsDeleted) -> State:
        live, dropped = dict(self.live), dict(self.dropped)
        for snapshot in event.deleted:
            row = live.pop(snapshot, None)
            if row is None:
                raise DamagedObjectError(f"snapshot {snapshot} is deleted and was not live")
            dropped[snapshot] = row
            for child in [one for one in live.values() if one.parent == snapshot]:
                live[child.id] = replace(child, parent=row.parent)
        return self._update_packs(event.packs, event.dead, live=live, dropped=dropped)

    def _mark_snapshots(self, event: SnapshotsMarked) -> State:
        live = dict(self.live)
        for keep, snapshots in ((True, event.kept), (False, event.released)):
            for snapshot in snapshots:
                if snapshot not in live:
                    raise DamagedObjectError(f"snapshot {snapshot} is marked and is not live")
                live[snapshot] = replace(live[snapshot], keep=keep)
        return replace(self, live=live)

    @property
    def write_features(self) -> int:
        """Bits that a writer must understand to append after a record that leads to this state."""
        return _KEEPS if any(row.keep for row in self.live.values()) else 0

    def _update_packs(
        self,
        packs: Packs,
        dead: Int64s,
        live: Mapping[str, SnapshotRow] | None = None,
        dropped: Mapping[str, SnapshotRow] | None = None,
    ) -> State:
        """Return the state with `packs` added or replaced, and more dead slots."""
        return replace(
            self,
            packs=self.packs.update(packs) if len(packs) else self.packs,
            dead=merge_intervals(np.concatenate([self.dead, dead])),
            live=self.live if live is None else live,
            dropped=self.dropped if dropped is None else dropped,
        )

    def _sweep(self, event: ObjectsSwept) -> State:
        """Return the state without the manifests and packs that were swept away, and their dead slots."""
        dropped = {snapshot: row for snapshot, row in self.dropped.items() if snapshot not in event.swept}
        state = self._update_packs(event.packs, NO_INTERVALS, dropped=dropped)
        if event.swept:
            before = tuple(snapshot for snapshot in self.swept if snapshot not in event.swept)
            state = replace(state, swept=(before + event.swept)[-MOST_SWEPT:])
        gone = event.gone
        if not gone.size:
            return state
        space = np.stack([gone << SLOT_BITS, (gone + 1) << SLOT_BITS], axis=1)
        return replace(
            state,
            packs=state.packs.rows(~np.isin(state.packs.key, gone)),
            dead=subtract_intervals(state.dead, space),
        )

    def live_slots(self, key: int, slots: int) -> Bools:
        """Return which slots of the pack `key`, which has `slots` of them, are not dead."""
        keep = np.ones(slots, np.bool_)
        at, end = np.searchsorted(self.dead[:, 0], [key << SLOT_BITS, (key + 1) << SLOT_BITS])
        for first, stop in (self.dead[at:end] - (key << SLOT_BITS)).tolist():
            keep[first:stop] = False
        return keep

    def packs_to_sweep(self) -> tuple[Packs, Packs]:
        """Return the packs without a live slot, and those that are more than half dead.

        DamagedObjectError if slots are dead in a pack that the state does not have.
        """
        packs = self.packs
        dead_slots = np.zeros(len(packs), np.int64)
        rows = packs.find(self.dead[:, 0] >> SLOT_BITS)
        if (rows < 0).any():
            raise DamagedObjectError(
                "the catalog counts dead slots of a pack that it does not name; nothing was removed"
            )
        np.add.at(dead_slots, rows, self.dead[:, 1] - self.dead[:, 0])
        gone = dead_slots >= packs.slots
        return packs.rows(gone), packs.rows(~gone & (2 * packs.dead > packs.size))

    def reclaimable_bytes(self) -> int:
        """Return what a sweep without grace would free of what the state names: removed less rewritten."""
        gone, repacked = self.packs_to_sweep()
        manifests = sum(row.manifest_size for row in self.dropped.values())
        return int(gone.size.sum() + repacked.dead.sum()) + manifests

    def children(self, snapshot: str | None) -> list[SnapshotRow]:
        """Return the live snapshots whose parent is `snapshot`; for None those without a parent."""
        return [row for row in self.live.values() if row.parent == snapshot]

    def newest(self) -> SnapshotRow | None:
        """Return the newest live snapshot, which is the last of `live`; None if there is none."""
        return next(reversed(self.live.values()), None)  # type: ignore[call-overload]


def encode_record(name: str, record: Record, numbers: SnapshotNumbers) -> tuple[bytes, bytes]:
    """Return the bytes of the record as object `name`, and their checksum."""
    event = record.event
    snapshot: SnapshotRow | None = getattr(event, "snapshot", None)
    meta: dict[str, Any] = {
        "lineage": record.lineage,
        "epoch": record.epoch,
        "number": record.number,
        "writer": record.writer,
        "host": record.host,
        "previous": record.previous,
        "time": record.time,
        "event": event.kind,
        "seed": record.seed,
        "key": 0,
        "snapshot": snapshot.as_json() if snapshot else None,
        "deleted": getattr(event, "deleted", ()),
        "swept": getattr(event, "swept", ()),
        "checkpoint": None,
    }
    if isinstance(event, SnapshotsMarked):
        meta |= {"kept": event.kept, "released": event.released}
    tables = [
        (_PACKS, _pack_columns(getattr(event, "packs", Packs()))),
        (_GONE, [getattr(event, "gone", np.zeros(0, np.int64))]),
        (_DEAD, _slot_columns(getattr(event, "dead", NO_INTERVALS))),
    ]
    if record.state:
        meta["checkpoint"] = {
            "live": [row.as_json() for row in record.state.live.values()],
            "dropped": [row.as_json() for row in record.state.dropped.values()],
        }
        if record.state.swept:
            meta["checkpoint"]["swept"] = record.state.swept
        tables += [
            (_STATE_PACKS, _pack_columns(record.state.packs)),
            (_STATE_DEAD, _slot_columns(record.state.dead)),
        ]
    sections = []
    owners: dict[int, int] = {}
    for first, table in tables:
        meta[f"rows_{first}"] = int(table[0].size)
        owner = np.array(
            [owners.setdefault(int(o), len(owners)) for o in distinct(table[0] >> PACK_BITS)],
            np.int64,
        )
        local = owner[np.unique(table[0] >> PACK_BITS, return_inverse=True)[1]]
        stored = [local, table[0] & MAX_PACK_NUMBER, *table[1:]]
        # The second column of a large table is not compressed: so a reader finds bytes for its rows.
        fits = table[0].size <= _ROWS_FREE
        sections += [
            Section(first + i, [columns.encode(c)], compress=fits or i != 1) for i, c in enumerate(stored)
        ]
    meta["snapshots"] = [numbers.id(owner) for owner in owners]
    parts, checksum = seal(
        Kind.RECORD,
        name,
        [Section(_META, [json_bytes(meta)]), *sections],
        write_features=record.write_features,
    )
    return b"".join(parts), checksum


def _pack_columns(packs: Packs) -> list[Int64s]:
    return [getattr(packs, name) for name in Packs.__slots__]


def _slot_columns(dead: Int64s) -> list[Int64s]:
    """Return slot keys as columns: pack key, first slot, number of slots."""
    mask = (1 << SLOT_BITS) - 1
    return [dead[:, 0] >> SLOT_BITS, dead[:, 0] & mask, dead[:, 1] - dead[:, 0]]


def decode_record(name: str, data: Buffer, numbers: SnapshotNumbers) -> tuple[Record, str]:
    """Return the record in object `name`, checked, and its checksum in hex.

    Snapshots that it names get their numbers in `numbers`. DamagedObjectError for anything inconsistent,
    UnsupportedObjectError for an unknown event.
    """
    frame = open_frame(Kind.RECORD, name, data)
    meta = frame.json()
    if str(meta.get("event")) not in _EVENTS or meta.get("key") != 0:
        raise UnsupportedObjectError(
            f"catalog record {name} is of a kind that this version does not know; use a newer island"
        )
    try:
        ids = [i for i in meta["snapshots"] if SNAPSHOT_PATTERN.fullmatch(i)]
        if len(ids) != len(meta["snapshots"]):
            raise ValueError("snapshots")
        owners = numbers.numbers(ids)

        def table(first: int, width: int) -> list[Int64s]:
            rows, sections = integer(meta[f"rows_{first}"], _MAX_ROWS + 1), range(first, first + width + 1)
            if rows > _ROWS_FREE + _ROWS_PER_BYTE * frame.stored(sections):
                raise DamagedObjectError(f"catalog record {name} claims more rows than its bytes can hold")
            require_memory(f"catalog record {name}", rows * len(sections) * _ROW_MEMORY)
            owner, number, *rest = (
                columns.decode(name, frame.section(kind, 8 * rows), rows) for kind in sections
            )
            if owner.size and not (int(owner.max()) < owners.size and int(number.max()) <= MAX_PACK_NUMBER):
                raise ValueError("pack")
            return [pack_keys(owners[owner], number), *rest]

        event = _read_event(
            meta,
            packs=_sorted_packs(table(_PACKS, 6)),
            gone=table(_GONE, 1)[0],
            dead=_slot_keys(*table(_DEAD, 3)),
        )
        state = None
        if meta["checkpoint"] is not None:
            state = State(
                live=_rows(meta["checkpoint"]["live"]),
                dropped=_rows(meta["checkpoint"]["dropped"]),
                packs=_sorted_packs(table(_STATE_PACKS, 6)),
                dead=merge_intervals(_slot_keys(*table(_STATE_DEAD, 3))),
                swept=_ids(meta["checkpoint"].get("swept", [])),
            )
        record = _record(meta, event, state, frame.write_features)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedObjectError(f"catalog record {name} is damaged") from error
    return record, frame.checksum.hex()


def _read_event(meta: Mapping[str, Any], **tables: Packs | Int64s) -> Event:
    """Return the event; ValueError, KeyError or TypeError if a field is wrong, or not one of that event."""
    found: dict[str, Any] = {
        "deleted": tuple(str(x) for x in meta["deleted"]),
        "swept": tuple(str(x) for x in meta["swept"]),
        "kept": tuple(str(x) for x in meta.get("kept", ())),
        "released": tuple(str(x) for x in meta.get("released", ())),
        **tables,
    }
    if meta["snapshot"] is not None:
        found["snapshot"] = SnapshotRow.from_json(meta["snapshot"])
    event = _EVENTS[meta["event"]]
    own = {column.name for column in fields(event)}
    for name in [name for name in found if name not in own]:
        if name == "snapshot" or len(found.pop(name)):
            raise ValueError(name)
    return event(**found)


def _record(meta: Mapping[str, Any], event: Event, state: State | None, write_features: int) -> Record:
    """Return the record; ValueError, KeyError or TypeError if a field is wrong."""
    if not LINEAGE_PATTERN.fullmatch(meta["lineage"]):
        raise ValueError(meta["lineage"])
    record = Record(
        lineage=meta["lineage"],
        epoch=integer(meta["epoch"]),
        number=integer(meta["number"]),
        writer=str(meta["writer"]),
        host=str(meta["host"]),
        previous=meta["previous"],
        time=bounded_time(meta["time"]),
        seed=integer(meta["seed"]),
        event=event,
        state=state,
        write_features=write_features,
    )
    if record.number or record.epoch or not isinstance(event, OwnerChanged):
        bytes.fromhex(str(record.previous))
    return record


def _rows(values: list[Mapping[str, Any]]) -> dict[str, SnapshotRow]:
    return {row.id: row for row in map(SnapshotRow.from_json, values)}


def _ids(values: list[str]) -> tuple[str, ...]:
    """Return snapshot ids from a list in JSON; ValueError or TypeError for anything else."""
    if not all(SNAPSHOT_PATTERN.fullmatch(value) for value in values):
        raise ValueError("swept")
    return tuple(values)


def _sorted_packs(table: list[Int64s]) -> Packs:
    order = np.argsort(table[0], kind="stable")
    sorted_table = [column[order] for column in table]
    if not np.diff(sorted_table[0]).all():
        raise ValueError("a pack is named twice")
    size, slots = sorted_table[3], sorted_table[4]
    if int(slots.max(initial=0)) > MAX_SLOTS or int(size.max(initial=0)) > LIMITS[Kind.PACK].size:
        raise ValueError("a pack is larger than any")
    return Packs(*sorted_table)


def _slot_keys(pack: Int64s, slot: Int64s, length: Int64s) -> Int64s:
    """Return slot intervals from stored columns; ValueError for a run that leaves its pack."""
    if pack.size and int(slot.max()) + int(length.max()) > 1 << SLOT_BITS:
        raise ValueError("slot")
    starts = (pack << SLOT_BITS) | slot
    return np.stack([starts, starts + length], axis=1)
