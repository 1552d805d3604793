"""Local state: locks that exclude, registrations that tell who lives, caches that may be lost."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from island_fast.errors import IslandError
from island_fast.repository.local_state import LineageFiles, LocalState, Notes, Registration

ONE = Registration("a" * 32, 0, None)


@pytest.fixture
def files(tmp_path: Path) -> LineageFiles:
    found = LocalState(tmp_path / "state").lineage("r" * 32, "vol")
    found.make()
    return found


def test_every_folder_is_private_whatever_the_umask(tmp_path: Path) -> None:
    """Those above the folder of the state too, and those that an earlier version left open."""
    before = os.umask(0)
    try:
        one, other = (LocalState(tmp_path / name / "deep" / "state") for name in ("one", "other"))
        one.lineage("r" * 32, "vol").make()
        assert len(other.writer) == 32
        Notes(tmp_path / "notes" / "deep").write("folder/name", b"")
        old = LocalState(tmp_path / "old").lineage("r" * 32, "vol")
        (old.folder / "cache").mkdir(parents=True)
        old.make()
    finally:
        os.umask(before)
    open_to_others = [path for path in tmp_path.rglob("*") if path.stat().st_mode & 0o077]
    assert open_to_others == [tmp_path / "old", old.folder / "cache"]  # where others cannot get to


def test_an_error_under_the_lock_stays_what_it_is(files: LineageFiles) -> None:
    """A full disk elsewhere is not blamed on local state."""
    with pytest.raises(OSError, match="elsewhere") as caught, files.lock():
        raise OSError(28, "elsewhere")
    assert not isinstance(caught.value, IslandError)


def test_the_lock_is_given_back_and_waited_for(files: LineageFiles) -> None:
    with files.lock():
        child = multiprocessing.get_context("spawn").Process(target=lock_once, args=(files.folder,))
        child.start()
        child.join(1)
        assert child.exitcode is None, "it waits"
    child.join(30)
    assert child.exitcode == 0


def lock_once(folder: Path) -> None:
    with LineageFiles(folder).lock():
        pass


def test_state_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for use in (
        lambda: LocalState(tmp_path / "file" / "state").writer,
        lambda: LineageFiles(tmp_path / "file" / "vol").make(),
    ):
        with pytest.raises(IslandError, match="ISLAND_STATE"):
            use()


def test_a_registration_lives_as_long_as_its_process(files: LineageFiles) -> None:
    with files.registrations.register(ONE):
        assert files.registrations.all() == [(ONE, True)]
        assert ONE in files.registrations
        assert Registration(ONE.snapshot, 1, None) not in files.registrations
        assert files.registrations.find_abandoned(0) == []
    assert files.registrations.all() == []
    (files.folder / "running" / ONE.snapshot).write_text(
        '{"snapshot": "%s", "attempt": 0, "parent": null, "epoch": 0}' % ("a" * 32)
    )
    assert files.registrations.all() == [(ONE, False)]
    assert files.registrations.find_abandoned(3600) == []
    assert files.registrations.find_abandoned(0) == [ONE.snapshot]
    files.registrations.remove(ONE.snapshot)
    assert files.registrations.all() == []


def test_an_unreadable_registration_keeps_its_id_alive_and_never_commits(files: LineageFiles) -> None:
    (files.folder / "running" / ONE.snapshot).write_text("{")
    ((found, alive),) = files.registrations.all()
    assert (found.snapshot, alive) == (ONE.snapshot, False)
    assert ONE not in files.registrations


def test_the_writer_id_is_made_once(tmp_path: Path) -> None:
    state = LocalState(tmp_path / "state")
    assert len(state.writer) == 32
    assert state.writer == LocalState(tmp_path / "state").writer
    assert os.listdir(tmp_path / "state") == ["writer"]


def test_a_deleted_parent_hands_its_retired_children_up(files: LineageFiles) -> None:
    files.remember_deleted("c" * 32, 0, "b" * 32)
    files.remember_deleted("b" * 32, 0, ONE.snapshot)
    assert {(r.snapshot, r.parent) for r in files.deleted_snapshots()} == {
        ("b" * 32, ONE.snapshot),
        ("c" * 32, ONE.snapshot),
    }
    files.forget_deleted()
    assert files.deleted_snapshots() == []


def test_what_processes_left_half_written_is_tidied_up(files: LineageFiles) -> None:
    files.cache.write("vol/manifests/m", b"kept")
    old, new = files.folder / "running" / ".old.0", files.folder / "cache" / "manifests" / ".new.0"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    os.utime(files.folder / "cache" / "manifests" / "m", (0, 0))
    files.remove_leftovers()
    assert not old.exists()
    assert new.exists(), "somebody may be at it"
    assert files.cache.read("vol/manifests/m") == b"kept"
