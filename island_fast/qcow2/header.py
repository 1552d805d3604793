"""The qcow2 header: parse the bytes of the first cluster into a checked `Header`.

Source: the qcow2 specification, sections "Header" and "Header extensions", with the limits that QEMU adds.
All numbers on disk are big-endian. The bytes are hostile input: a guest or a tenant may have written them. So
nothing here follows a name, allocates by a number from the header, or continues past an unknown feature.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from island_fast.errors import DamagedImageError, UnsupportedImageError
from island_fast.qcow2.names import escape

__all__ = [
    "COPIED",
    "L1_ENTRIES_LIMIT",
    "MAGIC",
    "MAX_VOLUME_SIZE",
    "Extension",
    "Header",
    "check_l1_span",
    "header_span",
    "parse_header",
]

MAGIC = b"QFI\xfb"
COPIED = 1 << 63
"""Flag of an L1 or L2 entry: the cluster has exactly one reference and may be written in place."""

L1_ENTRIES_LIMIT = 4 << 20
"""QEMU's limit for one L1 table: 32 MiB."""

MAX_VOLUME_SIZE = 64 << 40
"""The largest volume that we read, in bytes; whatever the header says, a dirty map is at most 128 MiB."""

_SNAPSHOTS_LIMIT = 65536
_REFCOUNT_TABLE_LIMIT = 8 << 20

_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")
_FIXED_V3 = struct.Struct(">QQQII")
_V2_LENGTH = _FIXED.size
_V3_LENGTH = _FIXED.size + _FIXED_V3.size

_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_READABLE = _DIRTY | _CORRUPT | _COMPRESSION | _EXTENDED_L2
_EXTENDED_BITS = 14
_LAZY_REFCOUNTS = 1
_BACKING_LIMIT = 1023
_RAW_DATA_FILE = 2

_FEATURE_NAMES = 0x6803F857
_BACKING_FORMAT = 0xE2792ACA
_BACKING_FORMAT_LIMIT = 15
_CRYPTO = 0x0537BE77
_FEATURE_ENTRY = 48


