"""One good little image made by hand, and several hundred ways to spoil it.

The image: 64 KiB clusters (or others), volume of 64 clusters, one internal snapshot, two bitmaps. Volume
clusters 0 to 7 hold data, 8 is plain zero, 9 preallocated zero, 10 and 11 are compressed, the rest is not
there. A sample is a function that changes the bytes; what must come of it is checked by the test.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

from tests.support.handmade import extension

COPIED, PACKED, ZERO = 1 << 63, 1 << 62, 1
BITMAPS = 0x23852875
FIELDS = {
    "magic": (0, ">I"), "version": (4, ">I"), "backing_offset": (8, ">Q"), "backing_length": (16, ">I"),
    "cluster_bits": (20, ">I"), "size": (24, ">Q"), "crypt": (32, ">I"), "l1_size": (36, ">I"),
    "l1_offset": (40, ">Q"), "refcount_offset": (48, ">Q"), "refcount_clusters": (56, ">I"),
    "snapshots": (60, ">I"), "snapshots_offset": (64, ">Q"), "incompatible": (72, ">Q"),
    "compatible": (80, ">Q"), "autoclear": (88, ">Q"), "refcount_order": (96, ">I"), "length": (100, ">I"),
    "compression": (104, ">B"),
}  # fmt: skip
SNAPSHOT = {
    "l1_offset": (0, ">Q"), "l1_size": (8, ">I"), "id_length": (12, ">H"), "name_length": (14, ">H"),
    "seconds": (16, ">I"), "nanoseconds": (20, ">I"), "clock": (24, ">Q"), "vm_state": (32, ">I"),
    "extra_length": (36, ">I"), "vm_state_large": (40, ">Q"), "disk_size": (48, ">Q"), "icount": (56, ">Q"),
}  # fmt: skip
BITMAP_EXTENSION = {"count": (0, ">I"), "reserved": (4, ">I"), "size": (8, ">Q"), "offset": (16, ">Q")}
BITMAP = {
    "table_offset": (0, ">Q"), "entries": (8, ">I"), "flags": (12, ">I"), "type": (16, ">B"),
    "granularity": (17, ">B"), "name_length": (18, ">H"), "extra_length": (20, ">I"),
}  # fmt: skip
_NAMES = ("header", "rc_table", "rc_block", "snapshots", "l1", "old_l1", "l2", "old_l2", "bitmaps", "bits",
          "packed", "data")  # fmt: skip


def deflate(data: bytes, wbits: int = -12) -> bytes:
    engine = zlib.compressobj(9, zlib.DEFLATED, wbits)
    return engine.compress(data) + engine.flush()


class Sample:
    """The bytes of an image under construction; `at[name]` is where each part begins."""

    def __init__(self, bits: int = 16, version: int = 3, words: int = 1, zstd: bool = False) -> None:
        self.cluster, self.words, self.version = 1 << bits, words, version
        self.at = {name: n << bits for n, name in enumerate(_NAMES)}
        self.data = bytearray(self.at["data"] + 16 * self.cluster)
        self.pack = zstandard.ZstdCompressor().compress if zstd else deflate
        self.length: int | None = None
        self._header(bits, zstd)
        self._tables()
        self._snapshot()
        self._bitmaps()

    def put(self, offset: int, form: str, *values: int) -> None:
        size = struct.calcsize(form)
        self.data.extend(bytes(max(0, offset + size - len(self.data))))
        struct.pack_into(form, self.data, offset, *values)

    def set(self, **fields: int) -> None:
        """Header fields by name."""
        for name, value in fields.items():
            offset, form = FIELDS[name]
            self.put(offset, form, value)

    def get(self, offset: int, form: str = ">Q") -> int:
        return int(struct.unpack_from(form, self.data, offset)[0])

    def entry(self, cluster: int, value: int, bitmap: int | None = None, table: str = "l2") -> None:
        place = self.at[table] + 8 * self.words * cluster
        self.put(place, ">Q", value)
        if self.words == 2:
            stored = value & ~COPIED and not value & PACKED
            self.put(place + 8, ">Q", (0xFFFFFFFF if stored else 0) if bitmap is None else bitmap)

    def place(self, number: int) -> int:
        """Where data cluster `number` is."""
        return self.at["data"] + number * self.cluster

    def stream(self, cluster: int, stream: bytes, at: int | None = None, sectors: int | None = None) -> None:
        """Put a compressed stream into the file and under a volume cluster."""
        at = self.at["packed"] if at is None else at
        self.data[at : at + len(stream)] = stream
        bits = self.cluster.bit_length() - 1
        count = (at + len(stream) - 1) // 512 - at // 512 if sectors is None else sectors
        self.entry(cluster, PACKED | count << (62 - (bits - 8)) | at)

    def content(self, seed: int) -> bytes:
        return random.Random(seed).randbytes(97) * (self.cluster // 97) + b"." * (self.cluster % 97)

    def write(self, path: Path) -> None:
        with open(path, "wb") as file:
            file.write(self.data if self.length is None else self.data[: self.length])
            if self.length is not None:
                file.truncate(self.length)

    def _header(self, bits: int, zstd: bool) -> None:
        self.set(magic=0x514649FB, version=self.version, cluster_bits=bits, size=64 << bits,
                 l1_offset=self.at["l1"], refcount_offset=self.at["rc_table"], refcount_clusters=1,
                 snapshots=1, snapshots_offset=self.at["snapshots"])  # fmt: skip
        per_table = self.cluster // (8 * self.words)
        self.set(l1_size=-(-64 // per_table))
        if self.version == 3:
            self.set(refcount_order=4, length=112, incompatible=8 * zstd + 16 * (self.words - 1),
                     compression=int(zstd), autoclear=1)  # fmt: skip

    def _tables(self) -> None:
        self.put(self.at["rc_table"], ">Q", self.at["rc_block"])
        self.put(self.at["l1"], ">Q", self.at["l2"] | COPIED)
        self.put(self.at["old_l1"], ">Q", self.at["old_l2"])
        for number in range(12):
            self.data[self.place(number) : self.place(number + 1)] = self.content(number)
        for cluster in range(8):
            self.entry(cluster, self.place(cluster) | (COPIED if cluster >= 4 else 0))
            self.entry(cluster, self.place(cluster if cluster < 4 else cluster + 4), table="old_l2")
        if self.version == 3:
            zeros = (
                (0, self.place(12) | COPIED) if self.words == 2 else (ZERO, self.place(12) | ZERO | COPIED)
            )
            for cluster, value in enumerate(zeros, 8):
                self.entry(cluster, value, 0xFFFFFFFF << 32)
        first = self.pack(self.content(20))
        self.stream(10, first)
        self.stream(11, self.pack(self.content(21)), self.at["packed"] + len(first))

    def _snapshot(self) -> None:
        at = self.at["snapshots"]
        fixed = struct.pack(">QIHHIIQII", self.at["old_l1"], self.get(36, ">I"), 1, 3, 11, 22, 0, 0, 24)
        extra = struct.pack(">QQQ", 0, self.get(24), (1 << 64) - 1)
        self.data[at : at + 68] = fixed + extra + b"1old"

    def _bitmaps(self) -> None:
        if self.version == 2:
            return
        entry = struct.pack(">QIIBBHI", self.at["bits"], 1, 2, 1, 16, 3, 0) + b"one"
        entry = entry.ljust(32, b"\0")
        self.data[self.at["bitmaps"] : self.at["bitmaps"] + 64] = entry + entry.replace(b"one", b"two")
        self.bitmap_fields = 112 + 8
        extensions = extension(BITMAPS, struct.pack(">IIQQ", 2, 0, 64, self.at["bitmaps"])) + bytes(8)
        self.data[112 : 112 + len(extensions)] = extensions


Spoil = Callable[[Sample], None]


@dataclass(frozen=True, slots=True)
class Case:
    """One malformed image.

    `ends` is what must come of it: "data", "error", or "any" of the two. Data is always compared with what
    qemu reads, if it reads anything; with `apart`, what is spoilt is no part of the volume, which must be
    that of the good image. `lenient` says why qemu may refuse what is read here.
    """

    name: str
    spoil: Spoil
    ends: str = "any"
    lenient: str = ""
    apart: bool = False
    base: dict[str, int | bool] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        sample = Sample(**self.base)
        self.spoil(sample)
        sample.write(path)


def _field(offset: int, form: str, value: int) -> Spoil:
    return lambda sample: sample.put(offset, form, value)


def _values(form: str, good: int) -> list[int]:
    """Numbers at and about every limit that a field of this width can meet."""
    limits = [0, 1, 8, 22, 512, 1023, 65535, 65536, 66048, good - 1, good + 1, (4 << 20) + 1, 28 << 16,
              0x7FFFFFFF, 0xFFFFFFFF, 64 << 40, 1 << 56, (1 << 63) - 65536, 1 << 63, (1 << 64) - 65536,
              (1 << 64) - 1]  # fmt: skip
    top = 256 ** struct.calcsize(form)
    return sorted({value for value in limits if 0 <= value < top and value != good})


def _fields(part: str, offset: int, table: dict[str, tuple[int, str]], *, apart: bool) -> Iterator[Case]:
    lenient = "qemu checks more than what reading needs"
    sample = Sample()
    for name, (at, form) in table.items():
        for value in _values(form, sample.get(offset + at, form)):
            yield Case(f"{part} {name} {value:#x}", _field(offset + at, form, value), "any", lenient, apart)


def all_cases() -> list[Case]:
    """Every case, names unique."""
    from tests.images.hostile import shapes

    at = Sample().at
    cases = [
        *_fields("header", 0, FIELDS, apart=False),
        *_fields("snapshot", at["snapshots"], SNAPSHOT, apart=True),
        *_fields("bitmaps extension", 120, BITMAP_EXTENSION, apart=True),
        *_fields("bitmap", at["bitmaps"], BITMAP, apart=True),
        *shapes.cases(),
    ]
    assert len({case.name for case in cases}) == len(cases)
    return cases
