"""Feed malformed input to the qcow2 reader, its codecs and the kernels, and report what breaks them.

    scripts/fuzz.py SECONDS            random mutation; kernels built with AddressSanitizer
    scripts/fuzz.py SECONDS --atheris  coverage-guided (pip install atheris); kernels as installed

An input is handled correctly if it is read, or refused with an IslandError or CodecError. Anything else is a
finding: another exception, a result that differs from that of the slow twins, no end after 10 seconds, a
report of the sanitizer. Findings are kept as files, which the output names, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1 << 20
PATIENCE = 10
NUMBERS = (0, 1, 8, 9, 16, 21, 22, 63, 64, 511, 512, 513, 4095, 65535, 1 << 31, (1 << 32) - 1, 1 << 40,
           1 << 62, 1 << 63, (1 << 63) - 1, (1 << 64) - 512, (1 << 64) - 1)  # fmt: skip


def main() -> int:
    """Fuzz as the command line asks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("seconds", type=int, help="how long to run, in seconds")
    parser.add_argument("--atheris", action="store_true", help="coverage-guided, without AddressSanitizer")
    parser.add_argument("--seed", type=int, default=None, help="seed of the random numbers (a new one)")
    parser.add_argument("--inside", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return mutate(options.seconds, options.seed, Path(options.inside))
    if options.atheris:
        return run_atheris(options.seconds)
    return supervise(options.seconds, options.seed)


# --- Under AddressSanitizer ---


def supervise(seconds: int, seed: int | None) -> int:
    """Build the kernels with the sanitizer, and run this program with them, again after each finding."""
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    folder = Path(tempfile.mkdtemp(prefix="island-fuzz-"))
    environment = build_sanitized(folder)
    end = time.monotonic() + seconds
    last, done, findings = folder / "last", 0, 0
    print(f"seed {seed}, findings go to {folder}", flush=True)
    while (left := int(end - time.monotonic())) > 0:
        last.write_bytes(bytes(LIMIT + 16))
        command = [sys.executable, __file__, str(left), "--seed", str(seed + findings), "--inside", str(last)]
        ended = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        raw = last.read_bytes()
        done += int.from_bytes(raw[:8], "little")
        if ended.returncode == 0:
            break
        findings += 1
        size = int.from_bytes(raw[8:16], "little")
        found = folder / f"finding-{findings}"
        found.write_bytes(raw[16 : 16 + size])
        print(f"{found}:\n{(ended.stdout + ended.stderr)[-4000:]}", flush=True)
    print(f"{done} executions, {findings} findings")
    if not findings:
        shutil.rmtree(folder)
    return 1 if findings else 0


def build_sanitized(folder: Path) -> dict[str, str]:
    """Copy the package, build its kernels with AddressSanitizer, and return the environment to use it."""
    copy = folder / "build"
    shutil.copytree(
        ROOT / "island_fast", copy / "island_fast", ignore=shutil.ignore_patterns("*.so", "_diff.c")
    )
    shutil.copy(ROOT / "setup.py", copy)
    flags = "-fsanitize=address,undefined -fno-sanitize=alignment -fno-omit-frame-pointer -g -O1"
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(
        build, cwd=copy, check=True, capture_output=True, env=os.environ | {"CFLAGS": flags, "LDFLAGS": flags}
    )
    libraries = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(copy), str(ROOT), str(ROOT / "tests" / "property")]),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "OPENBLAS_NUM_THREADS": "1",
    }


def mutate(seconds: int, seed: int, last: Path) -> int:
    """Run mutated inputs until the time is over. The file `last` holds the one that is running."""
    import island_fast

    assert "island-fuzz-" in str(island_fast.__file__), island_fast.__file__
    chance = random.Random(seed)
    inputs = make_corpus()
    end = time.monotonic() + seconds
    signal.signal(signal.SIGALRM, raise_timeout)
    with open(last, "r+b") as file, mmap.mmap(file.fileno(), LIMIT + 16) as shared:
        done = 0
        while time.monotonic() < end:
            data = mutate_one(chance, inputs)
            shared[16 : 16 + len(data)] = data
            shared[8:16] = len(data).to_bytes(8, "little")
            signal.alarm(PATIENCE)
            try:
                run_one_input(data)
            except BaseException:  # noqa: BLE001 (every exception is a finding)
                traceback.print_exc()
                return 1
            finally:
                signal.alarm(0)
            done += 1
            shared[0:8] = done.to_bytes(8, "little")
    return 0


def raise_timeout(_number: int, _frame: object) -> None:
    """Raise TimeoutError, which makes an input that takes too long a finding."""
    raise TimeoutError(f"no end after {PATIENCE} seconds")


