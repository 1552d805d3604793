"""Malformed images beyond single fields: entries, streams, cuts, loops, overlaps, bombs, flipped bits."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterator

import zstandard

from tests.images.hostile.samples import COPIED, PACKED, ZERO, Case, Sample, deflate
from tests.support.handmade import extension

ALL = 0xFFFFFFFF
TOP = 0x00FF_FFFF_FFFF_0000
ANOTHER = "a bitmap or snapshot is hit, which qemu checks and the volume does not depend on"


def cases() -> Iterator[Case]:
    yield from _good()
    yield from _entries()
    yield from _subclusters()
    yield from _streams()
    yield from _cuts()
    yield from _overlaps()
    yield from _bombs()
    yield from _extensions()
    yield from _flips()


def _good() -> Iterator[Case]:
    """The unspoiled image in every shape: the samples prove nothing if these are not read."""

    def keep(sample: Sample) -> None:
        pass

    for bits in (9, 12, 14, 16, 18, 21):
        for version in (2, 3):
            yield Case(f"good {bits} v{version}", keep, "data", base={"bits": bits, "version": version})
    for bits in (14, 16, 17, 21):
        yield Case(f"good subclusters {bits}", keep, "data", base={"bits": bits, "words": 2})
        yield Case(f"good zstd {bits}", keep, "data", base={"bits": bits, "zstd": True})


def _entries() -> Iterator[Case]:
    """L1 and L2 entries (the trap table: both zero kinds, reserved bits, alignment, places)."""
    errors = {
        "unaligned": 0x60200, "far": 1 << 40, "top": TOP, "end": Sample().at["data"] + (16 << 16),
        "header low": 512, "reserved low": 0x60002, "all": (1 << 64) - 1,
    }  # fmt: skip
    for name, value in errors.items():
        for flag in (0, COPIED):
            l1 = (lambda v: lambda s: s.put(s.at["l1"], ">Q", v))(value | flag)
            yield Case(f"l1 {name} {flag >> 63}", l1, "any" if name == "all" else "error", ANOTHER)
            if name != "reserved low":
                l2 = (lambda v: lambda s: s.entry(3, v))(value | flag)
                yield Case(f"l2 {name} {flag >> 63}", l2, "error")
    for bit in range(1, 9):
        yield Case(f"l2 reserved bit {bit}", (lambda b: lambda s: s.entry(3, s.place(3) | 1 << b))(bit))
    for bit in range(56, 62):
        yield Case(f"l2 reserved bit {bit}", (lambda b: lambda s: s.entry(3, s.place(3) | 1 << b))(bit))
        yield Case(
            f"l1 reserved bit {bit}", (lambda b: lambda s: s.put(s.at["l1"], ">Q", s.at["l2"] | 1 << b))(bit)
        )
    yield Case("zero plain", lambda s: s.entry(3, ZERO), "data")
    yield Case("zero plain copied", lambda s: s.entry(3, ZERO | COPIED), "data")
    yield Case("zero allocated", lambda s: s.entry(3, s.place(3) | ZERO), "data")
    yield Case("zero unaligned", lambda s: s.entry(3, s.place(3) | ZERO | 512), "error")
    yield Case("zero far", lambda s: s.entry(3, 1 << 40 | ZERO))
    yield Case("copied alone", lambda s: s.entry(3, COPIED), "data")
    for cluster in (3, 8, 63):
        zero = (lambda c: lambda s: s.entry(c, ZERO))(cluster)
        yield Case(f"zero flag in version 2 at {cluster}", zero, "error", base={"version": 2})
        kept = (lambda c: lambda s: s.entry(c, s.place(3) | ZERO))(cluster)
        yield Case(f"zero flag with place in version 2 at {cluster}", kept, "error", base={"version": 2})
    yield Case("junk behind the volume", lambda s: s.entry(100, 0x60200), "data")
    yield Case(
        "l1 entry behind the volume", lambda s: (s.set(l1_size=2), s.put(s.at["l1"] + 8, ">Q", 1 << 40))
    )
    yield Case("no tables", lambda s: s.put(s.at["l1"], ">Q", 0), "data")


def _subclusters() -> Iterator[Case]:
    """Bitmaps of extended L2: what is stored and zero at once, or stored nowhere, is invalid."""
    base = {"bits": 16, "words": 2}
    place = Sample(**base).place(3)
    data = {
        "none": (place, 0), "half": (place, 0xFFFF), "odd": (place, 0x55555555), "top": (place, 1 << 31),
        "zero half": (place, 0xFFFF << 32), "mixed": (place, 0xFFFF << 48 | 0xFF),
        "all zero": (place, ALL << 32),
        "zero plain": (0, ALL << 32), "zero plain half": (0, 0xF0F0 << 32), "nothing": (0, 0),
        "bit 0": (place | ZERO, ALL), "bit 0 plain": (ZERO, 0), "copied": (COPIED | place, 0x0F0F0F0F),
        "copied alone": (COPIED, 0),
    }  # fmt: skip
    errors = {
        "both": (place, 1 << 32 | 1), "both at the top": (place, 1 << 63 | 1 << 31),
        "both all": (place, (1 << 64) - 1),
        "stored nowhere": (0, 1), "all stored nowhere": (0, ALL), "nowhere, bit 0": (ZERO, ALL),
        "unaligned": (place + 512, ALL), "unaligned zero": (place + 512, ALL << 32),
        "unaligned half": (place + 1024, 1),
        "far": (1 << 40, 1), "over the header": (512, 1), "nowhere, both": (0, 1 << 32 | 1),
    }  # fmt: skip
    for ends, table in (("data", data), ("error", errors)):
        for bits in (14, 16, 21):
            for name, (value, bitmap) in table.items():
                moved = value & ~0x00FFFFFFFFFF0000 | (value & 0x00FFFFFFFFFF0000) >> 16 << bits
                spoil = (lambda v, b: lambda s: s.entry(3, v, b))(
                    moved if value != 1 << 40 else value, bitmap
                )
                yield Case(f"subclusters {bits} {name}", spoil, ends, base={"bits": bits, "words": 2})
    yield Case(
        "compressed with a bitmap",
        lambda s: s.put(s.at["l2"] + 16 * 10 + 8, ">Q", (1 << 64) - 1),
        "data",
        base=base,
    )
    yield Case("subclusters in small clusters", lambda s: s.set(incompatible=16), "error", base={"bits": 13})


def _zstd(data: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)  # type: ignore[arg-type]


def _streams() -> Iterator[Case]:
    """Compressed clusters: what fills the cluster is data, everything else is not."""
    text = Sample().content(30)
    junk = random.Random(1).randbytes(65536)
    window = junk[:20000] + junk[:20000] + text[:25536]
    skippable = struct.pack("<II", 0x184D2A53, 5) + b"hello"
    streams: dict[str, dict[str, tuple[bytes, str]]] = {
        "zlib": {
            "plain": (deflate(text), "data"), "wide window": (deflate(window, -15), "data"),
            "incompressible": (deflate(junk), "data"), "longer": (deflate(text + text), "data"),
            "bomb": (deflate(bytes(32 << 20)), "data"), "short": (deflate(text[:-1]), "error"),
            "cut in a block": (deflate(text, -15)[: -20], "any"),
            "wrapped": (zlib.compress(text), "error"),
            "noise": (b"\xff" * 500, "error"), "zeros": (bytes(500), "error"),
            "empty": (deflate(b""), "error"),
        },
        "zstd": {
            "plain": (_zstd(text), "data"), "incompressible": (_zstd(junk), "data"),
            "two frames": (_zstd(text[:999]) + _zstd(text[999:]), "data"),
            "many frames": (b"".join(_zstd(text[n : n + 512]) for n in range(0, 65536, 512)), "data"),
            "skippable": (skippable + _zstd(text), "data"), "skippable only": (skippable, "error"),
            "skippable to the moon": (struct.pack("<II", 0x184D2A50, ALL) + _zstd(text), "error"),
            "longer": (_zstd(text + b"x"), "error"), "bomb": (_zstd(bytes(32 << 20)), "error"),
            "short": (_zstd(text[:-1]), "error"), "cut": (_zstd(text)[:-1], "error"),
            "noise": (b"\xff" * 500, "error"), "zeros": (bytes(500), "error"),
            "claims an exabyte": (struct.pack("<IBQ", 0xFD2FB528, 0xE0, 1 << 60) + b"\x09\0\0x", "error"),
            "endless empty frames": (struct.pack("<II", 0x184D2A53, 0) * 8000, "error"),
        },
    }  # fmt: skip
    for kind, table in streams.items():
        base = {"zstd": kind == "zstd"}
        for name, (stream, ends) in table.items():
            # The streams behind it are overwritten: only this one counts.
            def spoil(sample: Sample, stream: bytes = stream) -> None:
                sample.entry(11, 0)
                sample.data.extend(bytes(2 << 16))
                sample.stream(10, stream[: (2 << 16) - 512], sample.place(16))

            yield Case(f"{kind} {name}", spoil, ends, base=base)
    yield Case("stream past the end", lambda s: s.stream(10, deflate(text), len(s.data) - 100), "any")
    yield Case("stream cut by the end", _cut_stream, "error")
    yield Case("padding past the end", _padding, "data")
    yield Case("too few sectors", lambda s: s.stream(10, deflate(junk), s.place(13), 0), "error")
    yield Case("most sectors", lambda s: s.stream(10, deflate(text), s.place(14), 255), "data")
    yield Case("stream crosses clusters", lambda s: s.stream(10, deflate(junk), s.place(13) + 65000), "data")
    yield Case("compressed at the end of the file", lambda s: s.entry(10, PACKED | len(s.data)), "error")
    yield Case("compressed far away", lambda s: s.entry(10, PACKED | 1 << 53), "error")
    yield Case("compressed over the header", lambda s: s.entry(10, PACKED), "error")
    yield Case("compressed in the L2 table", lambda s: s.entry(10, PACKED | s.at["l2"]), "error")
    yield Case(
        "compressed and copied",
        lambda s: s.put(s.at["l2"] + 80, ">Q", s.get(s.at["l2"] + 80) | COPIED),
        "data",
    )
    yield Case(
        "one stream under all", lambda s: [s.entry(n, s.get(s.at["l2"] + 80)) for n in range(64)], "data"
    )


def _cut_stream(sample: Sample) -> None:
    sample.stream(10, deflate(random.Random(1).randbytes(65536)), sample.place(14))
    sample.length = sample.place(14) + 30000


def _padding(sample: Sample) -> None:
    stream = deflate(sample.content(30))
    at = len(sample.data)
    sample.data.extend(bytes(len(stream)))
    sample.stream(10, stream, at)
    sample.length = at + len(stream)


def _cuts() -> Iterator[Case]:
    """Files that end too early: qemu reads zeros there and says nothing."""
    at, data = Sample().at, Sample().at["data"]
    for name, place in at.items():
        for more in (0, 8, 512, 65535):
            spoil = (lambda n: lambda s: setattr(s, "length", n))(place + more)
            yield Case(f"cut at {name} + {more}", spoil, "error")
    for cluster in (1, 5, 7, 11):
        spoil = (lambda n: lambda s: setattr(s, "length", n))(data + (cluster << 16) + 1000)
        yield Case(f"cut in data cluster {cluster}", spoil, "error" if cluster < 7 else "any")
    for length in (0, 1, 3, 4, 20, 24, 71, 72, 103, 104, 111, 112, 511):
        yield Case(f"cut to {length}", (lambda n: lambda s: setattr(s, "length", n))(length), "error")


def _overlaps() -> Iterator[Case]:
    """Tables over tables, data over tables, and tables that lead back to themselves."""
    tables = ("header", "rc_table", "snapshots", "l1", "l2")
    for name in tables:
        data = (lambda n: lambda s: s.entry(3, s.at[n] | COPIED))(name)
        # Offset 0 with no flag is simply nothing.
        yield Case(f"data over {name}", data, "data" if name == "header" else "error")
        l2 = (lambda n: lambda s: s.put(s.at["l1"], ">Q", s.at[n] | COPIED))(name)
        yield Case(f"l2 over {name}", l2, "any" if name in ("header", "l2") else "error")
        yield Case(f"l1 over {name}", (lambda n: lambda s: s.set(l1_offset=s.at[n]))(name), "any", ANOTHER)
        yield Case(
            f"snapshots over {name}",
            (lambda n: lambda s: s.set(snapshots_offset=s.at[n]))(name),
            "any",
            ANOTHER,
        )
        yield Case(
            f"refcounts over {name}",
            (lambda n: lambda s: s.set(refcount_offset=s.at[n]))(name),
            "any",
            ANOTHER,
        )
        old = (lambda n: lambda s: s.put(s.at["snapshots"], ">Q", s.at[n]))(name)
        yield Case(f"snapshot l1 over {name}", old, "any", ANOTHER)

    def twice(sample: Sample) -> None:
        sample.set(size=1 << 30, l1_size=2)
        sample.put(sample.at["l1"] + 8, ">Q", sample.at["l2"])

    yield Case("one l2 table twice", twice, "error")
    yield Case("two clusters with one place", lambda s: s.entry(12, s.place(3)), "data")
    yield Case(
        "l2 entries name l2 tables", lambda s: [s.entry(n, s.at["l2"] | COPIED) for n in range(64)], "error"
    )
    yield Case("active is the snapshot", lambda s: s.set(l1_offset=s.at["old_l1"]), "data")
    yield Case("copied and shared", lambda s: [s.entry(n, s.place(n) | COPIED) for n in range(4)], "data")


def _bombs() -> Iterator[Case]:
    """Small files that claim far more than they can hold."""

    def one_place(sample: Sample) -> None:
        sample.set(size=8192 << 16)
        for cluster in range(8192):
            sample.entry(cluster, sample.place(3))

    def tables(sample: Sample, first: int, count: int, value: int) -> None:
        """`count` L2 tables behind the image, every entry `value`."""
        size = sample.cluster
        sample.set(size=count * size // 8 * size, l1_size=count)
        begin = -(-len(sample.data) // size) * size
        sample.data.extend(bytes(begin - len(sample.data)) + struct.pack(">Q", value) * (count * size // 8))
        for number in range(first, count):
            sample.put(sample.at["l1"] + 8 * number, ">Q", begin + number * size | COPIED)

    yield Case("one place 8192 times", one_place, "error")
    yield Case("one place 262144 times", lambda s: tables(s, 0, 32, s.place(3)), "error")
    yield Case("one stream 262144 times", lambda s: tables(s, 0, 32, s.get(s.at["l2"] + 80)), "error")
    big = {"bits": 21}
    yield Case("one big place 262144 times", lambda s: tables(s, 0, 1, s.place(3)), "error", base=big)
    yield Case(
        "one big stream 262144 times", lambda s: tables(s, 0, 1, s.get(s.at["l2"] + 80)), "error", base=big
    )
    zbig = {"bits": 21, "zstd": True}
    yield Case(
        "one big zstd stream 262144 times",
        lambda s: tables(s, 0, 1, s.get(s.at["l2"] + 80)),
        "error",
        base=zbig,
    )
    yield Case(
        "64 TiB of zeros",
        lambda s: (tables(s, 0, 1, ZERO), s.set(size=64 << 40, l1_size=1 << 17)),
        "any",
        base=big,
    )
    yield Case("huge and empty", _huge, "data", "qemu cannot write so large a raw file")
    yield Case("largest l1", lambda s: _wide(s, 0), "data", base={"bits": 9})
    yield Case("largest l1, full", lambda s: _wide(s, 1), "any", base={"bits": 9})
    yield Case("largest l1, scattered", _scattered, "any", base={"bits": 9})
    yield Case("65536 snapshots", lambda s: _snapshots(s, b"name"), "data")
    yield Case("names of 64 KiB", lambda s: _snapshots(s, b"\xff" * 65535, 900), "error")
    yield Case("names of 64 KiB, wide", lambda s: _snapshots(s, "\U0001f600".encode() * 16000, 900), "error")
    yield Case("extra data of 1 KiB", lambda s: _snapshots(s, b"n", 50000, 1024), "data")
    yield Case("overlapping streams", _overlapping, "any")


def _huge(sample: Sample) -> None:
    sample.set(size=64 << 40, l1_size=1 << 17, l1_offset=len(sample.data))
    sample.data.extend(bytes(1 << 20))


def _wide(sample: Sample, used: int) -> None:
    """An L1 of 4 Mi entries, all tables different and in the hole at the end of the file."""
    begin = -(-len(sample.data) // 512) * 512
    count = 4 << 20
    sample.set(size=count << 15, l1_size=count, l1_offset=begin, snapshots=0)
    first = begin + 8 * count
    if used:
        import numpy as np

        table = (np.arange(count, dtype=np.uint64) * 512 + first).astype(">u8").tobytes()
    else:
        table = bytes(8 * count)
    sample.data = sample.data.ljust(begin, b"\0") + table
    sample.length = first + 512 * count * used


def _scattered(sample: Sample) -> None:
    """The same with every 16th table, no two of them next to each other."""
    import numpy as np

    _wide(sample, 1)
    at = sample.get(40)
    table = np.frombuffer(sample.data, ">u8", 4 << 20, at)
    chosen = np.random.default_rng(1).permutation(4 << 20)[: 1 << 18]
    scattered = np.zeros(4 << 20, ">u8")
    scattered[::16] = table[chosen]
    sample.data[at:] = scattered.tobytes()


def _snapshots(sample: Sample, name: bytes, count: int = 65536, extra: int = 24) -> None:
    at = len(sample.data)
    l1 = sample.at["old_l1"]
    fixed = struct.pack(">QIHHIIQII", l1, 1, 1, len(name), 11, 22, 0, 0, extra)
    entry = fixed + struct.pack(">QQ", 0, 4 << 20).ljust(extra, b"\0") + b"1" + name
    sample.set(snapshots=count, snapshots_offset=at)
    sample.data.extend(entry.ljust(-(-len(entry) // 8) * 8, b"\0") * count)


def _overlapping(sample: Sample) -> None:
    """Every byte of a stored deflate block begins another stream."""
    sample.set(size=4096 << 16)
    stream = deflate(bytes(65536))
    for number in range(4096):
        sample.stream(number, stream, sample.place(12) + number)


def _extensions() -> Iterator[Case]:
    def fill(sample: Sample, data: bytes) -> None:
        sample.data[112 : 112 + len(data)] = data
        sample.set(autoclear=0)

    yield Case("extension past the cluster", lambda s: fill(s, struct.pack(">II", 5, 65536)), "error")
    yield Case("extension of 4 GiB", lambda s: fill(s, struct.pack(">II", 5, ALL)), "error")
    yield Case("no terminator", lambda s: fill(s, extension(5, bytes(65536 - 120))), "data")
    yield Case("8190 empty extensions", lambda s: fill(s, struct.pack(">II", 5, 0) * 8178), "data")
    yield Case("backing format name", lambda s: fill(s, extension(0xE2792ACA, b"raw")), "data")
    yield Case("long backing format name", lambda s: fill(s, extension(0xE2792ACA, b"x" * 99)), "error")
    data_file = extension(0x44415441, b"/etc/passwd") + bytes(16)
    yield Case("data file name", lambda s: fill(s, data_file), "data", ANOTHER)
    yield Case("luks header", lambda s: fill(s, extension(0x0537BE77, bytes(16))), "error")
    table = b"\0\x07" + b"\xff" * 46
    yield Case("odd feature table", lambda s: fill(s, extension(0x6803F857, table * 5 + b"x")), "data")
    yield Case(
        "named unknown feature",
        lambda s: (fill(s, extension(0x6803F857, table)), s.set(incompatible=1 << 7)),
        "error",
    )
    for bits in range(6, 64, 7):
        yield Case(
            f"incompatible bit {bits}", (lambda b: lambda s: s.set(incompatible=1 << b))(bits), "error"
        )
    names = (b"/etc/passwd", b"json:{}", b"nbd://host/x", b"../../a", b"\xff\0\n" * 9)
    for number, name in enumerate(names):

        def backed(sample: Sample, name: bytes = name) -> None:
            sample.set(backing_offset=4096, backing_length=len(name))
            sample.data[4096 : 4096 + len(name)] = name

        yield Case(f"backing file {number}", backed, "error")


def _flips() -> Iterator[Case]:
    """Bits that flip: in the header, in each table, in compressed streams."""
    at = Sample().at
    chance = random.Random(7)
    ranges = {"header": (0, 160), "l1": (at["l1"], 8), "l2": (at["l2"], 96), "old_l2": (at["old_l2"], 64),
              "snapshots": (at["snapshots"], 68), "packed": (at["packed"], 400)}  # fmt: skip
    for name, (begin, length) in ranges.items():
        for bit in sorted(chance.sample(range(8 * length), 24)):

            def flip(sample: Sample, place: int = begin + bit // 8, mask: int = 1 << bit % 8) -> None:
                sample.data[place] ^= mask

            yield Case(f"flip {name} {bit}", flip, "any", ANOTHER)
    for bits in (16, 14):
        for number in range(20):
            place = chance.randrange(16 * 12)

            def flip_pair(sample: Sample, place: int = place, mask: int = 1 << number % 8) -> None:
                sample.data[sample.at["l2"] + place] ^= mask

            yield Case(f"flip subclusters {bits} {number}", flip_pair, base={"bits": bits, "words": 2})
