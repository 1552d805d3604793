"""New images: qemu finds them sound, shows the same content, and goes on with them."""

import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from island_fast.dirtymap import BLOCK_SIZE
from island_fast.errors import IslandError, UnsupportedImageError
from island_fast.qcow2.block_reader import PointReader
from island_fast.qcow2.changes import count_shared_copied, find_allocated, find_changed
from island_fast.qcow2.image import Image
from island_fast.qcow2.layout import RankedRuns
from island_fast.qcow2.snapshots import PinnedBase
from island_fast.qcow2.writer import Qcow2Writer, RawWriter
from tests.support import qemu


def runs(*pairs):
    return np.array(pairs, np.int64).reshape(-1, 2)


def blocks_of(data_runs):
    return np.concatenate([np.arange(a, b) for a, b in data_runs.tolist()] or [np.arange(0)])


def content_of(blocks, seed=1):
    """Random blocks, never wholly zero, always the same for one block and seed."""
    out = np.empty((len(blocks), BLOCK_SIZE), np.uint8)
    for row, block in enumerate(blocks.tolist()):
        out[row] = np.random.default_rng((seed, block)).integers(0, 256, BLOCK_SIZE, np.uint8)
    return out


def make(path, size, data_runs, bits=16, pin=None, batch=7, order=None):
    """Write an image in batches of shuffled order; its path."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        writer = Qcow2Writer(fd, size, data_runs, bits, pin)
        blocks = blocks_of(data_runs)
        order = np.random.default_rng(3).permutation(len(blocks))
        for start in range(0, len(blocks), batch):
            part = blocks[order[start : start + batch]]
            writer.write(part, content_of(part))
        writer.finish()
    finally:
        os.close(fd)
    return path


def make_raw(path, size, data_runs):
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        writer = RawWriter(fd, size)
        blocks = blocks_of(data_runs)
        for start in range(0, len(blocks), 5):
            part = blocks[start : start + 5]
            writer.write(part[::-1], np.ascontiguousarray(content_of(part)[::-1]))
        writer.finish()
    finally:
        os.close(fd)
    return path


def pin_for(size):
    return PinnedBase("island-t4g-17", "17", 1_700_000_000, 123_456_789, size)


SHAPES = {
    "empty": (10 << 20, runs()),
    "nothing": (0, runs()),
    "tiny": (512, runs((0, 1))),
    "odd": ((20 << 20) + 3 * 512, runs((0, 1), (3, 9), (17, 18), (300, 321))),
    "full": (7 << 20, runs((0, 112))),
    "two tables": ((513 << 20) + 512, runs((8190, 8194), (8203, 8209))),
    "touching": (4 << 20, runs((1, 2), (2, 3), (4, 5))),
}


@qemu.needs_qemu
@pytest.mark.parametrize("bits", [16, 17, 18, 21])
@pytest.mark.parametrize("pinned", [False, True], ids=["alone", "pinned"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda name: name.replace(" ", "-"))
def test_qemu_checks_compares_and_goes_on(tmp_path, shape, pinned, bits):
    size, data_runs = SHAPES[shape]
    pin = pin_for(size) if pinned else None
    path = make(tmp_path / "a.qcow2", size, data_runs, bits, pin)
    raw = make_raw(tmp_path / "a.raw", size, data_runs)
    qemu.check(path)
    qemu.compare(path, raw)
    assert qemu.info(path)["virtual-size"] == size
    assert qemu.info(path)["format-specific"]["data"]["lazy-refcounts"] is True
    if size:
        _go_on(path, size)
    qemu.check(path)
    if pinned:
        # Whatever happened since, the pinned base still holds what was restored.
        _holds(path, pin, data_runs)
        qemu.snapshot_delete(path, pin.name)
        qemu.check(path)


def _holds(path, pin, data_runs):
    with Image.open(path) as image:
        base = image.point_at(image.find_pinned(pin))
        blocks = blocks_of(data_runs)
        near = np.unique(np.clip(np.concatenate([blocks - 1, blocks, blocks + 1]), 0, None))
        near = near[near < base.blocks]
        wanted = np.zeros((len(near), BLOCK_SIZE), np.uint8)
        wanted[np.isin(near, blocks)] = content_of(blocks)
        if len(near) and near[-1] == base.blocks - 1:
            wanted[-1, base.disk_size - (base.blocks - 1) * BLOCK_SIZE :] = 0
        out = np.empty_like(wanted)
        PointReader(image, base).read(near, out)
        assert np.array_equal(out, wanted)


def _go_on(path, size):
    """What a life brings: writes, zeros, discards, snapshots, resizes."""
    end = max(0, size - 512)
    qemu.io(path, qemu.write(0, 512, 3), qemu.write(end, 512, 4), qemu.zeroes(end // 1024 * 512, 512))
    qemu.check(path)
    qemu.snapshot_create(path, "later")
    qemu.io(path, qemu.discard(0, min(size, 1 << 20)), qemu.write(end, 512, 5))
    qemu.check(path)
    qemu.resize(path, size + (3 << 20) + 512)
    qemu.io(path, qemu.write(size, 512, 6))
    qemu.check(path)
    qemu.snapshot_delete(path, "later")


@qemu.needs_qemu
@pytest.mark.parametrize("bits", [16, 18, 21])
def test_our_reader_finds_content_pin_and_no_change(tmp_path, bits):
    size, data_runs = SHAPES["two tables"]
    pin = replace(pin_for(size), name="island-\\xff\\\\ä", id="no number")
    path = make(tmp_path / "a", size, data_runs, bits, pin)
    with Image.open(path) as image:
        assert image.snapshots[0].identity == pin
        base, active = image.point_at(image.find_pinned(pin)), image.active_point()
        found = find_changed(image, base, active)
        assert (found.map.count(), found.tables_read) == (0, 0)
        assert count_shared_copied(image, active, base) == 0
        blocks = blocks_of(data_runs)
        assert set(blocks.tolist()) <= set(find_allocated(image, base).indices().tolist())
        out = np.empty((len(blocks), BLOCK_SIZE), np.uint8)
        for point in (base, active):
            PointReader(image, point).read(blocks, out)
            wanted = content_of(blocks)
            wanted[-1, 512:] = 0
            assert np.array_equal(out, wanted)
        # The next snapshot of a restored volume is incremental at once.
        qemu.io(path, qemu.write(8191 << 16, 512, 1))
        qemu.snapshot_create(path, "next")
        image.reload()
        after = image.point_at(image.snapshots[-1])
        found = find_changed(image, base, after).map.indices()
        step = 1 << (bits - 16)
        start = 8191 // step * step
        assert found.tolist() == list(range(start, start + step))


@qemu.needs_qemu
def test_a_pin_smaller_than_the_volume(tmp_path):
    size = 3 << 30
    pin = pin_for((1 << 30) - 512)
    path = make(tmp_path / "a", size, runs((0, 3), (16380, 16384)), 16, pin)
    qemu.check(path)
    qemu.io(path, qemu.write(0, 1 << 20, 1), qemu.write(2 << 30, 65536, 1))
    qemu.check(path)
    with Image.open(path) as image:
        base = image.point_at(image.find_pinned(pin))
        assert (base.disk_size, image.active_point().disk_size) == (pin.disk_size, size)
        assert base.l1_size == 2
        found = find_changed(image, base, image.active_point())
        assert {0, 15, 16383, 32768} <= set(found.map.indices().tolist())
    qemu.snapshot_apply(path, pin.name)
    qemu.check(path)
    assert qemu.info(path)["virtual-size"] == pin.disk_size


@qemu.needs_qemu
@pytest.mark.parametrize("bits, size", [(16, 16 << 40), (21, 64 << 40)])
def test_huge_and_sparse_in_bounded_memory(tmp_path, bits, size):
    last = size >> 16
    some = np.arange(0, last, last // 40, dtype=np.int64)[:, None] + [0, 2]
    data_runs = np.concatenate([some[:-1], runs((last - 1, last))])
    pin = pin_for(size)
    path = tmp_path / "a"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    tracemalloc.start()
    try:
        writer = Qcow2Writer(fd, size, data_runs, bits, pin)
        block = data_runs[20, :1]
        writer.write(block, content_of(block))
        writer.finish()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        os.close(fd)
    assert peak < 40 << 20
    assert path.stat().st_blocks * 512 < 300 << 20
    qemu.check(path)
    with Image.open(path) as image:
        point = image.point_at(image.find_pinned(pin))
        out = np.empty((2, BLOCK_SIZE), np.uint8)
        PointReader(image, point).read(np.array([int(block[0]), last - 1]), out)
        assert np.array_equal(out[0], content_of(block)[0])
        assert not out[1].any()
        assert find_changed(image, point, image.active_point()).map.count() == 0


def test_a_dense_volume_is_laid_out_in_bounded_memory(tmp_path):
    # 1 TiB of data: 128 MiB of L2 tables and 32 MiB of reference counts go by in small parts. No data
    # is written, so the file stays mostly holes.
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    tracemalloc.start()
    try:
        writer = Qcow2Writer(fd, 1 << 40, runs((0, 1 << 24)))
        writer.finish()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        os.close(fd)
    assert peak < 40 << 20
    with Image.open(tmp_path / "a") as image:
        assert find_allocated(image, image.active_point()).count() == 1 << 24


def test_an_image_without_its_header_is_none(tmp_path):
    path = tmp_path / "a"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    writer = Qcow2Writer(fd, 1 << 20, runs((0, 16)))
    writer.write(np.arange(16), content_of(np.arange(16)))
    os.close(fd)
    with pytest.raises(IslandError, match="not a qcow2 image"):
        Image.open(path)


def test_neighbours_go_in_one_call(tmp_path, monkeypatch):
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    writer = Qcow2Writer(fd, 1 << 30, runs((0, 64), (100, 164)))
    calls = []
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda *a: calls.append(len(a[1])) or real(*a))
    blocks = np.concatenate([np.arange(60, 64), np.arange(100, 104)])
    writer.write(blocks, content_of(blocks))
    # Blocks 63 and 100 are neighbours in the file: holes of the volume take no place there.
    assert calls == [1]
    writer.write(blocks[::-1], content_of(blocks[::-1]))
    assert calls == [1, 8]
    os.close(fd)


@qemu.needs_qemu
def test_many_threads_write_at_once(tmp_path):
    data_runs = runs((0, 100), (150, 300))
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    writer = Qcow2Writer(fd, 20 << 20, data_runs, 17)
    parts = np.array_split(np.random.default_rng(1).permutation(blocks_of(data_runs)), 40)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda part: writer.write(part, content_of(part)), parts))
    writer.finish()
    os.close(fd)
    make_raw(tmp_path / "b", 20 << 20, data_runs)
    qemu.check(tmp_path / "a")
    qemu.compare(tmp_path / "a", tmp_path / "b")


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwritev

    def stingy(fd, buffers, offset):
        return real(fd, [buffers[0][:1000]], offset)

    monkeypatch.setattr(os, "pwritev", stingy)
    data_runs = runs((0, 2), (5, 6))
    make_raw(tmp_path / "a", (5 << 16) + 1024, data_runs)
    out = np.fromfile(tmp_path / "a", np.uint8)
    wanted = content_of(blocks_of(data_runs))
    assert np.array_equal(out[: 2 << 16], wanted[:2].reshape(-1))
    assert np.array_equal(out[5 << 16 :], wanted[2][:1024])
    assert not out[2 << 16 : 5 << 16].any()


def test_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    writer = RawWriter(fd, 1 << 20)
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(IslandError, match="No space left"):
        writer.write(np.arange(1), content_of(np.arange(1)))
    os.close(fd)


def test_refused_sizes(tmp_path):
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    with pytest.raises(UnsupportedImageError, match="multiple of 512 bytes and this one has 1000"):
        Qcow2Writer(fd, 1000, runs())
    with pytest.raises(UnsupportedImageError, match="64 TiB"):
        Qcow2Writer(fd, (64 << 40) + 512, runs())
    assert os.fstat(fd).st_size == 0
    RawWriter(fd, 1000)
    assert os.fstat(fd).st_size == 1000
    with pytest.raises(ValueError, match="empty regular file"):
        RawWriter(fd, 1000)
    os.close(fd)


@pytest.mark.parametrize(
    "arguments",
    [
        (1 << 20, runs((0, 17))),
        (1 << 20, runs((-1, 2))),
        (1 << 20, runs((3, 3))),
        (1 << 20, np.arange(4)),
        (1 << 20, runs(), 15),
        (1 << 20, runs(), 22),
        (1 << 20, runs(), 16, pin_for(2 << 20)),
        (2 << 20, runs((15, 17)), 16, pin_for(1 << 20)),
    ],
)
def test_wrong_calls(tmp_path, arguments):
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    with pytest.raises(ValueError):
        Qcow2Writer(fd, *arguments)
    os.close(fd)


def test_blocks_outside_the_runs(tmp_path):
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    writer = Qcow2Writer(fd, 1 << 30, runs((5, 8), (10, 12)))
    for block in (0, 4, 8, 9, 12, 1 << 40, -1):
        with pytest.raises(ValueError):
            writer.write(np.array([6, block]), content_of(np.arange(2)))
    with pytest.raises(ValueError):
        writer.write(np.arange(5, 7), content_of(np.arange(3)))
    with pytest.raises(ValueError):
        RawWriter(os.open(tmp_path / "b", os.O_RDWR | os.O_CREAT), 1 << 16).write(
            np.array([1]), content_of(np.arange(1))
        )
    os.close(fd)


def test_ranked_runs_against_a_plain_set():
    chance = np.random.default_rng(11)
    for _ in range(200):
        starts = chance.integers(0, 60, chance.integers(0, 8))
        some = np.stack([starts, starts + chance.integers(1, 9, len(starts))], 1)
        ranked = RankedRuns.from_runs(some)
        numbers = sorted({n for a, b in some.tolist() for n in range(a, b)})
        assert ranked.total == len(numbers)
        if numbers:
            assert ranked.rank(np.array(numbers)).tolist() == list(range(len(numbers)))
        low, high = sorted(chance.integers(0, 70, 2).tolist())
        inside, first = ranked.within(low, high)
        assert inside.tolist() == [n for n in numbers if low <= n < high]
        assert not len(inside) or first == numbers.index(inside[0])
