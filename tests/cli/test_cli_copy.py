"""The verb copy: directories and two accounts of a real Swift, what it says, and what a signal leaves."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
from pathlib import Path

import pytest

from tests.cli.conftest import MIB, Island, one_sentence, wait_until
from tests.support import qemu
from tests.support.swift_server import SwiftServer

pytestmark = qemu.needs_qemu


@pytest.fixture
def far(tmp_path: Path) -> Path:
    return tmp_path / "far"


def test_it_tells_what_was_copied_and_what_was_there(island: Island, disk: Path, far: Path) -> None:
    first = island.json("snapshot", disk, "--label", "monday")["snapshot"]
    text = island.text("copy", "disk@latest", "--to", far)
    work = r"3\.0 MiB read, 3\.0 MiB stored in 4 objects; \d+\.\d\d? s"
    assert re.fullmatch(rf"Copied snapshot {first} of volume disk: {work}\.\n", text)
    second = island.json("snapshot", disk)["snapshot"]
    (there, copied) = island.json("copy", "--volume", "disk", "--to", far)
    assert (there["snapshot"], there["copied"], there["label"], there["blocks_sent"]) == (
        first, False, "monday", 0,
    )  # fmt: skip
    assert (copied["snapshot"], copied["copied"], copied["parent"]) == (second, True, first)
    assert island.text("copy", "--all", "--to", far) == "2 snapshots were there already.\n"
    assert island.text("copy", first[:6], "--to", far) == "1 snapshot was there already.\n"
    assert island.text("copy", "--all", "--to", far, "-q") == ""
    third = island.json("snapshot", disk)["snapshot"]
    assert island.text("copy", "--all", "--to", far, "-q") == ""
    assert island.json("-r", far, "list")[-1]["snapshot"] == third
    rows = island.json("list")
    assert [one | {"bytes_stored": 0} for one in island.json("-r", far, "list")] == [
        one | {"bytes_stored": 0} for one in rows
    ]


def test_a_copy_is_restored_by_a_host_that_knows_nothing(
    island: Island, disk: Path, far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    island("snapshot", disk)
    island("copy", "--all", "--to", far)
    shutil.rmtree(island.repository)
    monkeypatch.setenv("ISLAND_STATE", str(tmp_path / "elsewhere"))
    island.text("-r", far, "restore", "disk@latest", tmp_path / "out.qcow2")
    qemu.compare(disk, tmp_path / "out.qcow2", other_format="qcow2")
    assert "belongs to host" in island.fails(4, "-r", far, "delete", "disk@latest")
    island.text("-r", far, "adopt", "disk")
    again = island.json("-r", far, "snapshot", tmp_path / "out.qcow2", "--volume", "disk")
    assert (again["rule"], again["blocks_changed"]) == ("table-diff", 0)


def test_wrong_usage_and_refusals(island: Island, disk: Path, far: Path, tmp_path: Path) -> None:
    island.fails(3, "copy", "--all", "--to", far)
    island("snapshot", disk)
    sentence = island.fails(2, "copy", "--to", far)
    assert "--volume NAME" in sentence
    assert "--all" in sentence
    island.fails(2, "copy", "disk@latest", "--all", "--to", far)
    island.fails(2, "copy", "disk@latest")
    island.fails(3, "copy", "nobody@latest", "--to", far)
    island.fails(3, "copy", "--volume", "nobody", "--to", far)
    assert not far.exists(), "nothing is made before there is something to copy"
    assert "is the same repository" in island.fails(4, "copy", "--all", "--to", island.repository)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter").touch()
    assert "it is not empty" in island.fails(3, "copy", "--all", "--to", tmp_path / "full")
    island("-r", far, "snapshot", disk)
    assert "is not a copy of volume disk" in island.fails(4, "copy", "disk@latest", "--to", far)
    assert "is not a copy of volume disk" in island.fails(4, "copy", "--all", "--to", far)


def test_damage_is_told_and_the_rest_is_copied(island: Island, disk: Path, far: Path) -> None:
    first = island.json("snapshot", disk)["snapshot"]
    (pack,) = (island.repository / "disk/packs" / first).iterdir()
    other = island.json("snapshot", disk, "--volume", "other")["snapshot"]
    data = bytearray(pack.read_bytes())
    data[-1000] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(data)
    done = island("copy", "--all", "--to", far)
    assert done.code == 6
    assert f"packs/{first}/0-00000000" in one_sentence(done.err)
    assert done.out.startswith(f"Copied snapshot {other} of volume other")
    assert island.text("-r", far, "list", "-q").split() == [other]
    assert f"packs/{first}/0-00000000" in island.fails(6, "copy", first, "--to", far)


def test_a_signal_leaves_what_was_sent_for_the_next(island: Island, tmp_path: Path, far: Path) -> None:
    image = qemu.create(tmp_path / "large.qcow2", 192 * MIB, lazy_refcounts="on")
    qemu.noise(image, 0, 192 * MIB)
    island("snapshot", image)
    process = island.start("copy", "--all", "--to", far)
    wait_until(lambda: len(list(far.glob("large/packs/*/*"))) > 1, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (143, b"")
    assert one_sentence(err.decode()) == (
        "interrupted; snapshots that were copied are complete there; run it again to resume"
    )
    assert island.text("-r", far, "list", "-q") == ""
    (answer,) = island.json("copy", "--all", "--to", far)
    assert answer["blocks_kept"] >= 200, "at least the first pack"
    assert answer["blocks_kept"] + answer["blocks_sent"] == 192 * 16
    island("-r", far, "restore", "large@latest", tmp_path / "out.qcow2")
    qemu.compare(image, tmp_path / "out.qcow2", other_format="qcow2")


@pytest.mark.uses_swift
class TestTwoAccounts:
    """Each side has credentials of its own, and none of the other's container."""

    @pytest.fixture
    def clouds(
        self, island: Island, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> tuple[str, str]:
        """URLs in the usual account, and in the one of ISLAND_TO_ST_*; `island` clears credentials away."""
        swift: SwiftServer = request.getfixturevalue("swift")
        boxes = [f"box-{secrets.token_hex(4)}" for _ in range(2)]
        swift.create_container(boxes[0])
        swift.create_other_container(boxes[1])
        for name, value in swift.other_environment().items():
            monkeypatch.setenv(f"ISLAND_TO_{name}", value)
        swift.calm()
        return f"swift://{boxes[0]}/here", f"swift://{boxes[1]}/there"

    def test_from_a_directory_through_two_accounts_and_back(
        self,
        island: Island,
        clouds: tuple[str, str],
        disk: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        here, there = clouds
        first = island.json("snapshot", disk)["snapshot"]
        qemu.noise(disk, MIB, MIB, 2)
        second = island.json("snapshot", disk)["snapshot"]
        assert [one["copied"] for one in island.json("copy", "--all", "--to", there)] == [True, True]
        own = {name: os.environ[f"ISLAND_TO_{name}"] for name in ("ST_AUTH", "ST_USER", "ST_KEY")}
        usual = {name: os.environ[name] for name in own}
        for name in own:  # from the second account to the first
            monkeypatch.setenv(name, own[name])
            monkeypatch.setenv(f"ISLAND_TO_{name}", usual[name])
        assert [one["copied"] for one in island.json("-r", there, "copy", "--all", "--to", here)] == [
            True
        ] * 2
        for name in own:
            monkeypatch.setenv(name, usual[name])
            monkeypatch.delenv(f"ISLAND_TO_{name}")
        back = tmp_path / "back"
        answers = island.json("-r", here, "copy", "--volume", "disk", "--to", back)
        assert [(one["snapshot"], one["parent"]) for one in answers] == [(first, None), (second, first)]
        island("-r", back, "restore", second, tmp_path / "out.qcow2")
        qemu.compare(disk, tmp_path / "out.qcow2", other_format="qcow2")
        island("-r", back, "restore", first, tmp_path / "old.qcow2")
        island("restore", first, tmp_path / "older.qcow2")
        qemu.compare(tmp_path / "older.qcow2", tmp_path / "old.qcow2", other_format="qcow2")

    @pytest.mark.swift_only("there, another account's container is refused, and not absent")
    def test_whose_credentials_are_wrong_is_told(
        self, island: Island, clouds: tuple[str, str], disk: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here, there = clouds
        island("snapshot", disk)
        assert "no container" in island.fails(3, "copy", "--all", "--to", here), (
            "that is in the other account"
        )
        monkeypatch.setenv("ISLAND_TO_ST_KEY", "wrong")
        sentence = island.fails(5, "copy", "--all", "--to", there)
        assert "ISLAND_TO_ST_AUTH, ISLAND_TO_ST_USER and ISLAND_TO_ST_KEY" in sentence
        monkeypatch.delenv("ISLAND_TO_ST_KEY")
        assert "ISLAND_TO_ST_AUTH is set without ISLAND_TO_ST_KEY" in island.fails(
            5, "copy", "--all", "--to", there
        )
        for name in ("ST_AUTH", "ST_USER"):
            monkeypatch.delenv(f"ISLAND_TO_{name}")
        assert "no container" in island.fails(3, "copy", "--all", "--to", there), "then the usual ones count"
