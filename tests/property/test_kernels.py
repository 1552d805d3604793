"""Every kernel equals its slow twin, stays in its buffers, refuses what does not fit, frees the GIL."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
import twins
from hypothesis import given, settings
from hypothesis import strategies as st

from island_fast import _diff

LENGTHS = [0, 1, 7, 8, 9, 63, 64, 65, 130]
# (cluster_bits, words per entry): extended L2 needs clusters of 16 KiB.
SHAPES = [*((bits, 1) for bits in range(9, 22)), *((bits, 2) for bits in range(14, 22))]
OTHER = 0xA5A5_A5A5_A5A5_A5A5
COPIED, COMPRESSED = 1 << 63, 1 << 62


@st.composite
def entry(draw, cluster_bits: int) -> int:
    """One L2 entry: mostly the combinations of flags that images hold, sometimes any 64 bits."""
    flags = draw(st.sampled_from([0, COPIED, 1, COPIED | 1, COMPRESSED, COPIED | COMPRESSED]))
    if flags & COMPRESSED:
        return flags | draw(st.integers(0, COMPRESSED - 1))
    shape = draw(st.sampled_from(["none", "aligned", "top", "any"]))
    if shape == "none":
        return flags
    if shape == "aligned":
        return flags | draw(st.integers(1, 64)) << cluster_bits
    if shape == "top":
        return flags | 0x00FF_FFFF_FFFF_FFFF >> cluster_bits << cluster_bits
    return draw(st.integers(0, 2**64 - 1))


@st.composite
def bitmap(draw) -> int:
    """A subcluster bitmap: mostly one without a subcluster that is stored and zero."""
    whole = st.sampled_from([0, 0xFFFF_FFFF, 1, 1 << 31])
    stored, zero = draw(whole | st.integers(0, 2**32 - 1)), draw(whole | st.integers(0, 2**32 - 1))
    return (zero if draw(st.booleans()) else zero & ~stored) << 32 | stored


@st.composite
def table(draw, cluster_bits: int, length: int, words: int = 1) -> list[int]:
    """The words of a table in which whole groups are alike, as in real ones: a few values, in stretches."""
    values: list[int] = []
    while len(values) < length * words:
        value = [draw(entry(cluster_bits))] + [draw(bitmap()) for _ in range(words - 1)]
        values += value * draw(st.sampled_from([1, 1, 2, 5, 64, 200]))
    return values[: length * words]


@st.composite
def place(draw, cluster_bits: int, length: int) -> tuple[int, int]:
    """(first_cluster, blocks) about the borders of words; the map ends before, in or after the entries."""
    borders = st.sampled_from([0, 1, 31, 63, 64, 65, 127, 128, 192])
    first = draw(borders | st.integers(0, 10_000 >> max(cluster_bits - 16, 0)))
    last_byte = (first + length) << cluster_bits
    blocks = max(0, last_byte // 65536 + draw(st.integers(-40, 40)))
    return first, blocks


def block_map(blocks: int, seed: int) -> np.ndarray:
    """A bitmap with some bits set already and one word too many, which nobody may touch."""
    count = (blocks + 63) // 64
    words = np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)
    words &= np.random.default_rng(seed + 1).integers(0, 2**64, count, np.uint64)
    if blocks % 64:
        words[-1] &= np.uint64((1 << blocks % 64) - 1)
    return np.append(words, np.uint64(OTHER))


def set_bits(words: np.ndarray, blocks: int) -> set[int]:
    return {i for i, flag in enumerate(twins.bits(words[: (blocks + 63) // 64])) if flag}


def check_marks(expected: twins.Marks, call, blocks: int, seed: int) -> None:
    words = block_map(blocks, seed)
    before = set_bits(words, blocks)
    assert call(words) == expected[0]
    assert set_bits(words, blocks) == before | expected[1]
    assert words[-1] == OTHER


@pytest.mark.parametrize("cluster_bits, per_entry", SHAPES)
@settings(deadline=None)
@given(data=st.data(), length=st.sampled_from(LENGTHS), seed=st.integers(0, 99))
def test_mark_allocated(cluster_bits, per_entry, data, length, seed):
    entries = twins.raw(data.draw(table(cluster_bits, length, per_entry)))
    first, blocks = data.draw(place(cluster_bits, length))
    expected = twins.mark_allocated(entries, first, cluster_bits, blocks, per_entry)
    check_marks(
        expected,
        lambda words: _diff.mark_allocated(entries, first, cluster_bits, words, blocks, per_entry),
        blocks,
        seed,
    )


@pytest.mark.parametrize("cluster_bits, per_entry", SHAPES)
@settings(deadline=None)
@given(data=st.data(), length=st.sampled_from(LENGTHS), seed=st.integers(0, 99))
def test_mark_changed(cluster_bits, per_entry, data, length, seed):
    old = data.draw(table(cluster_bits, length, per_entry))
    how = data.draw(st.sampled_from(["copied", "bits", "other"]))
    if how == "other":
        new = data.draw(table(cluster_bits, length, per_entry))
    else:
        last = max(length * per_entry - 1, 0)
        edits = data.draw(st.lists(st.integers(0, last), max_size=5)) if length else []
        new = (
            [value ^ (COPIED if data.draw(st.booleans()) else 0) for value in old]
            if how == "copied"
            else list(old)
        )
        for at in edits:
            new[at] ^= 1 << data.draw(st.integers(0, 63))
    a, b = twins.raw(old), twins.raw(new)
    first, blocks = data.draw(place(cluster_bits, length))
    expected = twins.mark_changed(a, b, first, cluster_bits, blocks, per_entry)

    def call(words):
        return _diff.mark_changed(a, b, first, cluster_bits, words, blocks, per_entry)

    check_marks(expected, call, blocks, seed)


@pytest.mark.parametrize("bit", range(64))
def test_each_bit_of_an_entry_is_a_change_but_copied(bit):
    a = twins.raw([0x0000_0000_0003_0000] * 3)
    b = a.copy()
    b[1:2] ^= twins.raw([1 << bit])
    words = np.zeros(1, np.uint64)
    assert _diff.mark_changed(a, b, 0, 16, words, 3) == (bit != 63)
    assert int(words[0]) == (2 if bit != 63 else 0)
    # In a bitmap every bit counts, the highest too.
    pair = twins.raw([0x30000, 0])
    other = twins.raw([0x30000, 1 << bit])
    assert _diff.mark_changed(pair, other, 0, 16, words, 3, 2) == 1


@pytest.mark.parametrize("length", LENGTHS)
def test_entries_past_the_end_are_not_looked_at(length):
    """A longer table's next entry differs and is allocated, but is not part of what was given."""
    a = np.zeros(length + 1, np.uint64)
    b = a.copy()
    b[length] = twins.raw([COPIED | 0x50000])[0]
    words = np.zeros(4, np.uint64)
    assert _diff.mark_changed(a[:length], b[:length], 0, 16, words, 256) == 0
    assert _diff.mark_allocated(b[:length], 0, 16, words, 256) == 0
    b[length] = twins.raw([1 | 0x50001 << 9])[0]
    columns = [np.full(length + 1, 77, t) for t in (np.uint8, np.uint64, np.uint32)]
    assert _diff.decode_l2(b[:length], 16, 3, 1 << 40, *(c[:length] for c in columns)) == -1
    assert not words.any()
    assert [int(c[length]) for c in columns] == [77, 77, 77]


