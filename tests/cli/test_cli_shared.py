"""`island snapshot --shared`: the group of a repository's directory can restore from it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.cli.conftest import Island
from tests.support import qemu

pytestmark = qemu.needs_qemu


def modes(folder: Path) -> set[tuple[str, int]]:
    found = [(os.stat(folder), "d")]
    for path in folder.rglob("*[!~]"):  # without the reserve, which nobody reads
        found.append((path.stat(), "d" if path.is_dir() else "f"))
    return {(kind, stat.S_IMODE(status.st_mode)) for status, kind in found}


@pytest.mark.parametrize("umask", [0o077, 0o022])
def test_modes_of_a_shared_repository(island: Island, disk: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        island.text("snapshot", disk, "--shared", "-q")
        island.text("snapshot", disk, "-q")
    finally:
        os.umask(before)
    assert modes(island.repository) == {("d", 0o2750), ("f", 0o640)}


def test_modes_of_any_other(island: Island, disk: Path) -> None:
    island.text("snapshot", disk, "-q")
    assert modes(island.repository) == {("d", 0o700), ("f", 0o600)}


def test_a_member_of_the_group_restores(
    island: Island, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user, whose only right is that group, with local state of his own."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    member, group = 54321, 54322
    island.repository.mkdir()
    os.chown(island.repository, 0, group)
    taken = island.json("snapshot", disk, "--shared")["snapshot"]
    his = tmp_path / "his"
    his.mkdir()
    os.chown(his, member, member)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    words = ["restore", taken, "--format", "raw", "-q"]
    island.text(*words, tmp_path / "imported.raw")  # imports what the other user may not be able to read
    nobodys = (os.environ["ISLAND_STATE"], "/proc/state")  # one that root alone may read, and none
    monkeypatch.setenv("ISLAND_STATE", str(his / "state"))
    groups = os.getgroups()
    try:
        os.setgroups([group])
        os.setegid(member)
        os.seteuid(member)
        assert island.text(*words, his / "disk.raw") == ""
        assert "belongs to host" in island.fails(4, "delete", taken), "reading is all that the group can do"
        for state in nobodys:
            monkeypatch.setenv("ISLAND_STATE", state)
            for verb in ("list", f"show {taken}", "verify --all", "usage", f"diff {taken} {taken}"):
                island.text(*verb.split())
            assert "local state" in island.fails(1, "delete", taken)
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
    qemu.compare(disk, his / "disk.raw")


def test_an_older_repository_is_not_opened_to_others_unasked(island: Island, disk: Path) -> None:
    island.text("snapshot", disk, "-q")
    assert "exists and is not shared; run chmod -R g+rX" in island.fails(2, "snapshot", disk, "--shared")
    assert modes(island.repository) == {("d", 0o700), ("f", 0o600)}


def test_a_container_has_an_access_list(island: Island, disk: Path) -> None:
    words = ["-r", "swift://box/host", "snapshot", disk, "--shared"]
    assert "who may read a container" in island.fails(2, *words)