@dataclass(frozen=True, slots=True)
class Extension:
    """One header extension: its type and its bytes, not interpreted."""

    kind: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """What the first cluster says, checked against QEMU's limits and the size of the file.

    `size` is the size of the volume in bytes, rounded down to a multiple of 512 as QEMU does. Offsets are
    bytes in the file and cluster aligned. Refcount fields are checked; no reader uses them.
    """

    version: int
    cluster_bits: int
    size: int
    l1_offset: int
    l1_size: int
    refcount_offset: int
    refcount_clusters: int
    refcount_bits: int
    snapshot_count: int
    snapshots_offset: int
    incompatible: int
    compatible: int
    autoclear: int
    compression: str
    backing_name: bytes | None
    crypt: int
    extensions: tuple[Extension, ...]

    @property
    def cluster_size(self) -> int:
        """Bytes of one cluster: 512 to 2 MiB."""
        return 1 << self.cluster_bits

    @property
    def entry_words(self) -> int:
        """Words of 8 bytes in an L2 entry: 1, or 2 with extended L2 (32 subclusters per cluster)."""
        return 2 if self.incompatible & _EXTENDED_L2 else 1

    @property
    def table_entries(self) -> int:
        """Entries of one L2 table."""
        return self.cluster_size // (8 * self.entry_words)

    @property
    def table_span(self) -> int:
        """Bytes of the volume that one L2 table, so one L1 entry, covers."""
        return self.cluster_size * self.table_entries

    @property
    def dirty(self) -> bool:
        """Whether reference counts can be stale; the tables are still right for reading."""
        return bool(self.incompatible & _DIRTY)

    @property
    def corrupt(self) -> bool:
        """Whether a writer found the image damaged: it is readable, but no table diff of it is sound."""
        return bool(self.incompatible & _CORRUPT)

    @property
    def lazy_refcounts(self) -> bool:
        """Whether writers are allowed to postpone reference count updates."""
        return bool(self.compatible & _LAZY_REFCOUNTS)

    def l1_entries(self, disk_size: int) -> int:
        """Return how many L1 entries a volume of that many bytes needs; others are VM state or unused."""
        return -(-disk_size // self.table_span)


@dataclass(frozen=True, slots=True)
class _Fields:
    """The header as it is on disk, nothing checked yet."""

    version: int
    backing_offset: int
    backing_length: int
    cluster_bits: int
    size: int
    crypt: int
    l1_size: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshot_count: int
    snapshots_offset: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    length: int = _V2_LENGTH
    compression: int = 0


def header_span(data: bytes) -> int:
    """Return how many bytes of the file `parse_header` needs, which is one cluster.

    data: at least the first 24 bytes of the file, or all of a shorter one.

    Raises UnsupportedImageError: not a qcow2 file. DamagedImageError: no possible cluster size.
    """
    if data[:4] != MAGIC:
        what = "is empty" if not data else "does not begin with the qcow2 magic"
        raise UnsupportedImageError(
            f"not a qcow2 image: the file {what}; check the path, or add --format raw if it is raw"
        )
    if len(data) < _V2_LENGTH:
        raise _cut_header(len(data))
    bits = int.from_bytes(data[20:24], "big")
    if not 9 <= bits <= 21:
        raise DamagedImageError(
            f"the qcow2 header claims clusters of 2^{bits} bytes, outside of 2^9 to 2^21;"
            " restore the image from a good copy"
        )
    return 1 << bits


def parse_header(data: bytes, file_size: int, *, backed: bool = False) -> Header:
    """Parse and check the header.

    data: the first cluster of the file (see `header_span`), or the whole file if it is shorter.
    file_size: bytes in the file; every table must lie inside.
    backed: whether the image is allowed to name a backing file; the name is kept and never followed.

    Raises UnsupportedImageError: an unsupported feature, which the message names: version, backing file,
        external data file, encryption, or an unknown incompatible feature.
    Raises DamagedImageError: the header contradicts the format, QEMU's limits or the size of the file.
    """
    span = header_span(data)
    fields = _unpack(data)
    _refuse_features(fields, data, backed)
    if fields.length > span:
        raise _bad(f"its length ({fields.length} bytes) exceeds the cluster")
    if len(data) < min(span, file_size):
        raise ValueError(f"parse_header needs the first {span} bytes")
    extensions = tuple(_read_extensions(data[:span], fields))
    _check_extensions(extensions)
    _check_geometry(fields, file_size)
    return Header(
        version=fields.version,
        cluster_bits=fields.cluster_bits,
        size=fields.size // 512 * 512,
        l1_offset=fields.l1_offset,
        l1_size=fields.l1_size,
        refcount_offset=fields.refcount_offset,
        refcount_clusters=fields.refcount_clusters,
        refcount_bits=1 << fields.refcount_order,
        snapshot_count=fields.snapshot_count,
        snapshots_offset=fields.snapshots_offset,
        incompatible=fields.incompatible,
        compatible=fields.compatible,
        autoclear=fields.autoclear,
        compression="zstd" if fields.compression else "zlib",
        backing_name=_read_backing_name(fields, data[:span]),
        crypt=fields.crypt,
        extensions=extensions,
    )


def check_l1_span(offset: int, entries: int, cluster_size: int, file_size: int, whose: str) -> None:
    """Raise DamagedImageError unless an L1 table is aligned and completely inside the file."""
    if entries > L1_ENTRIES_LIMIT:
        raise _bad(f"the L1 table of {whose} has {entries} entries, over the limit of 4194304")
    if offset % cluster_size:
        raise _bad(f"the L1 table of {whose} is at {offset}, which is not cluster aligned")
    if offset >> 63 or (entries and (offset == 0 or offset + 8 * entries > file_size)):
        raise _bad(
            f"the L1 table of {whose} ({8 * entries} bytes at {offset}) is not inside the file"
            f" of {file_size} bytes, which may have been cut off"
        )


def _bad(what: str) -> DamagedImageError:
    return DamagedImageError(f"damaged qcow2 image: {what}; restore it from a good copy")


def _cut_header(length: int) -> DamagedImageError:
    return _bad(f"the file ends inside the header, after {length} bytes")


def _unpack(data: bytes) -> _Fields:
    """Read the fields of version 2 or 3; bytes past a version 2 header are ignored."""
    (_, version, backing_offset, backing_length, bits, size, crypt, l1_size, l1_offset, rc_offset,
     rc_clusters, snapshots, snapshots_offset) = _FIXED.unpack_from(data)  # fmt: skip
    if version not in (2, 3):
        raise UnsupportedImageError(
            f"qcow2 version {version} is not supported, only 2 and 3; convert the image with qemu-img"
        )
    fields = _Fields(version, backing_offset, backing_length, bits, size, crypt, l1_size, l1_offset,
                     rc_offset, rc_clusters, snapshots, snapshots_offset)  # fmt: skip
    if version == 2:
        return fields
    if len(data) < _V3_LENGTH:
        raise _cut_header(len(data))
    incompatible, compatible, autoclear, order, length = _FIXED_V3.unpack_from(data, _FIXED.size)
    if length < _V3_LENGTH:
        raise _bad(f"its header is {length} bytes long, less than the {_V3_LENGTH} of version 3")
    if length > len(data):
        raise _cut_header(len(data))
    return replace(
        fields,
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        refcount_order=order,
        length=length,
        compression=data[104] if length > 104 else 0,
    )


def _read_backing_name(fields: _Fields, cluster: bytes) -> bytes | None:
    """Return the name of the backing file as it is in the first cluster; None without one.

    An empty name is none: QEMU then opens no backing file.
    """
    if not fields.backing_offset:
        return None
    end = fields.backing_offset + fields.backing_length
    if fields.backing_length > _BACKING_LIMIT or end > len(cluster):
        raise _bad("the name of its backing file is not inside the first cluster")
    return cluster[fields.backing_offset : end] or None


def _refuse_features(fields: _Fields, data: bytes, backed: bool) -> None:
    """Raise UnsupportedImageError for an unsupported feature, before anything else is interpreted."""
    bits = fields.incompatible
    if bits & _DATA_FILE:
        raise UnsupportedImageError(
            "the image keeps its data in an external data file, which is not supported;"
            " convert it to a plain qcow2 image with qemu-img convert"
        )
    unknown = bits & ~(_READABLE | _DATA_FILE)
    if unknown:
        names = ", ".join(_name_features(unknown, data, fields))
        raise UnsupportedImageError(
            f"the image uses unknown incompatible features: {names}; convert it with the program that made it"
        )
    if fields.compression > 1:
        raise UnsupportedImageError(
            f"compression type {fields.compression} is not supported, only zlib and zstd;"
            " convert the image with qemu-img convert"
        )
    if bool(bits & _COMPRESSION) != bool(fields.compression):
        raise _bad("its compression type contradicts its feature bits")
    if fields.crypt:
        method = {1: "AES", 2: "LUKS"}.get(fields.crypt, f"method {fields.crypt}")
        raise UnsupportedImageError(
            f"the image is encrypted ({method}), which is not supported; decrypt it with qemu-img convert"
        )
    if fields.backing_offset and fields.backing_length and not backed:
        name = escape(data[fields.backing_offset :][: min(fields.backing_length, 128)])
        raise UnsupportedImageError(
            f"the image has a backing file ('{name}'), which is not followed; list it with --backing, or"
            " merge it with qemu-img rebase -b ''"
        )
    if fields.autoclear & _RAW_DATA_FILE:
        raise _bad("it claims a raw external data file and has none")


def _name_features(bits: int, data: bytes, fields: _Fields) -> Iterator[str]:
    """Yield a text for each bit that is set, with its name if the image's own (untrusted) table has one."""
    known: dict[int, str] = {}
    for extension in _read_extensions(data, fields):
        if extension.kind == _FEATURE_NAMES:
            table = extension.data[: 128 * _FEATURE_ENTRY]
            for at in range(0, len(table) - _FEATURE_ENTRY + 1, _FEATURE_ENTRY):
                if table[at] == 0:
                    known[table[at + 1]] = escape(table[at + 2 : at + 48].split(b"\0")[0])
    for bit in range(64):
        if bits >> bit & 1:
            yield f"bit {bit} ({known[bit]})" if bit in known else f"bit {bit}"


def _read_extensions(data: bytes, fields: _Fields) -> Iterator[Extension]:
    """Yield the extensions up to the terminator or, as QEMU accepts, the end of their room.

    That is the name of the backing file, or the end of the cluster. As for QEMU, a few bytes before it that
    hold no extension are damage, and so is a terminator that claims more bytes than there are.
    """
    start, end = fields.length, min(fields.backing_offset or len(data), len(data))
    while start < end:
        if start + 8 > end:
            raise _bad(f"its header extensions end {end - start} bytes into another one")
        kind, length = struct.unpack_from(">II", data, start)
        start += 8
        if length > end - start:
            raise _bad(f"header extension {kind:#010x} ({length} bytes) runs past the room for extensions")
        if kind == 0:
            return
        yield Extension(kind, data[start : start + length])
        start += -(-length // 8) * 8


def _check_extensions(extensions: Iterable[Extension]) -> None:
    """Raise DamagedImageError for what QEMU refuses; what is in bitmaps is no concern of the volume."""
    for extension in extensions:
        if extension.kind == _BACKING_FORMAT and len(extension.data) > _BACKING_FORMAT_LIMIT:
            raise _bad(f"the name of its backing file's format has {len(extension.data)} bytes, over 15")
        if extension.kind == _CRYPTO:  # an image with encryption has been refused already
            raise _bad("it has a header extension for encryption, and no encryption")


def _check_geometry(fields: _Fields, file_size: int) -> None:
    """Check that tables are aligned, inside the file and within QEMU's limits, and the volume within ours."""
    cluster = 1 << fields.cluster_bits
    entry = 16 if fields.incompatible & _EXTENDED_L2 else 8
    if entry == 16 and fields.cluster_bits < _EXTENDED_BITS:
        raise _bad(f"it has subclusters in clusters of {cluster} bytes, less than 16384")
    if fields.refcount_order > 6:
        raise _bad(f"its reference counts are 2^{fields.refcount_order} bits wide, over 64")
    if not 0 < fields.refcount_clusters <= _REFCOUNT_TABLE_LIMIT // cluster:
        raise _bad(f"its reference count table has {fields.refcount_clusters} clusters")
    if fields.refcount_offset % cluster or not 0 < fields.refcount_offset < file_size:
        raise _bad(f"its reference count table is at {fields.refcount_offset}, outside the file")
    if fields.snapshot_count > _SNAPSHOTS_LIMIT:
        raise _bad(f"it claims {fields.snapshot_count} internal snapshots, over 65536")
    if fields.snapshots_offset % cluster or fields.snapshots_offset >> 63:
        raise _bad(f"its snapshot table is at {fields.snapshots_offset}, which no table can be")
    if fields.snapshot_count and not 0 < fields.snapshots_offset < file_size:
        raise _bad(f"its snapshot table is at {fields.snapshots_offset}, outside the file")
    check_l1_span(fields.l1_offset, fields.l1_size, cluster, file_size, "the volume")
    needed = -(-fields.size // (cluster * cluster // entry))
    if fields.l1_size < needed:
        raise _bad(f"its L1 table has {fields.l1_size} entries, but its size needs {needed}")
    if fields.size > MAX_VOLUME_SIZE:
        raise UnsupportedImageError(
            f"the volume has {fields.size} bytes, over the limit of 64 TiB; make it smaller"
        )