@pytest.mark.parametrize("cluster_bits, per_entry", SHAPES)
@settings(deadline=None)
@given(data=st.data(), length=st.sampled_from(LENGTHS), version=st.sampled_from([2, 3]))
def test_decode_l2(cluster_bits, per_entry, data, length, version):
    values = data.draw(table(cluster_bits, length, per_entry))
    sizes = st.sampled_from([0, 1, 1 << cluster_bits, (1 << cluster_bits) + 1, 1 << 40, 2**63 - 1])
    file_size = data.draw(sizes | st.integers(0, 65 << cluster_bits))
    entries = twins.raw(values)
    kinds, offsets, lengths = (np.full(length, 99, t) for t in (np.uint8, np.uint64, np.uint32))
    expected, rows = twins.decode_l2(entries, cluster_bits, version, file_size, per_entry)
    columns = (kinds, offsets, lengths)
    assert _diff.decode_l2(entries, cluster_bits, version, file_size, *columns, per_entry) == expected
    done = len(rows)
    got = zip(kinds[:done].tolist(), offsets[:done].tolist(), lengths[:done].tolist(), strict=True)
    assert list(got) == rows
    assert all(set(column[done:].tolist()) <= {99} for column in (kinds, offsets, lengths))


@pytest.mark.parametrize("cluster_bits, per_entry", SHAPES)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), length=st.sampled_from(LENGTHS), version=st.sampled_from([2, 3]))
def test_map_l2(cluster_bits, per_entry, data, length, version):
    entries = twins.raw(data.draw(table(cluster_bits, length, per_entry)))
    how = data.draw(st.sampled_from(["alone", "other", "copied", "near"]))
    other = None
    if how == "other":
        other = twins.raw(data.draw(table(cluster_bits, length, per_entry)))
    elif how != "alone":
        other = entries.copy()
        for at in data.draw(st.lists(st.integers(0, length - 1), max_size=5)) if length else []:
            bit = COPIED if how == "copied" else 1 << data.draw(st.integers(0, 63))
            other[at * per_entry] ^= twins.raw([bit])[0]
    file_size = data.draw(st.sampled_from([0, 1 << cluster_bits, 1 << 40, 2**63 - 1]))
    room = length * (32 if per_entry == 2 else 1) + 1
    starts, kinds = np.full(room, 99), np.full(room, 99, np.uint8)
    expected, bad = twins.map_l2(entries, other, cluster_bits, version, file_size, per_entry)
    found = _diff.map_l2(entries, other, cluster_bits, version, file_size, starts, kinds, per_entry)
    rows = len(expected)
    assert found == (rows, bad)
    assert list(zip(starts[:rows].tolist(), kinds[:rows].tolist(), strict=True)) == expected
    assert set(starts[rows:].tolist()) == set(kinds[rows:].tolist()) == {99}


