"""What the command says about images, repositories and hosts that do not belong together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import MIB, Island


def test_a_repository_whose_disk_is_not_mounted(
    island: Island, disk: Path, small_disk: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount over the mount point takes the place of one that is missing below it."""
    place = disk.parent / "mnt"
    monkeypatch.setenv("ISLAND_REPOSITORY", str(place))
    island.text("snapshot", disk)
    small_disk("mnt", 32 * MIB)
    told = island.fails(4, "snapshot", disk)
    assert told.startswith(f"there is no repository in {place}, where this host has stored snapshots before")
    assert "--create" in told
    assert not [*place.iterdir()]
    assert "is not an island repository" in island.fails(3, "list")
    assert island.json("snapshot", disk, "--create", "--volume", "again")["volume"] == "again"
    island.text("snapshot", disk, "--volume", "again")


def test_a_copy_to_a_disk_that_is_not_mounted(island: Island, disk: Path, tmp_path: Path) -> None:
    island.text("snapshot", disk)
    far = tmp_path / "far"
    island.text("copy", "--all", "--to", far)
    shutil.rmtree(far)
    assert "there is no repository" in island.fails(4, "copy", "--all", "--to", far)
    assert not far.exists()
    assert len(island.json("copy", "--all", "--to", far, "--create")) == 1


def test_nothing_to_verify_is_said(island: Island, disk: Path) -> None:
    island("snapshot", disk)
    island("delete", "disk@latest")
    done = island("verify", "--all")
    assert (done.code, done.err) == (0, f"island: there are no snapshots in {island.repository}\n")


def test_a_guest_made_by_copying_an_image(island: Island, disk: Path, tmp_path: Path) -> None:
    island.text("snapshot", disk)
    copy = Path(shutil.copy(disk, tmp_path / "web2.qcow2"))
    assert f"whose image is another file, {disk}" in island.fails(4, "snapshot", copy)
    assert "whose image is another file" in island.text("info", copy)
    island.text("snapshot", copy, "--volume", "web2")
    island.text("snapshot", copy)
    assert {one["volume"] for one in island.json("list")} == {"disk", "web2"}


def test_an_image_whose_file_is_another_one_is_said(island: Island, disk: Path, tmp_path: Path) -> None:
    island.text("snapshot", disk)
    shutil.copy(disk, tmp_path / "moved.qcow2")
    disk.unlink()
    done = island("snapshot", tmp_path / "moved.qcow2", "-q")
    assert done.code == 0
    assert done.err == (
        f"island: {tmp_path / 'moved.qcow2'} is the image of volume disk from now on; {disk} is gone\n"
    )
