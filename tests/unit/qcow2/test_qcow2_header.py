"""The header: what qemu writes is read, what it refuses is refused, by name and within bounds."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from island_fast.errors import DamagedImageError, IslandError, UnsupportedImageError
from island_fast.qcow2.header import MAX_VOLUME_SIZE, header_span, parse_header
from tests.support import qemu
from tests.support.handmade import extension, header

FILE_SIZE = 1 << 20


def test_version_3():
    parsed = parse_header(header(compatible=1, snapshots=2, snapshots_offset=0x50000), FILE_SIZE)
    assert (parsed.version, parsed.size, parsed.l1_offset, parsed.l1_size) == (
        3,
        1 << 30,
        0x30000,
        2,
    )
    assert (parsed.refcount_offset, parsed.refcount_clusters, parsed.refcount_bits) == (
        0x10000,
        1,
        16,
    )
    assert (parsed.snapshot_count, parsed.snapshots_offset) == (2, 0x50000)
    assert parsed.lazy_refcounts
    assert not parsed.dirty
    assert not parsed.corrupt
    assert (parsed.compression, parsed.crypt, parsed.backing_name) == ("zlib", 0, None)
    assert (parsed.cluster_size, parsed.table_entries, parsed.table_span) == (
        65536,
        8192,
        512 << 20,
    )
    assert parsed.l1_entries((512 << 20) + 512) == 2


def test_version_2_never_looks_behind_its_fields():
    # A version 2 image: what lies at the version 3 fields are extensions, here ones that would look
    # like every incompatible feature at once.
    junk = extension(0x7FFFFFFF, b"\xff" * 64)
    parsed = parse_header(header(2, junk), FILE_SIZE)
    assert (parsed.incompatible, parsed.refcount_bits, parsed.version) == (0, 16, 2)
    assert parsed.extensions[0].kind == 0x7FFFFFFF


def test_short_version_3_header_has_no_compression_type():
    parsed = parse_header(header(length=104, extensions=extension(5, b"\1" * 8)), FILE_SIZE)
    assert parsed.compression == "zlib"
    assert parsed.extensions[0].data == b"\1" * 8


def test_size_is_rounded_down_as_qemu_does():
    assert parse_header(header(size=1023), FILE_SIZE).size == 512


def test_readable_flags():
    parsed = parse_header(header(incompatible=0b1011, compression=1), FILE_SIZE)
    assert parsed.dirty
    assert parsed.corrupt
    assert parsed.compression == "zstd"


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"version": 1}, "version 1"),
        ({"version": 4}, "version 4"),
        ({"incompatible": 4}, "external data file"),
        ({"incompatible": 1 << 40}, "bit 40"),
        ({"crypt": 1}, "AES"),
        ({"crypt": 2}, "LUKS"),
        ({"crypt": 9}, "method 9"),
        ({"backing_offset": 512, "backing_length": 8}, "backing file"),
        ({"backing_offset": 1 << 63, "backing_length": 1 << 31}, "backing file"),
        ({"incompatible": 8, "compression": 2}, "compression type 2"),
        ({"size": MAX_VOLUME_SIZE + 512, "l1_size": 1 << 17 | 1}, "64 TiB"),
    ],
)
def test_unsupported_is_named(fields, words):
    with pytest.raises(UnsupportedImageError, match=words):
        parse_header(header(**fields), 16 << 20)


def test_unknown_feature_is_named_by_the_image_without_its_control_characters():
    entry = bytes([0, 7]) + b"warp\x1b[2J".ljust(46, b"\0")
    data = header(incompatible=1 << 7, extensions=extension(0x6803F857, entry))
    with pytest.raises(UnsupportedImageError, match=r"bit 7 \(warp\\x1b\[2J\)"):
        parse_header(data, FILE_SIZE)


def test_another_magic_is_no_damage():
    """What never was a qcow2 image is refused: nobody has to be called for it."""
    with pytest.raises(UnsupportedImageError, match="not a qcow2 image"):
        parse_header(bytes(header(magic=b"QFI\0")), FILE_SIZE)


@pytest.mark.parametrize("backed", [True, False])
def test_an_empty_name_is_no_backing_file(backed: bool):
    """As for QEMU, which shows zeros then."""
    data = header(backing_offset=512, backing_length=0)
    assert parse_header(data, 1 << 20, backed=backed).backing_name is None


def test_backing_name_is_quoted_safely_and_shortly():
    data = bytearray(header(backing_offset=512, backing_length=1 << 30))
    data[512:1536] = b"\n" * 1024
    with pytest.raises(UnsupportedImageError) as caught:
        parse_header(bytes(data), FILE_SIZE)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"cluster_bits": 8}, "clusters of 2\\^8"),
        ({"cluster_bits": 22}, "clusters of 2\\^22"),
        ({"length": 96}, "96 bytes long"),
        ({"incompatible": 16, "cluster_bits": 13, "l1_size": 1 << 14}, "subclusters in clusters of 8192"),
        ({"incompatible": 16}, "its size needs 4"),
        ({"compression": 1}, "contradicts"),
        ({"incompatible": 8}, "contradicts"),
        ({"autoclear": 2}, "raw external data file"),
        ({"refcount_order": 7}, "reference counts"),
        ({"refcount_clusters": 0}, "reference count table"),
        ({"refcount_clusters": 129}, "reference count table"),
        ({"refcount_offset": 0x10200}, "reference count table"),
        ({"refcount_offset": FILE_SIZE}, "reference count table"),
        ({"refcount_offset": 0}, "reference count table"),
        ({"l1_offset": 0x30200}, "not cluster aligned"),
        ({"l1_offset": 0}, "not inside the file"),
        ({"l1_offset": FILE_SIZE}, "not inside the file"),
        ({"l1_offset": (1 << 64) - 65536}, "not inside the file"),
        ({"l1_size": 1}, "its size needs 2"),
        ({"l1_size": (4 << 20) + 1}, "over the limit"),
        ({"l1_size": 4 << 20}, "not inside the file"),
        ({"snapshots": 65537, "snapshots_offset": 0x50000}, "65537"),
        ({"snapshots": 1, "snapshots_offset": 0x50200}, "snapshot table"),
        ({"snapshots": 1, "snapshots_offset": 0}, "snapshot table"),
        ({"snapshots": 1, "snapshots_offset": FILE_SIZE}, "snapshot table"),
    ],
)
def test_damage_is_one_clear_sentence(fields, words):
    length = fields.get("length", 112)
    data = bytearray(header(**{k: v for k, v in fields.items() if k != "length"}))
    data[100:104] = length.to_bytes(4, "big")
    with pytest.raises(DamagedImageError, match=words):
        parse_header(bytes(data), FILE_SIZE)


def test_extended_l2_has_half_the_entries_in_a_table():
    parsed = parse_header(header(incompatible=16, l1_size=4), FILE_SIZE)
    assert (parsed.entry_words, parsed.table_entries, parsed.table_span) == (2, 4096, 256 << 20)
    assert parse_header(header(), FILE_SIZE).entry_words == 1


@pytest.mark.parametrize(
    "extensions, words",
    [
        (struct.pack(">II", 1, 65536), "runs past"),
        (struct.pack(">II", 1, 0xFFFFFFFF), "runs past"),
    ],
)
def test_extension_past_the_cluster(extensions, words):
    with pytest.raises(DamagedImageError, match=words):
        parse_header(header(extensions=extensions), FILE_SIZE)


def test_missing_terminator_is_accepted():
    fill = extension(1, bytes(65536 - 112 - 8))
    assert len(parse_header(header(extensions=fill), FILE_SIZE).extensions) == 1


@pytest.mark.parametrize("length", [0, 3, 4, 71, 72, 103, 104, 111])
def test_cut_header(length):
    with pytest.raises(UnsupportedImageError if length < 4 else DamagedImageError):
        parse_header(header()[:length], length)


@given(st.binary(max_size=200), st.integers(0, 1 << 40))
def test_noise_after_the_magic_only_raises_our_errors(noise, file_size):
    data = b"QFI\xfb\0\0\0\3" + noise
    try:
        header_span(data)
        parse_header(data, min(file_size, len(data)))
    except (DamagedImageError, UnsupportedImageError):
        pass
    else:
        pytest.fail("noise was read as a header")


@given(st.data())
def test_one_wrong_field_never_escapes_the_error_tree(data):
    good = bytearray(header(snapshots=1, snapshots_offset=0x50000))
    at = data.draw(st.integers(4, 111))
    good[at] ^= data.draw(st.integers(1, 255))
    # A larger cluster needs more bytes than these, which are the caller's to give.
    allowed = (IslandError, ValueError) if 20 <= at < 24 else IslandError
    with contextlib.suppress(allowed):
        parsed = parse_header(bytes(good), FILE_SIZE)
        assert parsed.l1_offset + 8 * parsed.l1_size <= FILE_SIZE
        assert parsed.size <= MAX_VOLUME_SIZE


@qemu.needs_qemu
@pytest.mark.parametrize("cluster", [512, 4096, 65536, 2 << 20])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_what_qemu_writes(tmp_path, cluster, compat):
    path = qemu.create(tmp_path / "a", 10 << 20, cluster_size=cluster, compat=compat)
    data = path.read_bytes()
    parsed = parse_header(data[:cluster], len(data))
    assert (parsed.version, parsed.cluster_size) == (2 if compat == "0.10" else 3, cluster)
    assert parsed.size == 10 << 20
    assert any(e.kind == 0x6803F857 for e in parsed.extensions) == (compat == "1.1" and cluster > 4096)
