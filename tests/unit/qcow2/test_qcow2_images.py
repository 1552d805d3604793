"""Images with a random past, made by qemu: content and changes equal what qemu says."""

import numpy as np
import pytest

from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.qcow2.block_reader import PointReader
from island_fast.qcow2.changes import count_shared_copied, find_allocated, find_changed
from island_fast.qcow2.image import Image
from tests.support import qemu

pytestmark = qemu.needs_qemu


def read_all(reader, blocks, batch=37):
    """Every block, in batches of an odd size, into dirty buffers."""
    out = np.empty((blocks, BLOCK_SIZE), np.uint8)
    for start in range(0, blocks, batch):
        rows = np.full((min(batch, blocks - start), BLOCK_SIZE), 0xA5, np.uint8)
        reader.read(np.arange(start, start + len(rows)), rows)
        out[start : start + len(rows)] = rows
    return out


def rows_of(content, blocks=None):
    """Bytes as blocks, the rest filled with zeros."""
    count = -(-len(content) // BLOCK_SIZE) if blocks is None else blocks
    rows = np.zeros((count, BLOCK_SIZE), np.uint8)
    used = content[: count * BLOCK_SIZE]
    rows.reshape(-1)[: len(used)] = np.frombuffer(used, np.uint8)
    return rows


def points(image):
    """All points of an image by name; the active one is None."""
    return {None: image.active_point()} | {s.name: image.point_at(s) for s in image.snapshots}


def really_changed(old, new, size_differs):
    """The set of blocks of `new` whose content differs from `old`'s (bytes of both)."""
    after = rows_of(new)
    before = rows_of(old, len(after))
    differ = np.any(before != after, axis=1)
    return set(np.flatnonzero(differ).tolist())


ZSTD = {"compression_type": "zstd"}
CASES = {
    "512": {"cluster_size": 512, "size": 3 << 20},
    "512 old": {"cluster_size": 512, "size": 3 << 20, "compat": "0.10"},
    "4k zstd": {"cluster_size": 4096, "size": 9 << 20, **ZSTD},
    "16k lazy": {"cluster_size": 16384, "size": 20 << 20, "lazy_refcounts": "on"},
    "64k": {"cluster_size": 65536, "size": (30 << 20) + 1536},
    "64k old": {"cluster_size": 65536, "size": (30 << 20) + 512, "compat": "0.10"},
    "64k zstd resized": {"cluster_size": 65536, "size": 20 << 20, **ZSTD, "resizes": True},
    "64k resized": {"cluster_size": 65536, "size": 20 << 20, "resizes": True},
    "8k resized": {"cluster_size": 8192, "size": 7 << 20, "resizes": True},
    "1k resized": {"cluster_size": 1024, "size": 5 << 20, "resizes": True},
    "64k metadata": {"cluster_size": 65536, "size": 25 << 20, "preallocation": "metadata"},
    "128k falloc": {"cluster_size": 131072, "size": 25 << 20, "preallocation": "falloc"},
    "256k": {"cluster_size": 262144, "size": (50 << 20) - 512},
    "2M": {"cluster_size": 2 << 20, "size": (50 << 20) + 4608},
    "2M zstd resized": {"cluster_size": 2 << 20, "size": 40 << 20, **ZSTD, "resizes": True},
    "64k refcounts 64": {"cluster_size": 65536, "size": 20 << 20, "refcount_bits": 64},
    "16k subclusters": {"cluster_size": 16384, "size": 9 << 20, "extended_l2": "on"},
    "64k subclusters": {"cluster_size": 65536, "size": 20 << 20, "extended_l2": "on", "resizes": True},
    "128k subclusters zstd": {"cluster_size": 131072, "size": 25 << 20, "extended_l2": "on", **ZSTD},
    "2M subclusters": {"cluster_size": 2 << 20, "size": (40 << 20) + 1536, "extended_l2": "on"},
    "64k subclusters metadata": {
        "cluster_size": 65536, "size": 25 << 20, "extended_l2": "on", "preallocation": "metadata",
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def past(request, tmp_path_factory):
    """(path, content by point name) of one image."""
    path = tmp_path_factory.mktemp("past") / "image.qcow2"
    case = dict(CASES[request.param])
    names = qemu.create_with_history(path, request.param, case.pop("size"), **case)
    return path, {name: qemu.content(path, name) for name in [None, *names]}


def test_every_block_of_every_point(past):
    path, contents = past
    with Image.open(path) as image:
        for name, point in points(image).items():
            assert point.disk_size == len(contents[name])
            reader = PointReader(image, point)
            assert np.array_equal(read_all(reader, point.blocks), rows_of(contents[name])), name
            assert reader.bytes_read > 0


def test_scattered_blocks(past):
    path, contents = past
    chance = np.random.default_rng(5)
    with Image.open(path) as image:
        point = image.active_point()
        reader, rows = PointReader(image, point), rows_of(contents[None])
        for _ in range(10):
            blocks = np.flatnonzero(chance.random(point.blocks) < chance.random())
            out = np.full((len(blocks), BLOCK_SIZE), 0x5A, np.uint8)
            reader.read(blocks, out)
            assert np.array_equal(out, rows[blocks])


def test_allocated_blocks_hold_everything_that_is_not_zero(past):
    path, contents = past
    with Image.open(path) as image:
        for name, point in points(image).items():
            found = find_allocated(image, point)
            full = np.flatnonzero(rows_of(contents[name]).any(axis=1))
            assert set(full.tolist()) <= set(found.indices().tolist())
            assert found.blocks == point.blocks


def test_allocated_within(past):
    path, _ = past
    chance = np.random.default_rng(9)
    with Image.open(path) as image:
        point = image.active_point()
        whole = find_allocated(image, point)
        for _ in range(5):
            picked = np.flatnonzero(chance.random(point.blocks) < 0.1)
            within = DirtyMap.from_indices(point.blocks, picked)
            assert find_allocated(image, point, within) == whole & within
        assert not find_allocated(image, point, DirtyMap(point.blocks))


def test_changes_between_any_two_points(past):
    path, contents = past
    with Image.open(path) as image:
        everything = points(image)
        for old_name, old in everything.items():
            for new_name, new in everything.items():
                found = find_changed(image, old, new)
                wrong = really_changed(contents[old_name], contents[new_name], True)
                assert wrong <= set(found.map.indices().tolist()), (old_name, new_name)
                assert found.map.blocks == new.blocks
                assert found.shared_copied == 0
                if old == new:
                    assert found.map.count() == found.tables_read == 0


def test_sound_images_have_no_shared_copied_entry(past):
    path, _ = past
    with Image.open(path) as image:
        for snapshot in image.snapshots:
            assert count_shared_copied(image, image.active_point(), image.point_at(snapshot)) == 0


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", [512, 4096, 65536, 2 << 20])
def test_wholly_compressed(tmp_path, kind, cluster):
    chance = np.random.default_rng(cluster)
    size = (12 << 20) + 512 * 3
    # Text-like data of changing density, some of it not compressible, and a hole.
    data = chance.integers(0, 1 + (np.arange(size) >> 16) % 256, dtype=np.uint8)
    data[3 << 20 : 5 << 20] = 0
    (tmp_path / "raw").write_bytes(data.tobytes())
    path = qemu.convert(
        tmp_path / "raw", tmp_path / "image", source_format="raw", compress=True,
        cluster_size=cluster, compression_type=kind,
    )  # fmt: skip
    with Image.open(path) as image:
        point = image.active_point()
        reader = PointReader(image, point)
        assert np.array_equal(read_all(reader, point.blocks, 50), rows_of(data.tobytes()))
        assert image.header.compression == kind
        # Compressed ranges are read together and only once each, but for shared last sectors.
        assert reader.bytes_read < path.stat().st_size * 1.1


def test_a_compressed_cluster_is_decoded_once_for_all_its_blocks(tmp_path, monkeypatch):
    path = qemu.create(tmp_path / "a", 4 << 20, cluster_size=2 << 20)
    qemu.io(path, qemu.write(0, 2 << 20, 7, compressed=True))
    decoded = []
    from island_fast.qcow2 import codecs

    real = codecs.Zlib.decode
    monkeypatch.setattr(codecs.Zlib, "decode", lambda self, *a: decoded.append(1) or real(self, *a))
    with Image.open(path) as image:
        out = np.empty((32, BLOCK_SIZE), np.uint8)
        reader = PointReader(image, image.active_point())
        for first, stop in ((0, 20), (20, 21), (21, 32)):
            reader.read(np.arange(first, stop), out[first:stop])
    assert len(decoded) == 1
    assert np.all(out == 7)


@pytest.mark.parametrize("cluster", [512, 65536, 2 << 20])
def test_an_unchanged_image_reads_no_l2_table(tmp_path, cluster):
    path = qemu.create(tmp_path / "a", 64 << 20, cluster_size=cluster)
    qemu.io(path, qemu.write(0, 8 << 20, 1))
    qemu.snapshot_create(path, "one")
    qemu.snapshot_create(path, "two")
    with Image.open(path) as image:
        one, two = (image.point_at(s) for s in image.snapshots)
        found = find_changed(image, one, two)
        assert (found.tables_read, found.map.count(), found.shared_copied) == (0, 0, 0)


def test_one_change_reads_two_tables_and_names_its_cluster(tmp_path):
    path = qemu.create(tmp_path / "a", 3 << 30)
    qemu.io(path, *[qemu.write(n << 29, 1 << 20, 1) for n in range(6)])
    qemu.snapshot_create(path, "one")
    qemu.io(path, qemu.write((1 << 30) + 70000, 4096, 2))
    qemu.snapshot_create(path, "two")
    with Image.open(path) as image:
        one, two = (image.point_at(s) for s in image.snapshots)
        seen = []
        found = find_changed(image, one, two, lambda done, total: seen.append((done, total)))
        assert found.tables_read == 2
        assert found.map.indices().tolist() == [(1 << 30 >> 16) + 1]
        assert seen == [(1, 1)]
        assert find_changed(image, two, one).map == found.map


def test_every_kind_of_change_is_seen(tmp_path):
    path = qemu.create(tmp_path / "a", 4 << 20)
    qemu.io(path, *[qemu.write(n << 16, 65536, 1) for n in range(60)])
    qemu.snapshot_create(path, "one")
    qemu.io(
        path, qemu.write(0, 512, 2), qemu.zeroes(5 << 16, 65536),
        qemu.zeroes(6 << 16, 65536, unmap=True), qemu.discard(8 << 16, 65536),
        qemu.write(62 << 16, 512, 3), qemu.discard(10 << 16, 65536),
    )  # fmt: skip
    qemu.io(path, qemu.write(10 << 16, 65536, 4, compressed=True))
    qemu.snapshot_create(path, "two")
    with Image.open(path) as image:
        one, two = (image.point_at(s) for s in image.snapshots)
        assert find_changed(image, one, two).map.indices().tolist() == [0, 5, 6, 8, 10, 62]
        assert not {5, 6, 8} & set(find_allocated(image, two).indices().tolist())


def test_resized_boundary_and_tail_are_changed(tmp_path):
    path = qemu.create(tmp_path / "a", (10 << 16) + 512, cluster_size=131072)
    qemu.io(path, qemu.write(0, 10 << 16, 1))
    qemu.snapshot_create(path, "small")
    qemu.resize(path, 20 << 16)
    qemu.snapshot_create(path, "large")
    with Image.open(path) as image:
        small, large = (image.point_at(s) for s in image.snapshots)
        assert find_changed(image, small, large).map.indices().tolist() == list(range(10, 20))
        assert find_changed(image, large, small).map.indices().tolist() == [10]


def test_internal_snapshot_keeps_its_own_size_when_the_volume_shrinks(tmp_path):
    path = qemu.create(tmp_path / "a", 6 << 20)
    qemu.io(path, qemu.write(0, 6 << 20, 9))
    qemu.snapshot_create(path, "large")
    qemu.resize(path, 1 << 20)
    with Image.open(path) as image:
        point = image.point_at(image.snapshots[0])
        assert (point.blocks, image.active_point().blocks) == (96, 16)
        assert np.all(read_all(PointReader(image, point), 96) == 9)


def test_reload_sees_the_new_snapshot_and_the_grown_file(tmp_path):
    path = qemu.create(tmp_path / "a", 6 << 20)
    with Image.open(path) as image:
        qemu.io(path, qemu.write(0, 6 << 20, 9))
        qemu.snapshot_create(path, "one")
        assert image.snapshots == ()
        image.reload()
        point = image.point_at(image.snapshots[0])
        assert np.all(read_all(PointReader(image, point), 96) == 9)


def test_one_reader_serves_many_threads(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    path = qemu.create(tmp_path / "a", 32 << 20)
    qemu.io(path, *[qemu.write(n << 20, 1 << 20, n + 1) for n in range(32)])
    with Image.open(path) as image, ThreadPoolExecutor(8) as pool:
        reader = PointReader(image, image.active_point())

        def one(number):
            out = np.empty((16, BLOCK_SIZE), np.uint8)
            reader.read(np.arange(16 * number, 16 * number + 16), out)
            return np.all(out == number + 1)

        assert all(pool.map(one, list(range(32)) * 4))
        assert reader.bytes_read == 4 * 32 << 20


def test_neighbours_in_the_file_are_read_together(tmp_path, monkeypatch):
    import os

    path = qemu.create(tmp_path / "a", 32 << 20)
    qemu.io(path, qemu.write(0, 16 << 20, 1))
    calls = []
    real = os.preadv
    with Image.open(path) as image:
        reader = PointReader(image, image.active_point())
        out = np.empty((256, BLOCK_SIZE), np.uint8)
        monkeypatch.setattr(os, "preadv", lambda *a: calls.append(a) or real(*a))
        reader.read(np.arange(256), out)
    # One read of the L2 table, and 16 MiB of data in reads of at most 8 MiB.
    assert len(calls) <= 4