@settings(deadline=None)
@given(data=st.data(), count=st.sampled_from([0, 1, 2, 3, 9]), rows=st.integers(1, 5))
def test_bitmap_runs(data, count, rows):
    word = st.sampled_from([0, 2**64 - 1, 1, 1 << 63, OTHER]) | st.integers(0, 2**64 - 1)
    words = np.array(data.draw(st.lists(word, min_size=count, max_size=count)), np.uint64)
    stop = data.draw(st.integers(0, 64 * count))
    first = data.draw(st.integers(0, stop))
    runs = np.full((rows + 1, 2), -7, np.int64)
    found: list[tuple[int, int]] = []
    at, calls = first, 0
    while calls == 0 or at < stop:
        filled, reached = _diff.bitmap_runs(words, at, stop, runs[:rows])
        assert filled == rows or reached == stop
        found += map(tuple, runs[:filled].tolist())
        at, calls = reached, calls + 1
    assert found == twins.bitmap_runs(words, first, stop)
    assert calls <= len(found) // rows + 1
    assert runs[rows].tolist() == [-7, -7]


@pytest.mark.parametrize("kernel", [_diff.hash_blocks, _diff._hash_with_package])
@pytest.mark.parametrize("block_size", [1, 3, 16, 17, 128, 129, 240, 241, 512, 1024, 4096, 65536])
@settings(deadline=None)
@given(
    count=st.sampled_from([1, 2, 7, 8, 9]),
    seed=st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1),
    content=st.integers(0, 9),
)
def test_hash_blocks(kernel, block_size, count, seed, content):
    data = np.random.default_rng(content).integers(0, 256, count * block_size, np.uint8)
    data[: content * 5] = 0
    digests = np.full((count + 1, 16), 7, np.uint8)
    kernel(data, block_size, seed, digests[:count])
    assert [row.tobytes() for row in digests[:count]] == twins.hash_blocks(data, block_size, seed)
    assert set(digests[count].tolist()) == {7}


def test_hash_of_no_blocks_and_of_known_ones():
    _diff.hash_blocks(np.zeros(0, np.uint8), 65536, 0, np.zeros((0, 16), np.uint8))
    digest = np.zeros((1, 16), np.uint8)
    _diff.hash_blocks(np.frombuffer(b"abc", np.uint8), 3, 0, digest)
    assert digest.tobytes().hex() == "06b05ab6733a618578af5f94892f3950"


def test_hash_kernel_is_named():
    name, *version = _diff.HASH_KERNEL.split(" ")
    assert name in ("libxxhash", "python-xxhash")
    assert [len(v.split(".")) for v in version] == ([3] if name == "libxxhash" else [])


