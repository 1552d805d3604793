"""The configuration file: what goes before what, and what it may not say."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from island_fast.cinder.island_command import IslandCommand
from tests.cli.conftest import MIB, Island
from tests.support import qemu


@pytest.fixture
def nowhere(island: Island, monkeypatch: pytest.MonkeyPatch) -> Island:
    """The command without ISLAND_REPOSITORY."""
    monkeypatch.delenv("ISLAND_REPOSITORY")
    return island


def configure(island: Island, text: str) -> None:
    island.configuration.parent.mkdir(parents=True, exist_ok=True)
    island.configuration.write_text(text)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return qemu.create(tmp_path / "small.qcow2", MIB)


def where(island: Island, *words: object) -> str:
    """The repository that is asked for, none of which exists."""
    return island.fails(3, *words, "list").split()[1]


def test_the_repository_of_option_variable_and_file(nowhere: Island, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no repository is named" in nowhere.fails(2, "list")
    configure(nowhere, 'repository = "/no/file"\n')
    assert where(nowhere) == "/no/file"
    monkeypatch.setenv("ISLAND_REPOSITORY", "")
    assert where(nowhere) == "/no/file", "an empty variable is none"
    monkeypatch.setenv("ISLAND_REPOSITORY", "/no/variable")
    assert where(nowhere) == "/no/variable"
    assert where(nowhere, "-r", "/no/option") == "/no/option"
    assert nowhere.fails(3, "list", "-r", "/no/option").split()[1] == "/no/option"
    assert nowhere.fails(3, "-r", "/no/first", "list", "-r", "/no/last").split()[1] == "/no/last"


def test_a_crontab_line_is_one_short_command(nowhere: Island, small: Path) -> None:
    configure(nowhere, f'repository = "{nowhere.repository}"\n[retain]\nkeep-last = 2\n')
    taken = [nowhere.json("snapshot", small)["snapshot"] for _ in range(3)]
    nowhere.text("retain")
    assert [one["snapshot"] for one in nowhere.json("list")] == taken[1:]
    assert nowhere.json("info", small)["next_rule"] == "table-diff", "it asks the repository, too"


def test_each_rule_is_looked_up_by_itself(
    island: Island, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(4):
        island.json("snapshot", small)
    configure(island, "[retain]\nkeep-last = 3\nkeep-yearly = 1\n")

    def kept(*words: object) -> list[list[str]]:
        (told,) = island.json("retain", "--dry-run", *words)
        return [one["reasons"] for one in told["snapshots"]]

    assert kept() == [[], ["last"], ["last"], ["last", "yearly"]]
    monkeypatch.setenv("ISLAND_KEEP_LAST", "2")
    assert kept() == [[], [], ["last"], ["last", "yearly"]]
    assert kept("--keep-last", 1) == [[], [], [], ["last", "yearly"]]
    assert kept("--keep-last", 0) == [[], [], [], ["yearly"]]
    rules = island.text("retain", "--dry-run", "--keep-daily", 3).splitlines()[0]
    assert rules == (
        "Rules: keep-last 2 (ISLAND_KEEP_LAST), keep-daily 3 (command line), "
        "keep-yearly 1 (configuration file)."
    )
    sentence = island.fails(2, "retain", "--keep-last", 0, "--keep-yearly", 0)
    assert "no rule is given that keeps a snapshot" in sentence
    monkeypatch.setenv("ISLAND_KEEP_LAST", "two")
    assert "ISLAND_KEEP_LAST" in island.fails(2, "retain")


def test_compression(island: Island, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = []
    qemu.io(small, qemu.write(0, MIB, 1))  # which compresses well

    def take(*words: object) -> None:
        answer = island.json("snapshot", small, "--no-pin", "--volume", f"v{len(stored)}", *words)
        stored.append(answer["bytes_stored"] < MIB)

    take()
    configure(island, 'compression = "none"')
    take()
    monkeypatch.setenv("ISLAND_COMPRESSION", "zstd")
    take()
    take("--compression", "none")
    assert stored == [True, False, True, False]


@pytest.mark.parametrize(
    "text, told",
    [
        (
            'repositry = "/srv"',
            "repositry is unknown; known are repository, compression, workers, limit-upload, ",
        ),
        ("[retain]\nkeep-dayly = 7", "retain.keep-dayly is unknown; known are "),
        ("keep-daily = 7", "keep-daily belongs below a line [retain]; see 'man island-config'"),
        ("workers = 0", "workers must be a whole number, 1 or more; see 'man island-config'"),
        (
            '[retain]\nrepository = "/srv"',
            "retain.repository belongs at the top of the file, above every [tab",
        ),
        ("[snapshot]\nfull = true", "snapshot is unknown; known are "),
        ("repository = 7", "repository must be a text in quotes"),
        ('repository = "snapshots"', "repository must be an absolute path, begin with ~/, or be swift://"),
        ('repository = ""', "repository must be an absolute path, begin with ~/, or be swift://"),
        ('repository = "~other"', "repository must be an absolute path, begin with ~/, or be swift://"),
        ('compression = "zlib"', 'compression must be "zstd" or "none"'),
        ("compression = true", 'compression must be "zstd" or "none"'),
        ("limit-upload = 10", "limit-upload must be a rate in quotes: one number and K, M or G, without B"),
        (
            'limit-download = "0M"',
            "limit-download must be a rate in quotes: one number and K, M or G, without B",
        ),
        (
            'limit-download = "10"',
            "limit-download must be a rate in quotes: one number and K, M or G, without B",
        ),
        ("retain = 7", "retain must be a table"),
        ('[retain]\nkeep-daily = "7"', "retain.keep-daily must be a whole number, 0 or more"),
        ("[retain]\nkeep-daily = true", "retain.keep-daily must be a whole number, 0 or more"),
        ("[retain]\nkeep-daily = -1", "retain.keep-daily must be a whole number, 0 or more"),
        ("[[retain]]\nkeep-daily = 1", "retain must be a table"),
        ('"" = {repository = "/srv"}', " is unknown; known are "),
        ("repository = /srv", "is not valid TOML ("),
        ("x" * 10000, "is not valid TOML ("),
    ],
)
def test_what_would_have_no_effect_is_refused_by_name(island: Island, text: str, told: str) -> None:
    configure(island, text)
    sentence = island.fails(2, "list")
    assert told in sentence
    assert str(island.configuration) in sentence
    assert "--help" not in sentence, "which says nothing on the file"
    assert island("--help").code == island("--version").code == 0
    assert island("list", "--help").code == island("list", "-h").code == 0


def test_the_file_that_is_named(island: Island, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(island, "nonsense")
    monkeypatch.setenv("ISLAND_CONFIG", os.devnull)
    assert "does not exist" in island.fails(3, "list")
    monkeypatch.setenv("ISLAND_CONFIG", str(tmp_path / "other.toml"))
    assert "which ISLAND_CONFIG names, does not exist" in island.fails(2, "list")
    monkeypatch.setenv("ISLAND_CONFIG", str(tmp_path))
    assert f"{tmp_path} cannot be read" in island.fails(2, "list")


def test_the_usual_places(nowhere: Island, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home/.config/island/config.toml"
    home.parent.mkdir(parents=True)
    home.write_text('repository = "/no/home"')
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CONFIG_HOME", unset)
        assert where(nowhere) == "/no/home"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert where(nowhere) == "/no/home"
    home.write_text('repository = "~/no"')
    assert where(nowhere) == str(tmp_path / "home/no")


def test_a_file_that_anybody_may_write_to_decides_nothing(nowhere: Island) -> None:
    configure(nowhere, 'repository = "/no/file"')
    nowhere.configuration.chmod(0o664)
    assert where(nowhere) == "/no/file"
    nowhere.configuration.chmod(0o646)
    assert stat.S_IMODE(nowhere.configuration.stat().st_mode) == 0o646
    assert "chmod o-w" in nowhere.fails(2, "list")


def test_the_drivers_commands_read_none(island: Island, small: Path) -> None:
    configure(island, "nonsense")
    commands = IslandCommand(str(island.repository), {"ISLAND_STATE": str(island.state)})
    assert commands.list_snapshots() == []
