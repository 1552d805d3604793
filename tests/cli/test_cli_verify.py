"""`island verify`: what it answers in both forms, its exit codes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import MIB, Island, one_sentence
from tests.support import qemu

pytestmark = qemu.needs_qemu

KEYS = [
    *["snapshots", "objects", "objects_read", "objects_unproved", "bytes_read", "bytes_compared"],
    *["damages", "seconds"],
]
DAMAGE = ["volume", "object", "kind", "message", "snapshots", "mended", "remedy"]
TOUCHED = ["snapshot", "bytes", "extents", "extents_left_out"]


def the_pack(island: Island) -> Path:
    (pack,) = (island.repository / "disk/packs").glob("*/0-00000000")
    return pack


def rot(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_whole_repository(island: Island, disk: Path) -> None:
    island("snapshot", disk)
    found = island.json("verify", "--all")
    assert list(found) == KEYS
    assert {key: found[key] for key in KEYS[:3]} == {"snapshots": 1, "objects": 4, "objects_read": 2}
    assert (found["damages"], found["objects_unproved"]) == ([], 2)
    lines = island.text("verify", "disk@latest", "--sample", "100%").splitlines()
    assert [line.split()[0] for line in lines] == ["verified", "read", "damage", "time"]
    assert lines[0] == "verified  1 snapshot, 4 objects"
    assert lines[2] == "damage    none"
    assert island.text("verify", "--all", "--quiet") == ""
    assert "unread" not in lines
    compared = island.text("verify", "disk@latest", "--against", disk).splitlines()
    assert "compared  3.0 MiB" in compared
    assert island.json("verify", "--all", "--since", "7d")["objects_read"] == 2, "read just now"


def test_damage_is_told_until_it_is_mended(island: Island, disk: Path, tmp_path: Path) -> None:
    taken = island.json("snapshot", disk)["snapshot"]
    rot(the_pack(island), -MIB - 1)
    name = str(the_pack(island).relative_to(island.repository))
    done = island("verify", "--all", "--sample", "100%")
    assert done.code == 6
    assert one_sentence(done.err).startswith("1 damaged object found and not repaired")
    lines = done.out.splitlines()
    assert lines[0].startswith(f"damaged: {name} (rot): ")
    assert lines[1] == f"  volume disk, snapshot {taken} lacks 64.0 KiB at byte {3 * MIB - 65536}"
    assert "'island verify --all --heal'" in lines[2]
    told = island("verify", "--all", "--json")
    assert told.code == 6
    (damage,) = json.loads(told.out)["damages"]
    assert list(damage) == DAMAGE
    assert (damage["object"], damage["kind"], damage["mended"]) == (name, "rot", False)
    assert [list(one) for one in damage["snapshots"]] == [TOUCHED]
    assert damage["snapshots"][0]["extents"] == [[3 * MIB - 65536, 65536]]
    assert island("verify", "--all", "--quiet").out == f"{name}\n"
    healed = island("verify", "--all", "--heal")
    assert (healed.code, healed.err) == (0, "")
    assert healed.out.startswith(f"repaired: {name} (rot): ")
    assert "\nrepaired  1 object\n" in healed.out
    assert island.json("verify", "--all", "--sample", "100%")["damages"] == []
    island("restore", "disk@latest", tmp_path / "back.qcow2")
    qemu.compare(disk, tmp_path / "back.qcow2", other_format="qcow2")


def test_damage_that_nothing_can_mend_says_what_can_be_done(island: Island, disk: Path) -> None:
    island("snapshot", disk)
    the_pack(island).unlink()
    disk.unlink()
    done = island("verify", "--all", "--heal")
    assert done.code == 6
    assert "cannot be used for repairs" in done.err
    assert "the volume's next snapshot is complete" in done.out
    assert json.loads(island("verify", "--all", "--heal", "--json").out)["damages"][0]["mended"] is False


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--all"),
        (["disk@latest", "--all"], "--all"),
        (["--all", "--against", "disk.qcow2"], "name it"),
        (["disk@latest", "--backing", "raw:x"], "--against"),
        (["--all", "--sample", "5"], "5%"),
        (["--all", "--sample", "0%"], "5%"),
        (["--all", "--sample", "101%"], "5%"),
        (["--all", "--since", "week"], "7d"),
    ],
)
def test_wrong_usage(island: Island, disk: Path, words: list[str], says: str) -> None:
    island("snapshot", disk)
    assert says in island.fails(2, "verify", *words)


def test_what_is_not_there(island: Island, disk: Path) -> None:
    island.fails(3, "verify", "--all")
    island("snapshot", disk)
    island.fails(3, "verify", "nobody@latest")
    island.fails(3, "verify", "disk@latest", "--against", disk.with_name("none.qcow2"))
    (island.repository / "repository").unlink()
    assert "'repository' is missing" in island.fails(6, "verify", "--all")