@settings(deadline=None)
@given(
    block_size=st.sampled_from([1, 2, 15, 16, 17, 31, 33, 512, 4096]),
    count=st.sampled_from([0, 1, 2, 9]),
    spots=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=6),
)
def test_zero_blocks(block_size, count, spots):
    # One byte before and one behind are not zero: reading them would show.
    around = np.full(block_size * count + 2, 255, np.uint8)
    data = around[1:-1]
    data[:] = 0
    for at, value in spots:
        if data.size:
            data[at % data.size] = value
    flags = np.full(count + 1, 9, np.uint8)
    expected = twins.zero_blocks(data, block_size)
    assert _diff.zero_blocks(data, block_size, flags[:count]) == sum(expected)
    assert flags.tolist() == [*expected, 9]


@pytest.mark.parametrize("block_size", [1, 15, 16, 17, 32, 100])
def test_one_byte_anywhere_makes_a_block_not_zero(block_size):
    data = np.eye(block_size, dtype=np.uint8).reshape(-1) * 128
    assert _diff.zero_blocks(data, block_size, np.ones(block_size, np.uint8)) == 0


@settings(deadline=None)
@given(data=st.data(), size=st.sampled_from([0, 1, 9, 64]), room=st.sampled_from([0, 1, 9, 64]))
def test_copy_ranges(data, size, room):
    source = np.arange(size, dtype=np.uint8)
    target = np.arange(100, 100 + room, dtype=np.uint8)
    longest = min(size, room)
    lengths = data.draw(st.lists(st.integers(0, longest), max_size=5))
    froms = [data.draw(st.integers(0, size - length)) for length in lengths]
    tos = [data.draw(st.integers(0, room - length)) for length in lengths]
    expected = twins.copy_ranges(source.tobytes(), froms, lengths, target.tobytes(), tos)
    columns = [np.array(column, np.int64) for column in (froms, lengths, tos)]
    assert _diff.copy_ranges(source, columns[0], columns[1], target, columns[2]) == sum(lengths)
    assert target.tobytes() == expected


@pytest.mark.parametrize(
    ("start", "length", "to"),
    [
        (0, 9, 0), (8, 1, 0), (9, 0, 0), (-1, 1, 0), (0, -1, 0), (2**63 - 1, 1, 0), (1, 2**63 - 1, 0),
        (0, 2, 5), (0, 0, 7), (0, 1, -1), (0, 1, 2**63 - 1), (-(2**63), 1, 0), (0, -(2**63), 0),
    ],
)  # fmt: skip
def test_copy_ranges_outside_copies_nothing(start, length, to):
    source, target = np.ones(8, np.uint8), np.zeros(6, np.uint8)
    columns = [np.array([0, value], np.int64) for value in (start, length, to)]
    columns[1][0] = 1
    with pytest.raises(ValueError, match="range 1"):
        _diff.copy_ranges(source, columns[0], columns[1], target, columns[2])
    assert not target.any()


def test_copy_ranges_within_one_buffer():
    buffer = np.arange(10, dtype=np.uint8)
    one = np.array([0], np.int64)
    assert _diff.copy_ranges(buffer, one, one + 8, buffer, one + 2) == 8
    assert buffer.tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "changes",
    [
        {"first": -1}, {"first": 2**54 + 1}, {"bits": 8}, {"bits": 22}, {"per_entry": 0},
        {"per_entry": 3}, {"per_entry": 2, "bits": 13}, {"per_entry": -1},
        {"blocks": -1}, {"blocks": 65}, {"blocks": 2**47 + 1}, {"blocks": 2**63 - 1},
        {"words": np.zeros(1, np.int64)}, {"words": np.zeros(1, ">u8")}, {"words": np.zeros((1, 1), "u8")},
        {"words": np.zeros(4, np.uint64)[::2]}, {"words": np.frombuffer(bytes(8), np.uint64)},
    ],
    ids=str,
)  # fmt: skip
def test_marks_refuse_what_does_not_fit(changes):
    fits = {"first": 0, "bits": 16, "words": np.zeros(1, np.uint64), "blocks": 64, "per_entry": 1}
    entries, rest = np.zeros(4, np.uint64), list((fits | changes).values())
    assert _diff.mark_allocated(entries, *fits.values()) == 0
    with pytest.raises(ValueError):
        _diff.mark_allocated(entries, *rest)
    with pytest.raises(ValueError):
        _diff.mark_changed(entries, entries, *rest)


