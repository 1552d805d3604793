"""What shells get when they complete a command line; bash is a real one, on a terminal."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND, Island
from tests.support import qemu

pytestmark = qemu.needs_qemu


class Bash:
    """An interactive bash that has read the script, with `island` in its path."""

    def __init__(self, folder: Path) -> None:
        command = folder / "bin/island"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n')
        command.chmod(0o755)
        self._ours, theirs = os.openpty()
        self._process = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "-i"],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, cwd=folder,
            env=os.environ | {
                "PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path),
                "TERM": "dumb", "INPUTRC": os.devnull, "HISTFILE": "", "PS1": "ready>",
            },
        )  # fmt: skip
        os.close(theirs)
        self.type("bind 'set enable-bracketed-paste off'; bind 'set bell-style none'\n")
        self.until("ready>")
        self.type('eval "$(island completion bash)"; echo s""et\n')
        self.until("set\r\n")

    def type(self, text: str) -> None:
        """Type this."""
        os.write(self._ours, text.encode())

    def until(self, text: str) -> str:
        """What is shown until `text` is; a key that the shell lost is pressed again, as anyone would."""
        seen, deadline = "", time.monotonic() + 60
        while text not in seen:
            ready, _, _ = select.select([self._ours], [], [], 10)
            assert time.monotonic() < deadline, f"{text!r} did not come: {seen!r}"
            if ready:
                seen += os.read(self._ours, 4096).decode(errors="replace")
            else:
                self.type("\t")
        return seen

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        os.close(self._ours)


@pytest.fixture
def bash(island: Island, disk: Path, tmp_path: Path) -> Iterator[Bash]:
    """A bash beside a repository with a snapshot of `disk`."""
    if not shutil.which("bash"):
        pytest.skip("bash is not installed")
    shell = Bash(tmp_path)
    yield shell
    shell.close()


def test_bash_completes_verbs_options_files_and_snapshots(island: Island, disk: Path, bash: Bash) -> None:
    snapshot = island.json("snapshot", disk)["snapshot"]
    bash.type("island snaps\t")
    bash.until("snapshot ")
    bash.type("--lab\t")
    bash.until("--label ")
    bash.type("x dis\t")
    bash.until("disk.qcow2 ")
    bash.type("--compression=n\t")
    bash.until("none ")
    bash.type("\x15island list -r reposi\t")
    bash.until("tory/")
    bash.type("\x15island show d\t")
    bash.until("disk@")
    bash.type("la\t")
    bash.until("test ")
    bash.type(f"\x15island restore {snapshot[:3]}\t")
    bash.until(f"{snapshot[3:12]} ")


def asked(instruction: str, **variables: str) -> list[str]:
    """What a shell reads when it asks for this."""
    done = subprocess.run(
        COMMAND,
        env=os.environ | {"_ISLAND_COMPLETE": instruction} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_zsh_and_fish_get_labels(island: Island, disk: Path) -> None:
    snapshot = island.json("snapshot", disk, "--label", "a\nb")["snapshot"]
    for words in ("island show disk@", "island verify disk@", "island diff disk@latest disk@"):
        got = asked("zsh_complete", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
        assert got[0::3] == ["plain", "plain"]
        assert got[1::3] == ["disk@latest", f"disk@{snapshot[:12]}"]
        assert "a" in got[5]
    got = asked("fish_complete", COMP_WORDS="island delete disk@l", COMP_CWORD="disk@l")
    assert [line.split("\t")[0] for line in got] == ["plain,disk@latest"]


def test_what_cannot_be_completed_is_silent(
    island: Island, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where in ("/nowhere", "swift://no/where", ""):
        monkeypatch.setenv("ISLAND_REPOSITORY", where)
        assert asked("bash_complete", COMP_WORDS="island show ") == [""]
    monkeypatch.setenv("_ISLAND_COMPLETE", "nonsense")
    assert "_ISLAND_COMPLETE" in island.fails(2, "list")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(island: Island, shell: str) -> None:
    text = island.text("completion", shell)
    assert f"_ISLAND_COMPLETE={shell}_complete" in text
    assert island.text("completion", shell, "--quiet") == text
    assert asked(f"{shell}_source") == text.splitlines()
    assert island.json("completion", shell)["script"].rstrip("\n") == text.rstrip("\n")
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=text, text=True, check=True)


def test_the_script_comes_whatever_the_configuration_says(island: Island) -> None:
    island.configuration.parent.mkdir(parents=True)
    island.configuration.write_text("nonsense")
    assert "_ISLAND_COMPLETE" in island.text("completion", "bash")
    assert "is not valid TOML" in island.fails(2, "list")
