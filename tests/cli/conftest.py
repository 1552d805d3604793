"""The command, called in this process (fast) or as a process of its own (signals, streams, start-up)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from island_fast.cli.main import main
from island_fast.cli.text import printable
from tests.support import qemu

MIB = 1 << 20
COMMAND = [sys.executable, "-m", "island_fast"]


@dataclass(frozen=True)
class Done:
    """How one run ended."""

    code: int
    out: str
    err: str


class Island:
    """Runs `island` with local state, repository and configuration of the test's own, if it makes them."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.repository = folder / "repository"
        self.state = folder / "state"
        self.configuration = folder / "config/island/config.toml"
        self._capsys = capsys
        self._started: list[subprocess.Popen[bytes]] = []

    def __call__(self, *words: object) -> Done:
        """Run it in this process."""
        self._capsys.readouterr()
        code = main([str(word) for word in words])
        return Done(code, *self._capsys.readouterr())

    def text(self, *words: object) -> str:
        """Standard output of a run that ends well and has nothing to say beside its answer."""
        done = self(*words)
        assert (done.code, done.err) == (0, ""), done
        return done.out

    def json(self, *words: object) -> Any:
        """The answer of a run with --json that ends well."""
        return json.loads(self.text(*words, "--json"))

    def fails(self, code: int, *words: object) -> str:
        """The sentence of a run that fails with this exit code, said alike with and without --json.

        So it must change nothing: it is run twice.
        """
        done = self(*words)
        assert (done.code, done.out) == (code, ""), done
        sentence = one_sentence(done.err)
        told = self("--json", *words)
        assert (told.code, told.err) == (code, ""), told
        answer = json.loads(told.out)
        assert answer.keys() == {"error", "message", "exit_code"}
        assert answer["exit_code"] == code
        assert _without_ids(printable(answer["message"])) == _without_ids(sentence)
        return sentence

    def start(self, *words: object, **options: Any) -> subprocess.Popen[bytes]:
        """Start it as a process; both streams are pipes unless told otherwise."""
        usual = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "stdin": subprocess.DEVNULL,
            "preexec_fn": _heed_signals,
        }
        process = subprocess.Popen([*COMMAND, *map(os.fsencode, map(str, words))], **(usual | options))
        self._started.append(process)
        return process

    def stop(self) -> None:
        """End the processes that a failed test left."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


def _heed_signals() -> None:
    """The tests may run where signals are ignored (nohup, a background job), which processes inherit."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _without_ids(text: str) -> str:
    """Ids are random."""
    return re.sub("[0-9a-f]{8,}", "", text)


def one_sentence(text: str) -> str:
    """What stands behind `island: ` in the only line of standard error."""
    assert "Traceback" not in text
    assert text.startswith("island: ")
    assert text.count("\n") == 1
    assert text.endswith("\n")
    return text.removeprefix("island: ").rstrip("\n")


def pins(image: Path) -> list[str]:
    """Names of the internal snapshots that the image holds."""
    return [one["name"] for one in qemu.info(image).get("snapshots", [])]


def wait_until(there: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    """Return as soon as `there()` is true; fails if the process ends before."""
    deadline = time.monotonic() + 30
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def island(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Island]:
    """The command; ISLAND_REPOSITORY is set, and no Swift credentials."""
    for key in list(os.environ):
        if key.startswith(("OS_", "ST_", "ISLAND_")):
            monkeypatch.delenv(key)
    command = Island(tmp_path, capsys)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(command.configuration.parent.parent))
    monkeypatch.setenv("ISLAND_STATE", str(command.state))
    monkeypatch.setenv("ISLAND_REPOSITORY", str(command.repository))
    yield command
    command.stop()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A volume `disk` of 64 MiB with 3 MiB that do not compress, in 48 blocks."""
    path = qemu.create(tmp_path / "disk.qcow2", 64 * MIB, lazy_refcounts="on")
    qemu.noise(path, MIB, 3 * MIB)
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str, int], Path]]:
    """`small_disk(name, bytes)`: a file system of its own; its size can be given again."""
    mounted: list[Path] = []

    def mount(name: str, size: int) -> Path:
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        options = ("remount," if path in mounted else "") + f"size={size}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("mounting a small file system needs root")
        mounted.append(path)
        return path

    yield mount
    for path in set(mounted):
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run(["umount", str(path)], check=True)
