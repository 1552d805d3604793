"""Which devices share bytes, and where they are mounted, in made-up trees of /sys and /proc."""

from __future__ import annotations

from pathlib import Path

import pytest

from island_fast.qemu import open_files


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A disk 8:0 with partitions 8:1 and 259:7, and another disk 8:16."""
    devices, links = tmp_path / "devices", tmp_path / "links"
    links.mkdir()
    for place, numbers in {"sda": "8:0", "sda/sda1": "8:1", "sda/sda2": "259:7", "sdb": "8:16"}.items():
        folder = devices / place
        folder.mkdir(parents=True)
        (folder / "dev").write_text(f"{numbers}\n")
        (links / numbers).symlink_to(folder)
        if "/" in place:
            (folder / "partition").write_text("1\n")
    other = devices / "sda/sda-bsg"  # has numbers, of a character device, and is no partition
    other.mkdir()
    (other / "dev").write_text("8:99\n")
    monkeypatch.setattr(open_files, "SYSFS_DEVICES", links)
    return devices


@pytest.mark.usefixtures("sysfs")
@pytest.mark.parametrize(
    "device, shared",
    [
        ((8, 0), {(8, 0), (8, 1), (259, 7)}),
        ((8, 1), {(8, 1), (8, 0)}),
        ((259, 7), {(259, 7), (8, 0)}),
        ((8, 16), {(8, 16)}),
        ((7, 7), {(7, 7)}),
    ],
)
def test_a_disk_shares_bytes_with_its_partitions_and_they_with_it_alone(
    device: tuple[int, int], shared: set[tuple[int, int]]
) -> None:
    assert open_files._overlapping(device) == shared


def test_a_mount_is_found_in_every_namespace_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc = tmp_path / "proc"
    mounts = {"self": (1, "0:25 / / rw - overlay overlay rw"), "7": (1, "8:1 / /never rw - ext4 /dev/x rw")}
    mounts["8"] = (2, "8:1 / /srv rw,relatime shared:1 - ext4 /dev/sda1 rw")
    for process, (space, line) in mounts.items():
        (proc / process / "ns").mkdir(parents=True)
        (proc / process / "ns/mnt").symlink_to(f"mnt:[{space}]")
        (proc / process / "mountinfo").write_text(f"36 35 {line}\n")
    monkeypatch.setattr(open_files, "_PROC", proc)
    assert open_files._find_mount({(8, 1)}) == "/srv (as process 8 sees it)"
    assert open_files._find_mount({(0, 25)}) == "/"
    assert open_files._find_mount({(8, 2)}) is None


def test_the_kernels_numbers_are_decoded() -> None:
    assert open_files._decode_numbers(0x0705) == (7, 5)
    assert open_files._decode_numbers(0x1000_0305) == (3, 0x10005)
