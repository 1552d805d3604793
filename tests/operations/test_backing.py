"""Images with backing files: only those that the caller lists, and what a guest sees through all of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import ImageInUseError, RefusedError, UnsupportedImageError, UsageError
from island_fast.results import SnapshotTaken
from tests.support import qemu
from tests.support.daemon import StorageDaemon

MIB = 1 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "base.qcow2", 8 * MIB)
    qemu.io(path, qemu.write(0, 4 * MIB, 1), qemu.write(7 * MIB, MIB, 2))
    return path


def overlay(
    path: Path, backing: Path, backing_format: str = "qcow2", size: int = 12 * MIB, **options: object
) -> Path:
    merged = {"lazy_refcounts": "on", **options}
    extra = ",".join(f"{name}={value}" for name, value in merged.items())
    qemu.run(
        *("qemu-img", "create", "-q", "-f", "qcow2", "-o", extra),
        *("-b", backing, "-F", backing_format, path, size),
    )
    return path


def snapshot_and_check(
    repository: Repository, image: Path, backing: list[str], folder: Path
) -> SnapshotTaken:
    taken = repository.snapshot(image, volume="vol", backing=backing)
    target = folder / "check.raw"
    repository.restore(taken.snapshot, target, image_format="raw")
    assert target.read_bytes() == qemu.content(image)
    target.unlink()
    flat = folder / "flat.qcow2"
    repository.restore(taken.snapshot, flat)
    assert "backing file" not in qemu.run("qemu-img", "info", "-f", "qcow2", flat)
    flat.unlink()
    return taken


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cluster_size": 4096},
        {"cluster_size": 2 * MIB},
        {"cluster_size": 16384, "extended_l2": "on"},
        {"cluster_size": 131072, "extended_l2": "on"},
        {"cluster_size": 2 * MIB, "extended_l2": "on"},
    ],
    ids=str,
)
def test_what_shows_through_is_stored(
    options: dict[str, object], repository: Repository, base: Path, tmp_path: Path
) -> None:
    top = overlay(tmp_path / "top.qcow2", base, **options)
    listed = [f"qcow2:{base}"]
    first = snapshot_and_check(repository, top, listed, tmp_path)
    assert first.rule == "full-scan"
    qemu.io(
        top,
        qemu.write(MIB + 1024, 3000, 5),
        qemu.zeroes(2 * MIB, 70000),
        qemu.zeroes(3 * MIB, 131072, unmap=True),
        qemu.write(8 * MIB - 512, 1024, 6),
        qemu.write(11 * MIB, 512, 7),
    )
    second = snapshot_and_check(repository, top, listed, tmp_path)
    assert (second.rule, second.parent) == ("table-diff", first.snapshot)
    qemu.io(top, qemu.discard(MIB, 2 * MIB))
    assert snapshot_and_check(repository, top, listed, tmp_path).rule == "table-diff"


def test_a_chain_of_three_with_a_raw_end_of_odd_size(repository: Repository, tmp_path: Path) -> None:
    raw = tmp_path / "end.raw"
    raw.write_bytes(os.urandom(3 * MIB + 1536))
    middle = overlay(tmp_path / "middle.qcow2", raw, "raw", size=6 * MIB)
    qemu.io(middle, qemu.write(MIB, 65536, 9), qemu.zeroes(2 * MIB, 4096))
    top = overlay(tmp_path / "top.qcow2", middle, size=5 * MIB + 512)
    qemu.io(top, qemu.write(4 * MIB, 65536, 8))
    listed = [f"qcow2:{middle}", f"raw:{raw}"]
    snapshot_and_check(repository, top, listed, tmp_path)
    qemu.io(top, qemu.write(0, 512, 8))
    taken = snapshot_and_check(repository, top, listed, tmp_path)
    assert (taken.rule, taken.blocks_candidate) == ("table-diff", 1)


def test_a_commit_into_the_backing_file_gives_a_full_scan(
    repository: Repository, base: Path, tmp_path: Path
) -> None:
    top = overlay(tmp_path / "top.qcow2", base)
    other = overlay(tmp_path / "other.qcow2", base)
    qemu.io(other, qemu.write(0, MIB, 9))
    listed = [f"qcow2:{base}"]
    snapshot_and_check(repository, top, listed, tmp_path)
    qemu.run("qemu-img", "commit", "-q", "-f", "qcow2", other)
    taken = snapshot_and_check(repository, top, listed, tmp_path)
    assert (taken.rule, taken.blocks_changed) == ("full-scan", 16)
    assert "backing files" in taken.reason


def test_a_rebase_without_copying_gives_a_full_scan(
    repository: Repository, base: Path, tmp_path: Path
) -> None:
    top = overlay(tmp_path / "top.qcow2", base)
    snapshot_and_check(repository, top, [f"qcow2:{base}"], tmp_path)
    other = qemu.create(tmp_path / "other.qcow2", 8 * MIB)
    qemu.io(other, qemu.write(0, 4 * MIB, 1), qemu.write(5 * MIB, MIB, 3))
    qemu.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", other, "-F", "qcow2", top)
    taken = snapshot_and_check(repository, top, [f"qcow2:{other}"], tmp_path)
    assert (taken.rule, taken.blocks_changed) == ("full-scan", 32)
    assert "backing files" in taken.reason


def test_only_a_listed_chain_is_read(repository: Repository, base: Path, tmp_path: Path) -> None:
    top = overlay(tmp_path / "top.qcow2", base)
    link = tmp_path / "link.qcow2"
    link.symlink_to(base)
    raw = tmp_path / "x.raw"
    raw.write_bytes(bytes(MIB))
    for listed, error, hint in (
        ([], UnsupportedImageError, "--backing"),
        ([f"qcow2:{link}"], RefusedError, "symbolic link"),
        ([f"qcow2:{base}", f"qcow2:{base}"], RefusedError, "twice"),
        ([f"qcow2:{base}", f"raw:{raw}"], RefusedError, "has no backing file"),
        ([f"raw:{raw}", f"qcow2:{base}"], UsageError, "order"),
        ([f"qcow2:{top}"], RefusedError, "not listed"),
        ([str(base)], UsageError, "qcow2:FILE"),
        ([f"nbd:{base}"], UsageError, "qcow2:FILE"),
        ([f"qcow2:{base}"] * 65, UsageError, "over the limit of 64"),
    ):
        with pytest.raises(error, match=hint):
            repository.snapshot(top, backing=listed)
    with pytest.raises(RefusedError, match="has no backing file"):
        repository.snapshot(base, backing=[f"raw:{raw}"])
    assert repository.snapshots() == []


def test_a_backing_file_that_is_written_to_is_refused(
    repository: Repository, base: Path, tmp_path: Path
) -> None:
    top = overlay(tmp_path / "top.qcow2", base)
    with StorageDaemon(base), pytest.raises(ImageInUseError):
        repository.snapshot(top, backing=[f"qcow2:{base}"])


def test_two_overlays_share_a_backing_file(repository: Repository, base: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        top = overlay(tmp_path / f"{name}.qcow2", base)
        taken = repository.snapshot(top, backing=[f"qcow2:{base}"])
        assert taken.volume == name
