"""The command on a real Swift: the whole round, and what its bad input is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Island, pins
from tests.support import qemu

pytestmark = [qemu.needs_qemu, pytest.mark.uses_swift]


@pytest.fixture
def url(island: Island, request: pytest.FixtureRequest) -> str:
    """A place in a container of its own; `island` comes first, since it clears credentials away."""
    return str(request.getfixturevalue("swift_url"))


def test_the_whole_round(
    island: Island, url: str, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISLAND_REPOSITORY", url)
    first = island.json("snapshot", disk)
    second = island.json("snapshot", disk)
    assert (second["rule"], second["objects_written"]) == ("table-diff", 2)
    assert second["bytes_read"] <= second["blocks_sampled"] << 16
    assert [one["snapshot"] for one in island.json("list")] == [first["snapshot"], second["snapshot"]]
    island("restore", "disk@latest", tmp_path / "out")
    qemu.compare(disk, tmp_path / "out", other_format="qcow2")
    for block in range(16, 40, 3):
        qemu.noise(tmp_path / "out", block << 16, 1, 5)
    onto = island.json("restore", "disk@latest", "--onto", tmp_path / "out")
    assert onto["bytes_written"] == 8 << 16
    assert onto["bytes_read"] < 10 << 16, "ranges of a pack"
    qemu.compare(disk, tmp_path / "out", other_format="qcow2")
    island("delete", first["snapshot"])
    (swept,) = island.json("sweep")
    assert swept["objects_removed"] == 0, "what is young stays"
    (plan,) = island.json("sweep", "--grace", "0", "--dry-run")
    assert swept["objects_waiting"] == plan["objects_removed"] == len(swept["steps"])
    assert swept["bytes_waiting"] == plan["bytes_freed"]
    (swept,) = island.json("sweep", "--grace", "0")
    assert (swept["objects_removed"], swept["objects_waiting"]) == (plan["objects_removed"], 0)


def test_answers_say_what_waits_for_the_grace(
    island: Island, url: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISLAND_REPOSITORY", url)
    for _ in range(2):
        island("snapshot", disk, "--quiet")
    assert re.search(r"free \d+ B once it is 24 h old \(--grace\)\.\n$", island.text("delete", "disk@latest"))
    assert re.search(r"free \d.* once it is 24 h old \(--grace\)$", island.text("show", "disk@latest"), re.M)
    waits = r"Volume disk: nothing to remove yet; 1 object \(\d+ B\) waits until it is {} old \(--grace\)\.\n"
    assert re.fullmatch(waits.format("24 h"), island.text("sweep"))
    assert re.fullmatch(waits.format("7 d"), island.text("sweep", "--grace", "7d"))
    usage = island.text("usage")
    assert re.search(r"\n'island sweep' frees \d+ B, each object once it is 24 h old \(--grace\)\.\n$", usage)
    assert island.text("sweep", "--quiet") == ""
    island("snapshot", disk, "--quiet")
    text = island.text("retain", "--keep-last", 1)
    assert re.search(r"'island sweep' will free \d+ B once it is 24 h old \(--grace\)\.\n$", text)


@pytest.mark.parametrize(
    "spoil, code, hint",
    [
        (lambda env, url: env.setenv("ST_KEY", "wrong"), 5, "ST_KEY"),
        (lambda env, url: env.delenv("ST_USER"), 5, "ST_USER"),
        (lambda env, url: env.setenv("ISLAND_REPOSITORY", "swift://no-such-box/here"), 3, "no-such-box"),
        (lambda env, url: env.setenv("ISLAND_REPOSITORY", url + "/nothing"), 3, "not an island repository"),
        (lambda env, url: env.setenv("ISLAND_REPOSITORY", "swift://"), 2, "swift://"),
    ],
    ids=["wrong password", "no user", "no container", "no repository", "no name"],
)
def test_bad_input(
    island: Island,
    url: str,
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[pytest.MonkeyPatch, str], None],
    code: int,
    hint: str,
) -> None:
    monkeypatch.setenv("ISLAND_REPOSITORY", url)
    spoil(monkeypatch, url)
    assert hint in island.fails(code, "list")
    if hint != "not an island repository":
        island.fails(code, "snapshot", disk)
        assert pins(disk) == []
