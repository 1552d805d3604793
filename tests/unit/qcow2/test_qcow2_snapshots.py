"""The internal snapshot table: qemu's entries exactly, hostile ones within bounds."""

import struct

import pytest

from island_fast.errors import DamagedImageError, UnsupportedImageError
from island_fast.qcow2.header import parse_header
from island_fast.qcow2.image import Image
from island_fast.qcow2.snapshots import (
    InternalSnapshot,
    PinnedBase,
    encode_snapshot,
    find_pinned,
    read_snapshots,
)
from tests.support import qemu
from tests.support.handmade import header

AT = 0x50000
SIZE = 1 << 30


def entry(extra=b"", id=b"1", name=b"n", extra_length=None):
    fixed = struct.pack(
        ">QIHHIIQII", 0x60000, 2, len(id), len(name), 11, 22, 33, 44,
        len(extra) if extra_length is None else extra_length,
    )  # fmt: skip
    body = fixed + extra + id + name
    return body + bytes(-len(body) % 8)


def table(*entries, count=None, file_size=None):
    """Read these entries as the snapshot table at AT of a file that ends with them."""
    data = b"".join(entries)
    size = AT + len(data) if file_size is None else file_size
    count = len(entries) if count is None else count
    parsed = parse_header(header(snapshots=count, snapshots_offset=AT), size)
    reads = []

    def read(offset, length):
        reads.append(length)
        return data[offset - AT : offset - AT + length]

    return read_snapshots(read, parsed, size), reads


def test_short_extra_data_falls_back():
    (a, b, c, d), _ = table(
        entry(),
        entry(struct.pack(">Q", 5)),
        entry(struct.pack(">QQ", 5, 4096)),
        entry(struct.pack(">QQQ", 5, 4096, 1) + bytes(1000)),
    )
    assert (a.disk_size, a.vm_state_size) == (SIZE, 44)
    assert (b.disk_size, b.vm_state_size) == (SIZE, 5)
    assert c == d
    assert c == InternalSnapshot("1", "n", 11, 22, 4096, 0x60000, 2, 5)


def test_odd_names_keep_the_entries_aligned_and_exact():
    snapshots, _ = table(entry(name=b"\xff\0x", id=b""), entry(name=b"", id=b"\\"), entry(name=b"z" * 65535))
    assert [s.name for s in snapshots] == ["\\xff\\x00x", "", "z" * 65535]
    assert [s.id for s in snapshots] == ["", "\\\\", "1"]


def test_many_entries_are_read_in_few_windows():
    snapshots, reads = table(*[entry(name=b"%d" % n) for n in range(5000)])
    assert [s.name for s in snapshots] == [str(n) for n in range(5000)]
    assert len(reads) < 10


@pytest.mark.parametrize(
    "entries, count, words",
    [
        ([entry()], 2, "runs past the end"),
        ([entry()[:40]], 1, "runs past the end"),
        ([entry(extra_length=1025)], 1, "1025 bytes"),
        ([entry(extra_length=1024)], 1, "runs past the end"),
        ([entry(extra_length=0xFFFFFFFF)], 1, "4294967295 bytes"),
    ],
)
def test_damage(entries, count, words):
    with pytest.raises(DamagedImageError, match=words):
        table(*entries, count=count)


@pytest.mark.parametrize(
    "fields, error, words",
    [
        ({"extra": bytes(1024), "name": b"", "id": b""}, DamagedImageError, "64 MiB"),
        ({"name": b"x" * 65535, "id": b"y" * 65535}, UnsupportedImageError, "the names of the first 65 "),
    ],
)
def test_a_huge_table_stops_at_a_limit(fields, error, words):
    big = entry(**fields)
    parsed = parse_header(header(snapshots=65536, snapshots_offset=AT), 1 << 40)
    total = 0

    def read(offset, length):
        nonlocal total
        total += length
        at = (offset - AT) % len(big)
        return (big[at:] + big * (length // len(big) + 1))[:length]

    with pytest.raises(error, match=words):
        read_snapshots(read, parsed, 1 << 40)
    assert total < 140 << 20


def test_a_table_that_shrinks_while_it_is_read():
    parsed = parse_header(header(snapshots=1, snapshots_offset=AT), 1 << 20)
    with pytest.raises(DamagedImageError, match="cut off while"):
        read_snapshots(lambda offset, length: b"", parsed, 1 << 20)


def test_packed_entry_reads_back():
    snapshot = InternalSnapshot("\\xff7", "island-t-ä", 1, 999_999_999, 1 << 40, 0x60000, 2, 0)
    (back,), _ = table(encode_snapshot(snapshot))
    assert back == snapshot


def test_identity_is_all_five():
    base = PinnedBase("n", "1", 11, 22, SIZE)
    (snapshot,), _ = table(entry())
    assert snapshot.identity == base
    assert find_pinned([snapshot], base) is snapshot
    for field, value in {
        "name": "m",
        "id": "2",
        "seconds": 1,
        "nanoseconds": 1,
        "disk_size": 0,
    }.items():
        other = {f: getattr(base, f) for f in PinnedBase.__slots__} | {field: value}
        assert find_pinned([snapshot], PinnedBase(**other)) is None
    assert find_pinned([snapshot, snapshot], base) is None


@qemu.needs_qemu
def test_qemus_own_table(tmp_path):
    path = qemu.create(tmp_path / "a", 5 << 20)
    names = ["eins", "zwei drei", "ä\\b"]
    for number, name in enumerate(names):
        qemu.snapshot_create(path, name)
        qemu.resize(path, (6 + number) << 20)
    listed = qemu.info(path)["snapshots"]
    with Image.open(path) as image:
        assert [s.name for s in image.snapshots] == ["eins", "zwei drei", "ä\\\\b"]
        assert [s.disk_size for s in image.snapshots] == [5 << 20, 6 << 20, 7 << 20]
        for mine, theirs in zip(image.snapshots, listed, strict=True):
            assert (mine.id, mine.seconds, mine.nanoseconds) == (
                theirs["id"], theirs["date-sec"], theirs["date-nsec"],
            )  # fmt: skip
        base = image.snapshots[2].identity
        qemu.snapshot_delete(path, "ä\\b")
        qemu.snapshot_create(path, "ä\\b")
        image.reload()
        # Same name and same id again: only the time tells.
        assert image.snapshots[2].id == base.id
        assert image.find_pinned(base) is None
