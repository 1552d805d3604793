"""Compressed clusters: what qemu takes is taken, what it refuses is refused, in bounded memory."""

import contextlib
import struct
import subprocess
import tracemalloc
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from island_fast.dirtymap import BLOCK_SIZE
from island_fast.errors import DamagedImageError
from island_fast.qcow2.block_reader import PointReader
from island_fast.qcow2.codecs import CodecError, Zlib, Zstd
from island_fast.qcow2.image import Image
from tests.support import qemu

CLUSTER = 65536
TEXT = (b"".join(b"line %d of a text that repeats itself\n" % n for n in range(4000)))[:CLUSTER]
JUNK = np.random.default_rng(1).integers(0, 256, CLUSTER, np.uint8).tobytes()


def deflate(data, wbits=-12):
    engine = zlib.compressobj(6, zlib.DEFLATED, wbits)
    return engine.compress(data) + engine.flush()


def frame(data, **options):
    return zstandard.ZstdCompressor(**options).compress(data)


def unsized(data):
    """A frame that does not tell its size, with a checksum."""
    engine = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    return engine.compress(data) + engine.flush()


def skippable(data):
    return struct.pack("<II", 0x184D2A53, len(data)) + data


BLOCKWISE = unsized(TEXT)
GOOD = {
    "zlib": {
        "plain": deflate(TEXT),
        "incompressible": deflate(JUNK),
        "32 KiB window": deflate(JUNK[:20000] + JUNK[:20000] + TEXT[:25536], -15),
        "longer than the cluster": deflate(TEXT + TEXT),
        "bomb": deflate(bytes(64 << 20)),
        "garbage behind": deflate(TEXT) + b"\xff" * 300,
    },
    "zstd": {
        "plain": frame(TEXT),
        "incompressible": frame(JUNK),
        "unsized with checksum": BLOCKWISE,
        "two frames": frame(TEXT[:1000]) + frame(TEXT[1000:]),
        "skippable first": skippable(b"x" * 20) + frame(TEXT),
        "skippable between": frame(TEXT[:9]) + skippable(b"") + frame(TEXT[9:]),
        "empty frame first": frame(b"") + frame(TEXT),
        "garbage behind": frame(TEXT) + b"\xff" * 300,
        "another stream behind": frame(TEXT) + frame(JUNK)[:400],
        "repeated byte": frame(bytes(CLUSTER)),
    },
}
BAD = {
    "zlib": {
        "short": deflate(TEXT[:-1]),
        "cut": deflate(TEXT)[:-20],
        "zlib wrapped": zlib.compress(TEXT),
        "empty": b"",
        "noise": b"\xff" * 500,
    },
    "zstd": {
        "short": frame(TEXT[:-1]),
        "cut": frame(TEXT)[:-1],
        "frame longer than the cluster": frame(TEXT + b"x"),
        "second frame too long": frame(TEXT[:-1]) + frame(b"xy"),
        "bomb": frame(bytes(64 << 20)),
        "empty": b"",
        "only skippable": skippable(b"x" * 100),
        "skippable to the moon": struct.pack("<II", 0x184D2A50, 0xFFFFFFFF) + frame(TEXT),
        "no magic": b"\0" + frame(TEXT),
        "wrong checksum": BLOCKWISE[:-1] + bytes([BLOCKWISE[-1] ^ 1]),
        "size is a lie": frame(TEXT)[:5] + b"\xff" + frame(TEXT)[6:],
    },
}  # fmt: skip
ALL = [
    pytest.param(kind, name, id=f"{kind}-{name.replace(' ', '-')}")
    for table in (GOOD, BAD)
    for kind in table
    for name in table[kind]
]


def decode(kind, stream):
    target = bytearray(CLUSTER)
    (Zlib() if kind == "zlib" else Zstd()).decode(memoryview(stream), memoryview(target))
    return bytes(target)


@pytest.mark.parametrize("kind, name", ALL)
def test_streams(kind, name):
    if name in GOOD[kind]:
        wanted = {"incompressible": JUNK, "bomb": bytes(CLUSTER), "repeated byte": bytes(CLUSTER)}
        window = JUNK[:20000] + JUNK[:20000] + TEXT[:25536]
        wanted["32 KiB window"] = window
        assert decode(kind, GOOD[kind][name]) == wanted.get(name, TEXT)
    else:
        with pytest.raises(CodecError):
            decode(kind, BAD[kind][name])


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_bombs_cost_no_memory(kind):
    stream = (GOOD["zlib"] | BAD["zstd"])["bomb"] if kind == "zlib" else BAD["zstd"]["bomb"]
    tracemalloc.start()
    try:
        decode(kind, stream)
    except CodecError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_frame_that_claims_an_exabyte():
    # Frame header: content size field of 8 bytes, single segment, then one raw block of one byte.
    claim = struct.pack("<IBQ", 0xFD2FB528, 0xE0, 1 << 60) + (1 << 3 | 1).to_bytes(3, "little") + b"x"
    with pytest.raises(CodecError):
        decode("zstd", claim)


def test_a_window_larger_than_any_cluster_needs_is_refused():
    wide = zstandard.ZstdCompressionParameters(window_log=26)
    engine = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    stream = engine.compress(TEXT) + engine.flush()
    with pytest.raises(CodecError, match="zstd"):
        decode("zstd", stream)


def test_endless_empty_frames_end():
    with pytest.raises(CodecError, match="4096 frames"):
        decode("zstd", skippable(b"") * 10_000)


@given(st.binary(max_size=400), st.sampled_from(["zlib", "zstd"]), st.integers(0, 200))
def test_noise_fills_the_cluster_or_raises_codec_error(noise, kind, keep):
    good = GOOD[kind]["plain"]
    with contextlib.suppress(CodecError):
        assert len(decode(kind, good[:keep] + noise)) == CLUSTER


@qemu.needs_qemu
@pytest.mark.parametrize("kind, name", ALL)
def test_qemu_agrees(tmp_path, kind, name):
    """Put the stream under a real compressed entry and ask qemu; where both read, they agree."""
    stream = (GOOD[kind] | BAD[kind])[name] or b"\0"
    path = qemu.create(tmp_path / "a", CLUSTER, compression_type=kind)
    qemu.io(path, qemu.write(0, CLUSTER, 1, compressed=True))
    _plant(path, stream[: 2 * CLUSTER - 512])
    with Image.open(path) as image:
        out = np.empty((1, BLOCK_SIZE), np.uint8)
        try:
            PointReader(image, image.active_point()).read(np.array([0]), out)
        except DamagedImageError:
            ours = None
        else:
            ours = out.tobytes()
    assert ours == _qemu_content(path), name


def _plant(path, stream):
    """Append the stream to the file and point the first L2 entry to it."""
    with open(path, "r+b") as file:
        at = -(-path.stat().st_size // 512) * 512
        file.seek(at)
        file.write(stream.ljust(-(-len(stream) // 512) * 512, b"\0"))
        file.seek(40)
        (l1,) = struct.unpack(">Q", file.read(8))
        file.seek(l1)
        l2 = struct.unpack(">Q", file.read(8))[0] & 0x00FFFFFFFFFFFE00
        sectors = -(-len(stream) // 512) - 1
        file.seek(l2)
        file.write(struct.pack(">Q", 1 << 62 | sectors << 54 | at))


def _qemu_content(path):
    """What qemu reads, or None where it fails to."""
    target = path.with_suffix(".raw")
    command = [qemu.QEMU_IMG, "convert", "-f", "qcow2", "-O", "raw", path, target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode == 0:
        return target.read_bytes()
    assert "error while reading" in done.stderr
    return None