def test_half_an_extended_entry_is_refused():
    words, columns = np.zeros(1, "u8"), [np.zeros(1, t) for t in (np.uint8, np.uint64, np.uint32)]
    with pytest.raises(ValueError, match="3 words are not a whole number"):
        _diff.mark_allocated(np.zeros(3, "u8"), 0, 16, words, 64, 2)
    with pytest.raises(ValueError, match="3 words are not a whole number"):
        _diff.mark_changed(np.zeros(3, "u8"), np.zeros(3, "u8"), 0, 16, words, 64, 2)
    with pytest.raises(ValueError, match="3 words are not a whole number"):
        _diff.decode_l2(np.zeros(3, "u8"), 16, 3, 0, *columns, 2)


def test_largest_places_are_accepted():
    words = np.zeros(1, np.uint64)
    entries = twins.raw([0x50000])
    assert _diff.mark_allocated(entries, 2**54, 21, words, 64) == 0
    assert _diff.mark_allocated(entries, 2**54, 9, words, 64) == 0
    assert not words.any()


def test_tables_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="3 and 4 words"):
        _diff.mark_changed(np.zeros(3, "u8"), np.zeros(4, "u8"), 0, 16, np.zeros(1, "u8"), 64)


@pytest.mark.parametrize(
    ("bits", "version", "size", "rows", "per_entry"),
    [(8, 3, 0, 4, 1), (22, 3, 0, 4, 1), (16, 1, 0, 4, 1), (16, 4, 0, 4, 1),
     (16, 3, -1, 4, 1), (16, 3, 0, 3, 1), (16, 3, 0, 5, 1), (16, 3, 0, 4, 2), (13, 3, 0, 2, 2)],
)  # fmt: skip
def test_decode_refuses_what_does_not_fit(bits, version, size, rows, per_entry):
    for short in range(3):
        counts = [rows if column == short else 4 for column in range(3)]
        columns = [np.zeros(n, t) for n, t in zip(counts, (np.uint8, np.uint64, np.uint32), strict=True)]
        with pytest.raises(ValueError):
            _diff.decode_l2(np.zeros(4, np.uint64), bits, version, size, *columns, per_entry)


@pytest.mark.parametrize(
    ("bits", "version", "size", "other", "rows", "per_entry"),
    [(8, 3, 0, 4, 4, 1), (22, 3, 0, 4, 4, 1), (16, 1, 0, 4, 4, 1), (16, 4, 0, 4, 4, 1), (16, 3, -1, 4, 4, 1),
     (16, 3, 0, 3, 4, 1), (16, 3, 0, 5, 4, 1), (16, 3, 0, 4, 3, 1), (16, 3, 0, 4, 63, 2),
     (13, 3, 0, 4, 64, 2)],
)  # fmt: skip
def test_a_map_refuses_what_does_not_fit(bits, version, size, other, rows, per_entry):
    table = np.zeros(4, np.uint64)
    for columns in ((rows, 64), (64, rows)) if rows not in (4, 64) else ((rows, rows),):
        starts, kinds = np.zeros(columns[0], np.int64), np.zeros(columns[1], np.uint8)
        with pytest.raises(ValueError):
            _diff.map_l2(table, np.zeros(other, np.uint64), bits, version, size, starts, kinds, per_entry)


@pytest.mark.parametrize(
    ("first", "stop", "shape"),
    [
        (-1, 1, (1, 2)),
        (2, 1, (1, 2)),
        (0, 129, (1, 2)),
        (0, 2**63 - 1, (1, 2)),
        (0, 1, (0, 2)),
        (0, 1, (1, 3)),
    ],
)
def test_runs_refuse_what_does_not_fit(first, stop, shape):
    with pytest.raises(ValueError):
        _diff.bitmap_runs(np.zeros(2, np.uint64), first, stop, np.zeros(shape, np.int64))


@pytest.mark.parametrize("block_size", [0, -1, 3, -(2**63)])
def test_blocks_must_be_whole(block_size):
    data = np.zeros(8, np.uint8)
    with pytest.raises(ValueError, match="whole number"):
        _diff.hash_blocks(data, block_size, 0, np.zeros((2, 16), np.uint8))
    with pytest.raises(ValueError, match="whole number"):
        _diff.zero_blocks(data, block_size, np.zeros(2, np.uint8))


