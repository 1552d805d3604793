"""`island keep`, and snapshots that are named by their label."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Island
from tests.support import qemu

pytestmark = qemu.needs_qemu


def take(island: Island, disk: Path, *labels: str) -> list[str]:
    return [str(island.json("snapshot", disk, "--label", label)["snapshot"]) for label in labels]


def test_what_is_marked_is_not_deleted(island: Island, disk: Path) -> None:
    first, second, third = take(island, disk, "one", "two", "three")
    assert island.text("keep", first) == (
        f"Snapshot {first} of volume disk is kept until you run 'island keep --release disk@{first}'.\n"
    )
    assert "is marked to be kept" in island.fails(4, "delete", first)
    assert "is marked to be kept" in island.fails(4, "delete", "--dry-run", first)
    (retained,) = island.json("retain", "--keep-last", 1)
    assert [(one["snapshot"], one["kept"], one["reasons"]) for one in retained["snapshots"]] == [
        (first, True, ["marked"]),
        (second, False, []),
        (third, True, ["last"]),
    ]
    assert [one["keep"] for one in island.json("list")] == [True, False]
    assert "[kept] one" in island.text("list")
    assert "kept until" in island.text("show", first)
    assert island.json("keep", "--release", first) == [{"snapshot": first, "volume": "disk", "keep": False}]
    assert "[kept]" not in island.text("list")
    island.json("delete", first)


def test_marks_outlast_checkpoints_adoptions_and_lost_caches(
    island: Island, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark is in the catalog: also in the state that checkpoints and new owners write."""
    (first,) = take(island, disk, "one")
    island.text("keep", first)
    for _ in range(33):
        island.text("keep", first, "--release")
        island.text("keep", first)
    monkeypatch.setenv("ISLAND_STATE", str(tmp_path / "other"))
    assert island.json("list")[0]["keep"]
    island.text("adopt", "disk")
    assert island.json("list")[0]["keep"]
    assert "is marked to be kept" in island.fails(4, "delete", first)


def test_keep_marks_all_or_none(island: Island, disk: Path) -> None:
    (first,) = take(island, disk, "one")
    assert "there is no snapshot" in island.fails(3, "keep", first, "disk@ffffffff")
    assert not island.json("list")[0]["keep"]


def test_a_label_names_the_only_snapshot_that_has_it(island: Island, disk: Path) -> None:
    first, second, third = take(island, disk, "monday", "a@b:c", "monday")
    assert island.json("show", "disk@label:a@b:c")["snapshot"] == second
    assert island.json("show", "label:a@b:c")["snapshot"] == second
    sentence = island.fails(2, "show", "disk@label:monday")
    assert sentence == (
        f"2 snapshots have that label; name one by its id, such as disk@{first[:12]}, disk@{third[:12]}"
    )
    assert "a label is written disk@label:monday" in island.fails(3, "show", "disk@monday")
    assert "there is no snapshot" in island.fails(3, "show", "disk@label:mon")
    assert "there is no snapshot" in island.fails(3, "show", "disk@label:")


def test_quoted_commands_can_be_pasted(island: Island, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With -r on the command line they have it, too; what the environment names needs no repetition."""
    place = island.repository
    monkeypatch.delenv("ISLAND_REPOSITORY")
    first = island.json("-r", place, "snapshot", disk)["snapshot"]
    island.text("-r", place, "keep", first)
    assert f"'island keep -r {place} --release disk@{first}'" in island("-r", place, "delete", first).err
    monkeypatch.setenv("ISLAND_REPOSITORY", str(place))
    assert f"'island keep --release disk@{first}'" in island("delete", first).err


def test_quoted_commands_are_for_the_repository_in_question(
    island: Island, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = tmp_path / "the near one", tmp_path / "far"
    first = island.json("-r", near, "snapshot", disk)["snapshot"]
    copy = ("-r", near, "copy", "--all", "--to", far)
    assert island(*copy).code == 0
    assert f"see 'island list -r '{near}''" in island("-r", near, "show", "ff").err
    monkeypatch.setenv("ISLAND_STATE", str(tmp_path / "another"))
    assert island("-r", far, "adopt", "disk").code == 0
    monkeypatch.setenv("ISLAND_STATE", str(island.state))
    assert f"run 'island adopt -r {far} disk' here" in island(*copy).err
    assert f"run 'island adopt -r {far} disk' here" in island("-r", far, "delete", first).err


def test_warnings_quote_commands_that_can_be_pasted(
    island: Island, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    assert island("-r", here, "snapshot", disk).code == 0
    shutil.copytree(island.state, tmp_path / "clone")
    monkeypatch.setenv("ISLAND_STATE", str(tmp_path / "clone"))
    assert f"until 'island adopt -r {here} VOLUME' gives it one\n" in island("-r", here, "sweep").err


def test_a_file_that_is_no_qcow2_is_no_damage(island: Island, tmp_path: Path) -> None:
    (path := tmp_path / "notes.txt").write_text("notes\n" * 100)
    assert "does not begin with the qcow2 magic" in island.fails(4, "snapshot", path)
    assert "does not begin with the qcow2 magic" in island.fails(4, "info", path)


def test_info_names_the_pin_that_is_in_the_image(island: Island, disk: Path) -> None:
    first, second = take(island, disk, "one", "two")
    island.text("delete", second)
    found = island.json("info", disk)
    assert found["pinned_base"] == second
    assert [one["pin_of"] for one in found["internal_snapshots"]] == [second]
    assert f"its snapshot was deleted, the parent is {first}" in found["next_reason"]