def mutate_one(chance: random.Random, inputs: list[bytes]) -> bytes:
    """Return an input of the corpus with a few changes, mostly of bytes that are not zero."""
    data = bytearray(chance.choice(inputs))
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8, 30))):
        at = choose_offset(chance, data)
        kind = chance.randrange(7)
        width = chance.choice((1, 2, 4, 8))
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at : at + width] = (chance.choice(NUMBERS) % 256**width).to_bytes(width, "big")
        elif kind == 2:
            data[at : at + width] = chance.randbytes(width)
        elif kind == 3:
            old = int.from_bytes(data[at : at + width], "big")
            data[at : at + width] = ((old + chance.randrange(-9, 10)) % 256**width).to_bytes(width, "big")
        elif kind == 4:
            other = chance.choice(inputs)
            begin, length = chance.randrange(len(other)), chance.choice((1, 8, 64, 512))
            data[at : at + length] = other[begin : begin + length]
        elif kind == 5 and chance.random() < 0.2:
            del data[at + 1 :]
        else:
            to = choose_offset(chance, data)
            data[to : to + width] = data[at : at + width]
    return bytes(data[:LIMIT])


def choose_offset(chance: random.Random, data: bytearray) -> int:
    """Return an offset to change, of a byte that is not zero if one is found soon."""
    for _ in range(20):
        at = chance.randrange(len(data))
        if data[at]:
            return at
    # Headers and tables are near the beginning.
    return chance.randrange(min(len(data), 600))


# --- With atheris ---


def run_atheris(seconds: int) -> int:
    """Run atheris with the corpus. It prints its progress and stops at the first finding."""
    try:
        import atheris
    except ImportError:
        print("atheris is not installed: pip install atheris", file=sys.stderr)
        return 2
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "property")]
    with atheris.instrument_imports(include=["island_fast.qcow2", "zlib"]):
        import island_fast.qcow2.bitmaps
        import island_fast.qcow2.extents  # noqa: F401
    folder = Path(tempfile.mkdtemp(prefix="island-fuzz-"))
    for number, data in enumerate(make_corpus()):
        (folder / f"{number}").write_bytes(data)
    arguments = [
        f"-max_total_time={seconds}",
        f"-timeout={PATIENCE}",
        f"-max_len={LIMIT}",
        "-rss_limit_mb=1024",
    ]
    atheris.Setup(
        [sys.argv[0], *arguments, f"-artifact_prefix={folder}/finding-", str(folder)], run_one_input
    )
    atheris.Fuzz()
    return 0


# --- Targets ---


def make_corpus() -> list[bytes]:
    """Return valid inputs for every target; the first byte of each chooses the target."""
    from tests.images.hostile.samples import Sample, deflate

    images = [bytes(Sample(**base).data) for base in (
        {"bits": 9}, {"bits": 9, "version": 2}, {"bits": 9, "zstd": True}, {"bits": 12},
        {"bits": 14, "words": 2},
    )]  # fmt: skip
    import zstandard

    text = b"some text to compress, " * 200
    packed = zstandard.ZstdCompressor().compress
    streams = [deflate(text[:4096]), packed(text[:4096]), packed(text[:999]) + packed(text[999:4096])]
    kernels = [random.Random(n).randbytes(40) + image[3072:4096] for n, image in enumerate(images[:3] * 3)]
    inputs = [b"\0" + image for image in images]
    inputs += [b"\1" + image[:8192] for image in images]
    inputs += [b"\2" + image[image.find(b"1old") - 64 :][:600] for image in images]
    inputs += [bytes([3 + n]) + stream for stream in streams for n in (0, 1)]
    return inputs + [b"\5" + data for data in kernels]


def run_one_input(data: bytes) -> None:
    """Run one input; raise if it is not handled correctly."""
    from island_fast.errors import IslandError
    from island_fast.qcow2.codecs import CodecError

    if not data:
        return
    targets = (read_image, read_header, read_snapshot_table, inflate, decode_zstd, run_kernels)
    target = targets[data[0] % 6]
    try:
        target(data[1:])
    except (IslandError, CodecError) as error:
        if "\n" in str(error):
            raise ValueError("the message has more than one line") from error


def read_image(data: bytes) -> None:
    """Read a whole image, which is in a file in memory, as a snapshot would."""
    import numpy as np

    from island_fast.qcow2.bitmaps import read_bitmaps
    from island_fast.qcow2.block_reader import PointReader
    from island_fast.qcow2.changes import count_shared_copied, find_allocated, find_changed
    from island_fast.qcow2.extents import iter_extents
    from island_fast.qcow2.image import Image

    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, data)
        opened = Image("fuzz", fd)
        active = opened.active_point()
        if active.disk_size > 1 << 32:
            return
        read_bitmaps(opened)
        end = 0
        for window in iter_extents(opened, active):
            assert window.start[0] == end
            assert np.all(window.length > 0)
            end = int(window.start[-1] + window.length[-1])
        assert end == active.disk_size
        reader, out = PointReader(opened, active), np.empty((16, 65536), np.uint8)
        for number, blocks in enumerate(find_allocated(opened, active).batches(16)):
            reader.read(blocks, out[: len(blocks)])
            if number > 64:
                break
        for snapshot in opened.snapshots[:3]:
            old = opened.point_at(snapshot)
            if old.disk_size < 1 << 32:
                find_changed(opened, old, active)
                count_shared_copied(opened, active, old)
    finally:
        os.close(fd)