def test_columns_must_have_the_rows_of_the_blocks():
    data = np.zeros(8, np.uint8)
    for shape in [(1, 16), (3, 16), (2, 15), (2, 17)]:
        with pytest.raises(ValueError):
            _diff.hash_blocks(data, 4, 0, np.zeros(shape, np.uint8))
    for rows in (1, 3):
        with pytest.raises(ValueError):
            _diff.zero_blocks(data, 4, np.zeros(rows, np.uint8))
    with pytest.raises(ValueError, match="2 offsets for 1 lengths"):
        _diff.copy_ranges(data, np.zeros(2, np.int64), np.zeros(1, np.int64), data, np.zeros(1, np.int64))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_has_64_bits(seed):
    with pytest.raises(OverflowError):
        _diff.hash_blocks(np.zeros(4, np.uint8), 4, seed, np.zeros((1, 16), np.uint8))


def test_tables_may_be_read_only():
    table = np.frombuffer(0x50000.to_bytes(8, "big"), np.uint64)
    words = np.zeros(1, np.uint64)
    assert _diff.mark_allocated(table, 0, 16, words, 64) == 1
    assert _diff.mark_changed(table, table, 0, 16, words, 64) == 0


def test_public_names_are_at_most_eight():
    public = [name for name in vars(_diff) if callable(getattr(_diff, name)) and not name.startswith("_")]
    assert len(public) <= 8


LONG = 1 << 22


def observed_during(call) -> bool:
    """Whether this thread gets to run while another is inside `call`."""
    entered, left = threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        call()
        left.set()

    worker = threading.Thread(target=work)
    worker.start()
    entered.wait()
    seen = not left.is_set()
    worker.join()
    return seen


def observations(call):
    """`observed_during`, again and again, while no thread is made to give the GIL away."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100.0)
    try:
        for _ in range(50):
            yield observed_during(call)
    finally:
        sys.setswitchinterval(interval)


def prepared(name: str):
    """A call of kernel `name` that takes a few milliseconds, its buffers made beforehand."""
    entries, zeros = np.full(LONG, 1 << 40, np.uint64), np.zeros(LONG, np.uint64)
    words = np.zeros(LONG // 64, np.uint64)
    columns = [np.zeros(LONG, t) for t in (np.uint8, np.uint64, np.uint32)]
    data, flags = zeros.view(np.uint8), np.zeros(8 * LONG // 4096, np.uint8)
    digests = np.zeros((8 * LONG // 4096, 16), np.uint8)
    alternate = np.full(LONG // 64, 0x5555_5555_5555_5555, np.uint64)
    runs = np.zeros((LONG // 2, 2), np.int64)
    starts, sizes = np.arange(0, 8 * LONG, 4096), np.full(8 * LONG // 4096, 4096)
    return {
        "mark_allocated": lambda: _diff.mark_allocated(entries, 0, 16, words, LONG),
        "mark_changed": lambda: _diff.mark_changed(entries, zeros, 0, 16, words, LONG),
        "decode_l2": lambda: _diff.decode_l2(zeros, 16, 3, 1 << 40, *columns),
        "map_l2": lambda: _diff.map_l2(entries, zeros, 16, 3, 1 << 62, runs.reshape(-1), data),
        "bitmap_runs": lambda: _diff.bitmap_runs(alternate, 0, LONG, runs),
        "hash_blocks": lambda: _diff.hash_blocks(data, 4096, 0, digests),
        "zero_blocks": lambda: _diff.zero_blocks(data, 4096, flags),
        "copy_ranges": lambda: _diff.copy_ranges(data, starts, sizes, entries.view(np.uint8), starts),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "mark_allocated",
        "mark_changed",
        "decode_l2",
        "map_l2",
        "bitmap_runs",
        "hash_blocks",
        "zero_blocks",
        "copy_ranges",
    ],
)
def test_the_gil_is_free_meanwhile(name):
    if name == "hash_blocks" and _diff.HASH_KERNEL == "python-xxhash":
        pytest.skip("hash_blocks holds the GIL when xxhash.h was missing at build time")
    assert any(observations(prepared(name)))


def test_a_call_that_holds_the_gil_would_be_noticed():
    assert not any(observations(lambda: sum(range(100_000))))
