"""Terminals, pipes, closed and full streams, and what is imported when; in processes of their own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from island_fast.cli import text as text_module
from island_fast.cli.main import island as command
from island_fast.cli.progress import pace
from island_fast.cli.run import Run
from island_fast.cli.signals import Signals
from tests.cli.conftest import MIB, Island, one_sentence
from tests.support import qemu

pytestmark = qemu.needs_qemu

HEAVY = ("numpy", "rich", "swiftclient", "xxhash", "zstandard", "island_fast.api")


def imported(*words: object) -> set[str]:
    """Modules that a run imports."""
    command = [sys.executable, "-X", "importtime", "-m", "island_fast", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))


def test_version_and_help_import_nothing_heavy() -> None:
    for words in (["--version"], ["--help"], ["snapshot", "--help"]):
        assert not imported(*words) & set(HEAVY)


def test_a_pipe_gets_no_bars_and_no_rich(island: Island, disk: Path) -> None:
    found = imported("snapshot", disk)
    assert {"numpy", "island_fast.api"} <= found
    assert not {"rich", "swiftclient"} & found


def test_an_unchanged_volume_imports_no_more_than_its_snapshot_needs(island: Island, disk: Path) -> None:
    """Importing takes most of its time."""
    island("snapshot", disk)
    found = imported("snapshot", disk)
    others = {
        *("operations.delete", "operations.heal", "operations.restore", "operations.sweep"),
        *("repository.liveness", "images.inspect", "results", "qcow2.writer", "qemu.qmp"),
    }
    names = {f"island_fast.{name}" for name in others}
    assert all(importlib.util.find_spec(name) for name in names)
    assert not names & found
    assert not {"hashlib", "lzma", "numpy.ma", "rich", "secrets", "shutil", "socket"} & found


def on_terminal(island: Island, *words: object, columns: int = 120) -> str:
    """What a process writes to a standard error that is a terminal."""
    ours, theirs = os.openpty()
    process = island.start(*words, stderr=theirs, env=os.environ | {"TERM": "xterm", "COLUMNS": str(columns)})
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: nobody holds the other side any more
        while select.select([ours], [], [], 30)[0] and (data := os.read(ours, 65536)):
            seen += data
    os.close(ours)
    process.wait(timeout=30)
    assert process.returncode == 0, seen
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())


@pytest.fixture
def larger(tmp_path: Path) -> Path:
    """A volume that takes some tenths of a second."""
    image = qemu.create(tmp_path / "disk.qcow2", 96 * MIB, lazy_refcounts="on")
    qemu.noise(image, 0, 96 * MIB)
    return image


def test_bars_on_a_terminal(island: Island, larger: Path, tmp_path: Path) -> None:
    seen = on_terminal(island, "snapshot", larger)
    assert "Scanning" in seen
    assert re.search(r"Sending.*\d+%.* of 96\.0 MiB, [\d.]+ [KMG]iB/s, \d+ s left", seen)
    seen = on_terminal(island, "restore", "disk@latest", tmp_path / "out", "--json")
    assert re.search(r"Restoring.*\d+%.* of 96\.0 MiB", seen)
    island("delete", "disk@latest")
    assert re.search(r"Sweeping.* of \d+\.\d MiB", on_terminal(island, "sweep"))


def test_bars_on_a_narrow_terminal(island: Island, larger: Path) -> None:
    seen = on_terminal(island, "snapshot", larger, columns=50)
    assert re.search(r"Sending.*\d+% \d+ s left", seen)
    assert "iB/s" not in seen


def test_quiet_prints_nothing_if_all_is_well(island: Island, disk: Path, tmp_path: Path) -> None:
    back, far = tmp_path / "back.qcow2", tmp_path / "far"
    lines: list[tuple[object, ...]] = [
        *[("snapshot", disk), ("snapshot", disk, "--label", "two"), ("verify", "--all", "--sample", "100%")],
        *[("usage",), ("diff", "disk@label:two", "disk@latest"), ("info", disk), ("map", disk)],
        *[("restore", "disk@latest", back), ("restore", "disk@latest", "--onto", back), ("unpin", back)],
        *[("copy", "--all", "--to", far), ("keep", "disk@latest"), ("keep", "--release", "disk@latest")],
        *[("retain", "--keep-last", 1), ("sweep", "--dry-run"), ("sweep",), ("adopt", "disk")],
        ("delete", "disk@latest"),
    ]
    for words in lines:
        assert island.text(*words, "--quiet") == "", words
    assert {str(words[0]) for words in lines} == {*command.commands} - {"list", "show", "completion"}


def test_quiet_has_no_bars(island: Island, larger: Path) -> None:
    assert on_terminal(island, "snapshot", larger, "--quiet") == ""


def test_a_reader_that_leaves_is_no_error_of_ours(island: Island, disk: Path) -> None:
    island("snapshot", disk)
    reading, writing = os.pipe()
    os.close(reading)
    process = island.start("list", stdout=writing)
    os.close(writing)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (1, b"")


@pytest.mark.parametrize("words", [["list"], ["list", "--json"], ["snapshot", "disk.qcow2", "--json"]])
def test_standard_output_that_is_full(island: Island, disk: Path, words: list[str]) -> None:
    island("snapshot", disk)
    with open("/dev/full", "wb") as full:
        process = island.start(*words, stdout=full, cwd=disk.parent)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "the work was done, but the answer cannot be written" in one_sentence(err.decode())


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_streams_that_are_closed(island: Island, disk: Path, closed: int) -> None:
    for words in (["snapshot", str(disk)], ["list"], ["show", "nothing"]):
        process = island.start(*words, preexec_fn=lambda: os.close(closed))
        out, err = process.communicate(timeout=30)
        assert process.returncode == (3 if words[0] == "show" else 0)
        assert b"Traceback" not in out + err
    qemu.check(disk)
    assert len(island.text("list", "-q").split()) == 1


def test_list_on_a_narrow_terminal_has_no_parents(island: Island, disk: Path) -> None:
    island("snapshot", disk)
    for columns, parents in ((80, False), (100, True)):
        ours, theirs = os.openpty()
        process = island.start("list", stdout=theirs, env=os.environ | {"COLUMNS": str(columns)})
        assert process.wait(timeout=30) == 0
        seen = os.read(ours, 65536).decode()
        os.close(ours)
        os.close(theirs)
        assert ("PARENT" in seen) == parents
        assert max(map(len, seen.splitlines())) <= columns


def test_a_plain_locale(island: Island, disk: Path) -> None:
    island("snapshot", disk, "--label", "Grüße")
    process = island.start("list", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, b"")
    assert b"Gr\\xfc\\xdfe" in out
    process = island.start("list", "--json", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert json.loads(process.communicate(timeout=30)[0])[0]["label"] == "Grüße"


# What people read.


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (1024**4, "1.0 TiB"),
        (64 * 1024**4, "64.0 TiB"),
        (-2048, "-2.0 KiB"),
        (2**70, "1024.0 EiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert text_module.size(count) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0.00 s"),
        (9.994, "9.99 s"),
        (9.999, "10.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (125.4, "2 min 5 s"),
        (3599.6, "1 h 0 min"),
        (12_000, "3 h 20 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert text_module.duration(seconds) == text


def test_pace() -> None:
    assert pace(0, 4096, 1.0) == "0 B of 4.0 KiB"
    assert pace(1024, 4096, 2.0) == "1.0 KiB of 4.0 KiB, 512 B/s, 6 s left"
    assert pace(1024, 1024 * 101, 2.0).endswith("512 B/s, 3 min 20 s left")


def test_pace_on_a_narrow_terminal() -> None:
    full = "1.0 KiB of 4.0 KiB, 512 B/s, 6 s left"
    assert pace(1024, 4096, 2.0, len(full)) == full
    assert pace(1024, 4096, 2.0, len(full) - 1) == "1.0 KiB of 4.0 KiB, 6 s left", "the rate goes first"
    assert pace(1024, 4096, 2.0, 20) == "6 s left", "then the bytes"
    assert pace(1024, 4096, 2.0, 5) == pace(0, 4096, 2.0, 5) == "", "the percentage is beside it"


def test_progress_ends_the_work_when_the_exception_of_a_signal_got_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Signals() as signals, Run(signals).progress() as progress:
        progress("send", 0, 10)
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), 15)
            time.sleep(5)
        with pytest.raises(KeyboardInterrupt):
            progress("send", 1, 10)