def read_header(data: bytes) -> None:
    """Parse the first cluster of a large file."""
    from island_fast.qcow2.header import header_span, parse_header

    span = header_span(data)
    parsed = parse_header(data[:span].ljust(min(span, 1 << 21), b"\0"), 1 << 40)
    assert 9 <= parsed.cluster_bits <= 21
    assert parsed.l1_offset + 8 * parsed.l1_size <= 1 << 40 or not parsed.l1_size


def read_snapshot_table(data: bytes) -> None:
    """Read a table of internal snapshots; the first byte is their number."""
    from dataclasses import replace

    from island_fast.qcow2.header import parse_header
    from island_fast.qcow2.names import unescape
    from island_fast.qcow2.snapshots import read_snapshots
    from tests.support.handmade import header as good

    base = parse_header(good(snapshots=1, snapshots_offset=0x50000), 1 << 20)
    count = data[0] if data else 1
    found = read_snapshots(
        lambda offset, length: data[offset - 0x50000 :][:length],
        replace(base, snapshot_count=count, snapshots_offset=0x50000), 0x50000 + len(data),
    )  # fmt: skip
    assert len(found) == count
    for snapshot in found:
        unescape(snapshot.name)
        unescape(snapshot.id)


def inflate(data: bytes) -> None:
    """Decode a deflate stream into a cluster of 4 KiB."""
    from island_fast.qcow2.codecs import Zlib

    target = bytearray(4096)
    Zlib().decode(memoryview(data), memoryview(target))
    assert target == zlib.decompressobj(-15).decompress(data, 4096)


def decode_zstd(data: bytes) -> None:
    """Decode a zstd stream into a cluster of 4 KiB."""
    from island_fast.qcow2.codecs import Zstd

    Zstd().decode(memoryview(data), memoryview(bytearray(4096)))


def run_kernels(data: bytes) -> None:
    """Run every kernel on buffers of exactly the size that it can use, and compare it with its slow twin."""
    import numpy as np
    import twins

    from island_fast import _diff

    chance = random.Random(zlib.crc32(data[:40]))
    words = chance.choice((1, 2))
    bits = chance.randrange(9 if words == 1 else 14, 22)
    count = chance.choice((0, 1, 63, 64, 65, 100)) * words
    raw = (data[40:] or b"\0").ljust(8, b"\0")
    raw = (raw * (1 + 16 * count // len(raw)))[: 16 * count]
    a, b = (
        np.frombuffer(raw[: 8 * count], np.uint64).copy(),
        np.frombuffer(raw[8 * count :], np.uint64).copy(),
    )
    first = chance.choice((0, 1, 63, 64, 1000, chance.randrange(1 << 16)))
    blocks = max(0, ((first + count // words) << bits >> 16) + chance.randrange(-40, 40))
    for name, tables in (("mark_allocated", (a,)), ("mark_changed", (a, b))):
        bitmap = np.zeros((blocks + 63) // 64, np.uint64)
        found = getattr(_diff, name)(*tables, first, bits, bitmap, blocks, words)
        expected = getattr(twins, name)(*tables, first, bits, blocks, words)
        assert (found, {i for i, bit in enumerate(twins.bits(bitmap)) if bit}) == expected, name
        if blocks:
            runs = np.zeros((chance.randrange(1, 9), 2), np.int64)
            rows, _ = _diff.bitmap_runs(bitmap, chance.randrange(blocks), blocks, runs)
            assert rows <= len(runs)
    size, version = chance.choice((0, 1 << bits, 1 << 40, (1 << 63) - 1)), chance.choice((2, 3))
    columns = [np.zeros(count // words, kind) for kind in (np.uint8, np.uint64, np.uint32)]
    bad, rows = twins.decode_l2(a, bits, version, size, words)
    assert _diff.decode_l2(a, bits, version, size, *columns, words) == bad
    assert [tuple(int(c[i]) for c in columns) for i in range(len(rows))] == rows
    flat = a.view(np.uint8)
    unit = chance.choice((1, 7, 8, 16, 64))
    flat = flat[: len(flat) // unit * unit]
    flags = np.zeros(len(flat) // unit, np.uint8)
    assert _diff.zero_blocks(flat, unit, flags) == sum(twins.zero_blocks(flat, unit))
    digests = np.zeros((len(flags), 16), np.uint8)
    _diff.hash_blocks(flat, unit, chance.randrange(1 << 64), digests)


if __name__ == "__main__":
    sys.exit(main())
