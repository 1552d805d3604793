"""Every format round-trips, and every corruption of one byte of an object is noticed."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from island_fast.errors import DamagedError, IslandError, UnsupportedObjectError, UsageError
from island_fast.formats import columns
from island_fast.formats.catalog import (
    Event,
    ObjectsSwept,
    OwnerChanged,
    Packs,
    Record,
    SnapshotAdded,
    SnapshotRow,
    SnapshotsDeleted,
    State,
    decode_record,
    encode_record,
)
from island_fast.formats.frame import HEADER_SIZE, Kind, Section, open_frame, seal
from island_fast.formats.keys import SnapshotNumbers, pack_keys
from island_fast.formats.manifest import Manifest, build_pack_table, decode, encode
from island_fast.formats.pack import (
    ABSENT,
    PackHeader,
    compress_blocks,
    digest_blocks,
    front_size,
    open_pack,
    read_front,
    seal_pack,
    stored_ranges,
    unpack_blocks,
)
from island_fast.formats.runs import Runs, merge
from island_fast.qcow2.snapshots import PinnedBase

A, B = "a" * 32, "b" * 32
PIN = PinnedBase("island-x", "1", 1_700_000_000, 5, 1 << 30)


def array(values: list[int]) -> np.ndarray:
    return np.array(values, np.int64)


@st.composite
def runs(draw: st.DrawFn, packs: list[int]) -> Runs:
    """Random runs over pack keys taken from `packs`."""
    rows = []
    at = 0
    for gap, length, pack, slot in draw(
        st.lists(
            st.tuples(st.integers(0, 300), st.integers(1, 40), st.sampled_from(packs), st.integers(0, 4000)),
            max_size=30,
        )
    ):
        rows.append((at + gap, length, pack, slot))
        at += gap + length
    table = np.array(rows, np.int64).reshape(-1, 4)
    return Runs(*(np.ascontiguousarray(table[:, i]) for i in range(4)))


def manifest_of(rows: Runs, numbers: SnapshotNumbers) -> Manifest:
    table, indexed = build_pack_table(rows, "vol", numbers)
    return Manifest(
        lineage="vol", snapshot=A, attempt=0, parent=B, volume_size=100_000 * 65536, created=123,
        label="läbel", rule="table-diff", reason="why", seed=2**63 - 5, pin=PIN, packs=table,
        runs=indexed, properties={"unknown": "kept"},
    )  # fmt: skip


def packs_for(numbers: SnapshotNumbers) -> list[int]:
    owners = numbers.numbers([A, B, "c" * 32])
    return [int(k) for o in owners for k in pack_keys(np.full(3, o), array([0, 1, 70000]))]


@given(st.data())
@settings(deadline=None)
def test_a_manifest_round_trips(data: st.DataObject) -> None:
    numbers = SnapshotNumbers()
    manifest = manifest_of(data.draw(runs(packs_for(numbers))), numbers)
    blob, checksum = encode("vol/manifests/x", manifest)
    again, found = decode("vol/manifests/x", blob)
    assert found == checksum
    assert replace(again, runs=manifest.runs, packs=manifest.packs) == manifest
    for name in Runs.__slots__:
        assert np.array_equal(getattr(again.runs, name), getattr(manifest.runs, name))
    assert np.array_equal(again.packs.keys(numbers), manifest.packs.keys(numbers))


@given(st.lists(st.integers(0, 2**62)), st.lists(st.integers(-(2**61), 2**61)))
def test_columns_round_trip(values: list[int], signed: list[int]) -> None:
    column = array(values)
    assert np.array_equal(columns.decode("x", columns.encode(column), len(values)), column)
    assert np.array_equal(columns.unzigzag(columns.zigzag(array(signed))), array(signed))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 50), st.integers(1, 9))))
def test_grouped_deltas_undo(rows: list[tuple[int, int, int]]) -> None:
    table = np.array(rows, np.int64).reshape(-1, 3)
    group, start, length = (np.ascontiguousarray(table[:, i]) for i in range(3))
    deltas = start - columns.ends_before(group, start + length)
    starts, middle = columns.GroupedStarts(5), len(rows) // 2
    parts = (slice(0, middle), slice(middle, None))
    found = [starts.restore(group[part], deltas[part], length[part]) for part in parts]
    assert np.array_equal(np.concatenate(found), start)


@given(st.data())
@settings(deadline=None)
def test_merge_equals_a_dict_of_blocks(data: st.DataObject) -> None:
    def as_dict(r: Runs) -> dict[int, tuple[int, int]]:
        return {
            int(s) + i: (int(p), int(t) + i)
            for s, n, p, t in zip(r.start, r.length, r.pack, r.slot, strict=True)
            for i in range(int(n))
        }

    parent, other = data.draw(runs([1, 2, 3])), data.draw(runs([8, 9]))
    cut = data.draw(st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 500)), max_size=8))
    replaced = np.array([(a, a + n) for a, n in cut], np.int64).reshape(-1, 2)
    gone = {b for a, n in cut for b in range(a, a + n)}
    fresh_model = {b: v for b, v in as_dict(other).items() if b in gone}
    from island_fast.dirtymap import merge_intervals

    fresh = other.within(merge_intervals(replaced)) if len(other) else other
    model = {b: v for b, v in as_dict(parent).items() if b not in gone} | fresh_model
    merged = merge(parent, replaced, fresh)
    assert as_dict(merged) == model
    assert (merged.start[1:] >= (merged.start + merged.length)[:-1]).all()


def small_pack(noise: bool = True) -> tuple[str, bytes, np.ndarray]:
    data = np.random.default_rng(3).integers(0, 256 if noise else 1, (3, 65536), dtype=np.uint8)
    data[1] = 7
    stored, lengths, codecs = compress_blocks(data, np.arange(len(data)))
    name = f"vol/packs/{A}/0-00000000"
    parts, _ = seal_pack(
        name, PackHeader("vol", A, 0, 99), [b"".join(stored)], lengths, codecs, digest_blocks(data, 99)
    )
    return name, b"".join(parts), data


def blocks_of(name: str, blob: bytes, slots: list[int]) -> np.ndarray:
    index, view = open_pack(name, blob)
    offsets, lengths = stored_ranges(index, array(slots))
    out = np.empty((len(slots), 65536), np.uint8)
    unpack_blocks(index, array(slots), [view[o : o + n] for o, n in zip(offsets, lengths, strict=True)], out)
    return out


def test_a_pack_round_trips_and_its_front_is_enough_for_the_index() -> None:
    name, blob, data = small_pack()
    assert np.array_equal(blocks_of(name, blob, [0, 1, 2]), data)
    assert np.array_equal(blocks_of(name, blob, [2]), data[2:])
    front = read_front(name, blob[: front_size(3)])
    assert np.array_equal(front.rows, open_pack(name, blob)[0].rows)


def test_a_block_is_checked_when_its_stored_bytes_come_by_range() -> None:
    name, blob, _ = small_pack()
    index = read_front(name, blob[: front_size(3)])
    offsets, lengths = stored_ranges(index, array([0, 1]))
    out = np.empty((1, 65536), np.uint8)
    for row in range(2):
        part = bytearray(blob[int(offsets[row]) : int(offsets[row] + lengths[row])])
        for at in range(0, len(part), 997 if row == 0 else 1):
            part[at] ^= 0x55
            try:
                unpack_blocks(index, array([row]), [memoryview(part)], out)
                assert np.array_equal(out, small_pack()[2][row : row + 1])  # a bit that zstd ignores
            except DamagedError:
                pass
            part[at] ^= 0x55


def test_an_absent_slot_and_one_past_the_end_are_refused() -> None:
    name, blob, data = small_pack()
    index, _ = open_pack(name, blob)
    with pytest.raises(DamagedError, match="lacks a slot"):
        stored_ranges(index, array([3]))
    lengths, codecs = index.lengths.copy(), index.rows["codec"].copy()
    lengths[1], codecs[1] = 0, ABSENT
    parts, _ = seal_pack(
        name, index.header, [data[0].tobytes(), data[2].tobytes()], lengths, codecs, index.digests
    )
    assert np.array_equal(blocks_of(name, b"".join(parts), [0, 2]), data[[0, 2]])
    with pytest.raises(DamagedError, match="no longer holds"):
        stored_ranges(open_pack(name, b"".join(parts))[0], array([1]))


def packs_of(numbers: SnapshotNumbers) -> Packs:
    keys = array(packs_for(numbers)[:2])
    return Packs(keys, array([0, 1]), array([0, 2**62]), array([9, 10]), array([3, 4]), array([0, 7]))


ROW = SnapshotRow(A, B, 0, "ab" * 16, 77, 5, "label", 1 << 40, 99, PIN)


def events(numbers: SnapshotNumbers) -> list[Event]:
    packs = packs_of(numbers)
    keys = packs.key
    dead = np.array([[keys[0] << 16, (keys[0] << 16) + 3]], np.int64)
    return [
        OwnerChanged(),
        SnapshotAdded(ROW, packs, dead),
        SnapshotsDeleted((B, A), packs, dead),
        ObjectsSwept(("c" * 32,), packs, keys[:1]),
    ]


def record(numbers: SnapshotNumbers, event: Event, state: State | None = None) -> Record:
    return Record("vol", 1, 32, "w" * 32, "host", "cd" * 16, 12345, 7, event, state)


def in_ids(event: Event, numbers: SnapshotNumbers) -> object:
    """The event with pack keys as snapshot ids and pack numbers, comparable."""

    def plain(value: object) -> object:
        if isinstance(value, Packs):
            return sorted((numbers.id(k >> 28), k & (1 << 28) - 1) for k in value.key.tolist())
        if isinstance(value, np.ndarray):
            return sorted((numbers.id(int(k) >> 44 if value.ndim == 2 else int(k) >> 28)) for k in value.flat)
        return value

    return type(event), [plain(getattr(event, column.name)) for column in fields(event)]


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("number", range(4))
def test_a_record_round_trips(number: int, checkpoint: bool) -> None:
    numbers = SnapshotNumbers()
    event, packs = events(numbers)[number], packs_of(numbers)
    dead = np.array([[packs.key[0] << 16, (packs.key[0] << 16) + 3]], np.int64)
    state = State({A: ROW}, {B: replace(ROW, id=B)}, packs, dead)
    original = record(numbers, event, state if checkpoint else None)
    blob, checksum = encode_record("n", original, numbers)
    fresh = SnapshotNumbers(["c" * 32, B])  # another numbering: keys must be translated
    again, found = decode_record("n", blob, fresh)
    assert found == checksum.hex()
    assert in_ids(again.event, fresh) == in_ids(event, numbers)
    twice, _ = encode_record("n", again, fresh)
    back, _ = decode_record("n", twice, numbers)
    for column in fields(event):
        if isinstance(was := getattr(event, column.name), np.ndarray):
            assert np.array_equal(getattr(back.event, column.name), was)
    if not isinstance(event, OwnerChanged):
        assert not isinstance(back.event, OwnerChanged)
        assert np.array_equal(back.event.packs.suffix, event.packs.suffix)
    assert (back.state is not None) == checkpoint
    if back.state:
        assert list(back.state.live) == [A]
        assert list(back.state.dropped) == [B]


def objects() -> list[tuple[str, bytes, object]]:
    numbers = SnapshotNumbers()
    rows = Runs(array([0, 9]), array([3, 2]), array(packs_for(numbers)[:2]), array([0, 5]))
    manifest, _ = encode("m", manifest_of(rows, numbers))
    blob, _ = encode_record("r", record(numbers, events(numbers)[1]), numbers)
    name, pack, _ = small_pack()
    _, tiny, _ = small_pack(noise=False)
    plain = seal(Kind.REPOSITORY, "repository", [Section(1, [b'{"id":"x"}'])])[0]
    return [
        ("manifest", manifest, lambda b: decode("m", b)),
        ("record", blob, lambda b: decode_record("r", b, SnapshotNumbers())),
        ("pack", pack, lambda b: open_pack(name, b)),
        ("tiny pack", tiny, lambda b: open_pack(name, b)),
        ("repository", b"".join(plain), lambda b: open_frame(Kind.REPOSITORY, "repository", b)),
    ]


@pytest.mark.parametrize("kind", ["manifest", "record", "pack", "tiny pack", "repository"])
def test_every_single_byte_corruption_is_detected(kind: str) -> None:
    _, blob, read = next(o for o in objects() if o[0] == kind)
    read(blob)  # type: ignore[operator]
    step = 1 if len(blob) < 10_000 else 61  # of the large pack a sample of its noise
    places = sorted({*range(min(len(blob), 1000)), *range(0, len(blob), step), len(blob) - 1})
    for at in places:
        damaged = bytearray(blob)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises((DamagedError, UnsupportedObjectError)):
            read(bytes(damaged))  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["manifest", "record", "pack", "repository"])
def test_a_cut_or_lengthened_object_is_detected(kind: str) -> None:
    _, blob, read = next(o for o in objects() if o[0] == kind)
    for size in {*range(min(len(blob), 700)), len(blob) - 1}:
        with pytest.raises(DamagedError):
            read(blob[:size])  # type: ignore[operator]
    with pytest.raises(DamagedError):
        read(blob + b"\0")  # type: ignore[operator]


def test_an_object_under_anothers_name_is_refused() -> None:
    _, blob, _ = objects()[0]
    with pytest.raises(DamagedError, match="another object"):
        decode("other", blob)


def test_an_unknown_version_or_feature_is_refused_by_name() -> None:
    blob = bytearray(b"".join(seal(Kind.REPOSITORY, "repository", [Section(1, [b"{}"])])[0]))
    for at in (8, 16):
        newer = bytearray(blob)
        newer[at] ^= 0x80
        with pytest.raises(UnsupportedObjectError, match="use a newer one"):
            open_frame(Kind.REPOSITORY, "repository", newer)
    assert HEADER_SIZE == 72


def test_properties_are_bounded() -> None:
    numbers = SnapshotNumbers()
    manifest = manifest_of(Runs.empty(), numbers)
    for properties in ({str(i): "" for i in range(300)}, {"a": "x" * 100_000}):
        with pytest.raises(UsageError):
            encode("m", replace(manifest, properties=properties))


@given(st.binary(max_size=300))
def test_random_bytes_are_no_object(data: bytes) -> None:
    for read in (lambda b: decode("m", b), lambda b: decode_record("r", b, SnapshotNumbers())):
        with pytest.raises(IslandError):
            read(data)
