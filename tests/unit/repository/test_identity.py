"""Whose a folder of local state is: of this machine, at this place, and nobody else's."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from island_fast.repository import identity
from island_fast.repository.identity import Machine
from island_fast.repository.local_state import LineageFiles, LocalState, Registration

HERE = Machine("a" * 32, "", "one")
REPOSITORY = "1" * 32


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], None]:
    """`on(machine)`: from here on this is that machine."""

    def be(machine: Machine) -> None:
        monkeypatch.setattr(identity, "_read_machine", lambda: machine)

    be(HERE)
    return be


@pytest.fixture
def state(tmp_path: Path, on: Callable[[Machine], None]) -> LocalState:
    """Local state of HERE, with a snapshot in progress and a record of unknown outcome."""
    made = LocalState(tmp_path / "state")
    assert made.writer
    files = in_progress(made)
    files.make()
    files.pending.add("000000-00000001", b"record")
    (files.folder / "running" / ("5" * 32)).write_text(json.dumps({"snapshot": "5" * 32}))
    return made


def in_progress(state: LocalState) -> LineageFiles:
    return state.lineage(REPOSITORY, "vol")


def is_in_progress(state: LocalState) -> bool:
    files = in_progress(state)
    return bool(files.pending.all() or files.registrations.all())


def again(state: LocalState) -> LocalState:
    """As another process sees it."""
    return LocalState(state.root)


def test_nothing_changes_for_the_same_machine(state: LocalState) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in state.root.rglob("*"))
    assert again(state).writer == state.writer
    assert is_in_progress(state)
    assert sorted((path, path.stat().st_mtime_ns) for path in state.root.rglob("*")) == before


@pytest.mark.parametrize(
    "other",
    [
        Machine("b" * 32, "", "one"),
        Machine("b" * 32, "", "two"),
        Machine("a" * 32, "f" * 36, "two"),
    ],
)
def test_a_clone_of_a_machine_gets_an_identity_of_its_own(
    state: LocalState,
    on: Callable[[Machine], None],
    other: Machine,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    on(Machine("a" * 32, "e" * 36, "one"))
    original = LocalState(tmp_path / "full")
    assert original.writer != state.writer
    shutil.rmtree(state.root)
    shutil.copytree(original.root, state.root)
    on(other)
    with caplog.at_level(logging.WARNING):
        mine = again(state).writer
    assert mine != original.writer
    assert "another machine, one" in caplog.text
    assert "island adopt" in caplog.text
    assert again(state).writer == mine
    assert (state.root / "writer").read_text() == mine


def test_what_is_in_progress_stays_the_originals(state: LocalState, on: Callable[[Machine], None]) -> None:
    on(Machine("b" * 32, "", "two"))
    assert again(state).writer != state.writer
    assert not is_in_progress(state)


def test_a_folder_that_two_machines_share_has_a_writer_for_each(
    state: LocalState, on: Callable[[Machine], None]
) -> None:
    """As home directories in a network do: each machine goes on as what it was."""
    two = Machine("b" * 32, "", "two")
    on(two)
    second = again(state).writer
    for machine, writer in ((HERE, state.writer), (two, second), (HERE, state.writer)):
        on(machine)
        assert again(state).writer == writer


@pytest.mark.parametrize("now", [Machine("", "", "one"), Machine("a" * 32, "", "renamed"), HERE])
def test_what_is_not_known_of_both_does_not_tell_machines_apart(
    state: LocalState, on: Callable[[Machine], None], now: Machine
) -> None:
    on(now)
    assert again(state).writer == state.writer
    assert is_in_progress(state)


def test_a_copy_beside_its_original_is_another_one(
    state: LocalState, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(state.root, tmp_path / "copy")
    copy = LocalState(tmp_path / "copy")
    with caplog.at_level(logging.WARNING):
        assert copy.writer != state.writer
    assert f"copy of that in {state.root}" in caplog.text
    assert not is_in_progress(copy)
    assert again(copy).writer == copy.writer
    assert again(state).writer == state.writer
    assert is_in_progress(state)


def test_a_copy_is_known_as_one_although_its_renewal_was_cut_off(
    state: LocalState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of its writes is the last, the copy never has the original's id."""
    real = identity.write_durably
    for last in range(3):
        copy = LocalState(tmp_path / f"copy{last}")
        shutil.copytree(state.root, copy.root)
        left = last

        def dying(path: Path, data: bytes) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            real(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(identity, "write_durably", dying)
            if last < 2:
                with pytest.raises(KeyboardInterrupt):
                    assert copy.writer
        assert again(copy).writer != state.writer
        assert again(copy).writer == again(copy).writer


def test_a_folder_that_moved_goes_on(state: LocalState, tmp_path: Path) -> None:
    moved = state.root.rename(tmp_path / "moved")
    assert LocalState(moved).writer == state.writer
    assert is_in_progress(LocalState(moved))
    (tmp_path / "link").symlink_to(moved)
    assert LocalState(tmp_path / "link").writer == state.writer
    state.root.mkdir()
    assert again(state).writer != state.writer, "an empty folder in its place is another one"
    assert LocalState(moved).writer == state.writer


def test_a_folder_that_was_put_back_goes_on(state: LocalState, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(state.root, kept)
    shutil.rmtree(state.root)
    (tmp_path / "takes its inode").mkdir()
    shutil.copytree(kept, state.root)
    assert again(state).writer == state.writer
    assert is_in_progress(state)


def test_state_of_an_older_version_is_taken_over_in_silence(
    tmp_path: Path, on: Callable[[Machine], None], caplog: pytest.LogCaptureFixture
) -> None:
    old = LocalState(tmp_path / "state")
    files = in_progress(old)
    files.make()
    (old.root / "writer").write_text("c" * 32)
    with files.registrations.register(Registration("5" * 32, 0, None)):
        assert again(old).writer == "c" * 32
        assert is_in_progress(old)
    on(Machine("b" * 32, "", "two"))
    assert again(old).writer != "c" * 32
    assert [one.levelno for one in caplog.records] == [logging.WARNING]


def test_an_entry_that_cannot_be_read_is_none(state: LocalState) -> None:
    entry = state.root / "hosts" / state.writer
    for text in (b"", b"{}", b"[]", b'{"machine": 1, "product": 2}', b"\xff"):
        entry.write_bytes(text)
        assert again(state).writer == state.writer, "as an older version's"


def test_machine_ids_are_read_where_there_are_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "machine-id", tmp_path / "dbus"
    monkeypatch.setattr(identity, "_MACHINE_IDS", (str(first), str(second)))
    monkeypatch.setattr(identity, "_PRODUCT_ID", str(tmp_path / "product"))
    assert identity._read_machine() == Machine("", "", os.uname().nodename)
    second.write_text("2" * 32 + "\n")
    for text in ("", "uninitialized\n"):
        first.write_text(text)
        assert identity._read_machine().id == "2" * 32
    first.write_text("1" * 32 + "\n")
    (tmp_path / "product").write_text("p\n")
    assert identity._read_machine() == Machine("1" * 32, "p", os.uname().nodename)
