"""What readers accept of sizes: all that a writer stores, and nothing that costs more than its bytes."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from island_fast import memory
from island_fast.errors import UNREADABLE, DamagedObjectError, MemoryBudgetError, RefusedError
from island_fast.formats import catalog, columns, frame, manifest
from island_fast.formats.catalog import OwnerChanged, Packs, Record, SnapshotRow, State, decode_record
from island_fast.formats.frame import LIMITS, Kind, Section, json_bytes, open_frame, seal
from island_fast.formats.keys import SnapshotNumbers, pack_keys
from island_fast.formats.manifest import Manifest, PackTable, decode, encode
from island_fast.formats.runs import Runs
from island_fast.qcow2.snapshots import PinnedBase

A = "a" * 32
PIN = PinnedBase("p", "1", 1, 1, 1 << 30)
TEXTS = st.text(max_size=40) | st.sampled_from(["", ",", "[{" * 20, '"' * 40, "\\" * 40, "x" * 3000])


def whole(kind: Kind, name: str, sections: list[Section]) -> bytes:
    return b"".join(seal(kind, name, sections)[0])


def row(number: int, label: str = "") -> SnapshotRow:
    return SnapshotRow(f"{number:032x}", None, 0, f"{number * 7919:032x}", 77, 5, label, 1 << 20, 99, PIN)


@given(st.lists(TEXTS, min_size=1, max_size=30), st.integers(0, 400))
@settings(deadline=None)
def test_every_checkpoint_that_is_written_is_read(labels: list[str], more: int) -> None:
    """Also the smallest rows, and labels that look like JSON."""
    live = [row(n, labels[n % len(labels)]) for n in range(len(labels) + more)]
    state = State({one.id: one for one in live})
    record = Record("v", 0, 32, "w" * 32, "h", "cd" * 32, 1, 7, OwnerChanged(), state=state)
    data, _ = catalog.encode_record("r", record, SnapshotNumbers())
    again, _ = decode_record("r", data, SnapshotNumbers())
    assert again.state is not None
    assert list(again.state.live.values()) == live


@pytest.mark.parametrize("text", [b"[],", b"{},", b"0,", b'"",', b'"a":1,', b"[[[[]]]],", b'"\\\\",'])
def test_json_of_many_values_is_refused_unparsed(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    data = whole(Kind.RECORD, "r", [Section(1, [b'{"z":[' + text * (MIB // len(text)) + b"0]}"])])
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("it was parsed"))
    with pytest.raises(DamagedObjectError, match="too many values"):
        open_frame(Kind.RECORD, "r", data).json()


MIB = 1 << 20


@pytest.mark.parametrize("kind", list(Kind))
def test_json_over_the_limit_of_its_kind_is_neither_written_nor_read(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = LIMITS[kind].json
    text = json_bytes({"a": "x" * (most - 7)})
    with pytest.raises(RefusedError, match="MiB of metadata"):
        seal(kind, "o", [Section(1, [text])])
    monkeypatch.setitem(frame.LIMITS, kind, replace(LIMITS[kind], json=most + 1))  # type: ignore[index]
    data = whole(kind, "o", [Section(1, [text])])
    monkeypatch.undo()
    with pytest.raises(DamagedObjectError, match="too large"):
        open_frame(kind, "o", data).json()


def test_json_that_would_compress_too_well_is_stored_as_it_is() -> None:
    text = json_bytes({"a": "x" * (8 * MIB)})
    opened = open_frame(Kind.RECORD, "r", whole(Kind.RECORD, "r", [Section(1, [text])]))
    assert opened.stored([1]) == len(text)
    assert opened.json() == json.loads(text)


def claiming(data: bytes, number: int, **changes: int) -> bytes:
    """The object with fields of a row of its section table changed, and all checksums right again."""
    blob = bytearray(data)
    at = 72 + 40 * number
    values = dict(
        zip(
            ("kind", "codec", "offset", "stored", "plain", "sum"),
            struct.unpack_from("<IIQQQQ", blob, at),
            strict=True,
        )
    )
    struct.pack_into("<IIQQQQ", blob, at, *(values | changes).values())
    count = struct.unpack_from("<H", blob, 10)[0]
    head = bytearray(blob[: 72 + 40 * count])
    head[48:72] = bytes(24)
    struct.pack_into("<Q", blob, 48, xxhash.xxh3_64_intdigest(head))
    blob[56:72] = bytes(16)
    blob[56:72] = xxhash.xxh3_128_digest(blob)
    return bytes(blob)


@given(st.integers(0, 1 << 63))
@settings(deadline=None)
def test_a_section_never_claims_more_than_zstd_can_hold(plain: int) -> None:
    data = whole(Kind.RECORD, "r", [Section(1, [b"{}"]), Section(2, [bytes(MIB)])])
    stored = open_frame(Kind.RECORD, "r", data).entries[2].stored
    changed = open_frame(Kind.RECORD, "r", claiming(data, 1, plain=plain))
    if plain == MIB:
        assert changed.section(2) == bytes(MIB)
        return
    with pytest.raises(
        DamagedObjectError, match="too large" if plain > stored << 15 else "wrong length|too large"
    ):
        changed.section(2)


def packs_record(rows: int) -> bytes:
    keys = pack_keys(np.zeros(rows, np.int64), np.arange(rows))
    same = np.full(rows, 4096)
    packs = Packs(
        keys, np.zeros(rows, np.int64), np.zeros(rows, np.int64), same, same, np.zeros(rows, np.int64)
    )
    dead = np.stack([keys << 16, (keys << 16) + 1], axis=1)
    state = State({A: row(1)}, {}, packs, dead)
    record = Record("v", 0, 0, "w" * 32, "h", None, 1, 7, OwnerChanged(), state=state)
    return catalog.encode_record("r", record, SnapshotNumbers([A]))[0]


@pytest.mark.parametrize("rows", [(1 << 18) - 1, 1 << 18, (1 << 18) + 1, 1 << 20])
def test_a_large_table_of_equal_packs_is_read(rows: int) -> None:
    """The most regular state that there can be: all packs alike, a slot of each dead."""
    record, _ = decode_record("r", packs_record(rows), SnapshotNumbers())
    assert record.state is not None
    assert (len(record.state.packs), len(record.state.dead)) == (rows, rows)


@pytest.mark.parametrize("column, value", [("slots", 4097), ("size", (260 << 20) + 1), ("slots", 1 << 62)])
def test_a_pack_larger_than_any_is_damage(column: str, value: int) -> None:
    one = np.array([1], np.int64)
    packs = replace(Packs(pack_keys(one - 1, one), one, one, one, one, one), **{column: np.array([value])})
    record = Record("v", 0, 0, "w" * 32, "h", None, 1, 7, OwnerChanged(), state=State({}, {}, packs))
    data, _ = catalog.encode_record("r", record, SnapshotNumbers([A]))
    with pytest.raises(DamagedObjectError):
        decode_record("r", data, SnapshotNumbers())


def regular(runs: int) -> Manifest:
    """Every second block, 4096 to a pack."""
    packs = -(-runs // 4096)
    zeros = np.zeros(packs, np.int64)
    table = PackTable(("v",), (A,), zeros, zeros, np.arange(packs))
    at = np.arange(runs)
    columns_ = Runs(
        2 * at, np.ones(runs, np.int32), (at // 4096).astype(np.int32), (at % 4096).astype(np.int32)
    )
    return Manifest("v", A, 0, None, runs << 17, 1, "", "full-scan", "", 7, PIN, table, columns_)


@pytest.mark.parametrize("runs", [0, 1, 65535, 65536, 65537, 200_000])
def test_manifests_are_decoded_over_windows(runs: int) -> None:
    data, _ = encode("m", regular(runs))
    found, _ = decode("m", data, -(-runs // 4096))
    for name in Runs.__slots__:
        assert np.array_equal(getattr(found.runs, name), getattr(regular(runs).runs, name))
    if runs:
        with pytest.raises(DamagedObjectError, match="more packs than its catalog has"):
            decode("m", data, -(-runs // 4096) - 1)


def test_a_perfect_pattern_is_written_so_that_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for free in (1 << 10, 1 << 21):
        monkeypatch.setattr(manifest, "_ROWS_FREE", free)
        data, _ = encode("m", regular(1 << 20))
        monkeypatch.setattr(manifest, "_ROWS_FREE", 1 << 10)
        if free == 1 << 10:
            decode("m", data)
            continue
        with pytest.raises(
            MemoryBudgetError, match="plausible; if you trust"
        ):  # as earlier versions wrote it
            decode("m", data)
        monkeypatch.setenv("ISLAND_TRUST_SIZES", "1")
        decode("m", data)


@given(st.data())
@settings(deadline=None)
def test_hostile_columns_end_in_an_error_or_in_runs_within_bounds(data: st.DataObject) -> None:
    """Any bytes in the place of any column."""
    good = regular(300)
    sections = [Section(1, [json_bytes(manifest._to_json(good))])]
    stored = [(kind, columns.encode(c)) for kind, c in manifest._stored_columns(good)]
    spoilt = data.draw(st.sampled_from([kind for kind, _ in stored]))
    for kind, plain in stored:
        if kind == spoilt:
            size = (
                len(plain) // max(1, len(plain) // (300 if kind >= 32 else 1)) * data.draw(st.integers(1, 8))
            )
            plain = data.draw(st.binary(min_size=size, max_size=size))
        sections.append(Section(kind, [plain]))
    try:
        found, _ = decode("m", whole(Kind.MANIFEST, "m", sections))
    except UNREADABLE:
        return
    runs = found.runs
    assert (runs.start >= 0).all()
    assert (runs.start[1:] >= runs.start[:-1] + runs.length[:-1]).all()
    assert int(runs.start[-1] + runs.length[-1]) <= found.blocks
    assert ((runs.slot >= 0) & (runs.slot + runs.length <= 4096)).all()
    assert ((runs.pack >= 0) & (runs.pack < len(found.packs))).all()


def test_memory_is_what_the_kernel_and_the_limits_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemTotal"))
    assert 0 < memory.available_memory() < total
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 30)
    memory.require_memory("it", 1 << 29)
    with pytest.raises(
        MemoryBudgetError, match=r"it would take 513 MiB of memory, and this host has 512 MiB"
    ):
        memory.require_memory("it", (1 << 29) + 1)
    monkeypatch.setenv("ISLAND_TRUST_SIZES", "1")
    memory.require_memory("it", 1 << 40)
    assert issubclass(MemoryBudgetError, Exception)
    assert not issubclass(MemoryBudgetError, UNREADABLE), "what is too large is not taken for damage"
