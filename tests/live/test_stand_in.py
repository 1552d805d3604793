"""The shell that watches a daemon, and the stand-in that answers with errors, on a kernel without VDUSE."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from island_fast.cinder.attach.daemon import Daemon
from island_fast.cinder.attach.process_lookup import find_listener, is_alive
from island_fast.cinder.attach.stand_in import PREPARED, TOKEN, stand_in_script, stand_in_socket, watch_script
from island_fast.qemu.programs import run_program
from island_fast.qemu.qmp import Qmp
from tests.live.test_attach import eventually
from tests.support.daemon import needs_storage_daemon

BACKING = "0123456789abcdef"


class Watched:
    """A watched process: a sleeping shell stands for the daemon, and a marked file for the stand-in."""

    def __init__(self, folder: Path, exported: bool = True) -> None:
        self.folder = folder
        self.log = folder / "log"
        (folder / "vduse").mkdir()
        self.stood_in = folder / "stood-in"
        (folder / "vduse" / BACKING).write_text(f": >{self.stood_in}\n")
        self.write("daemon", "first")
        (folder / "start").write_text(watch_script(folder, folder / "daemon", self.log))
        self.watcher = subprocess.Popen(["/bin/sh", folder / "start"])
        assert eventually(lambda: (folder / "first").exists())
        if exported:
            (folder / "vduse" / TOKEN).write_text(f"{BACKING} {self.pid('first')}\n")

    def write(self, script: str, name: str) -> None:
        """Write a script that notes its process under a name, and ends with status 0 when asked to quit."""
        lines = [
            f"trap 'exit 0' TERM; echo $$ >{self.folder}/{name}.new",
            f"mv {self.folder}/{name}.new {self.folder}/{name}",
        ]
        (self.folder / script).write_text("\n".join([*lines, "while :; do sleep 0.05; done", ""]))

    def pid(self, name: str) -> int:
        return int((self.folder / name).read_text())


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    one = Watched(tmp_path)
    yield one
    one.watcher.kill()
    one.watcher.wait()


def test_a_killed_daemon_gets_a_stand_in(watched: Watched) -> None:
    os.kill(watched.pid("first"), signal.SIGKILL)
    assert watched.watcher.wait(60) == 0
    assert watched.stood_in.exists()
    assert "ended with status 137" in watched.log.read_text()


def test_so_does_one_that_ends_without_a_restart_that_was_prepared(watched: Watched) -> None:
    os.kill(watched.pid("first"), signal.SIGTERM)
    assert watched.watcher.wait(60) == 0
    assert watched.stood_in.exists()


def test_a_signal_to_end_does_not_end_the_watch(watched: Watched) -> None:
    """systemd sends it to both."""
    for sign in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        watched.watcher.send_signal(sign)
        time.sleep(0.1)
    assert watched.watcher.poll() is None
    assert not watched.stood_in.exists()
    os.kill(watched.pid("first"), signal.SIGKILL)
    assert watched.watcher.wait(60) == 137
    assert watched.stood_in.exists()


def test_a_stand_in_does_not_hold_up_a_shutdown(watched: Watched) -> None:
    """systemd waits for all that it asked to end; what runs after that is cinder-volume's to start."""
    (watched.folder / "vduse" / BACKING).write_text(f"echo $$ >{watched.stood_in}\nexec sleep 600\n")
    watched.watcher.send_signal(signal.SIGTERM)
    os.kill(watched.pid("first"), signal.SIGTERM)
    assert watched.watcher.wait(60) == 0
    assert eventually(lambda: not is_alive(int(watched.stood_in.read_text())))


def test_a_daemon_that_could_not_flush_has_no_successor(watched: Watched) -> None:
    watched.write(PREPARED, "second")
    with watched.log.open("a") as log:
        log.write("qemu-storage-daemon: Failed to flush the L2 block cache: No space left on device\n")
    os.kill(watched.pid("first"), signal.SIGTERM)
    assert watched.watcher.wait(60) == 0
    assert watched.stood_in.exists()
    assert not (watched.folder / "second").exists()


def test_a_prepared_restart_follows_a_clean_end_alone(watched: Watched) -> None:
    watched.write(PREPARED, "second")
    os.kill(watched.pid("first"), signal.SIGTERM)
    assert eventually(lambda: (watched.folder / "second").exists())
    served_by = watched.folder / "vduse" / TOKEN
    assert eventually(lambda: served_by.read_text() == f"{BACKING} {watched.pid('second')}\n")
    assert not watched.stood_in.exists()
    watched.write(PREPARED, "third")  # a crash while a restart is prepared is a crash
    os.kill(watched.pid("second"), signal.SIGKILL)
    assert watched.watcher.wait(60) == 0
    assert watched.stood_in.exists()
    assert not (watched.folder / "third").exists()


@pytest.mark.parametrize("token", ["", f"{BACKING} 1\n"])
def test_a_daemon_that_exports_nothing_gets_none(tmp_path: Path, token: str) -> None:
    """Nothing is exported, or the export is another daemon's by now."""
    one = Watched(tmp_path, exported=False)
    if token:
        (tmp_path / "vduse" / TOKEN).write_text(token)
    os.kill(one.pid("first"), signal.SIGKILL)
    assert one.watcher.wait(60) == 137
    assert not one.stood_in.exists()


# --- the stand-in itself ---


def as_nbd(script: str, socket: Path) -> str:
    """The script with an NBD export in place of the VDUSE one, for this machine's kernel has none."""
    lines = script.splitlines()
    (at,) = (n for n, line in enumerate(lines) if "block-export-add" in line)
    address = {"addr": {"type": "unix", "data": {"path": str(socket)}}}
    export = {"type": "nbd", "id": "device", "node-name": "errors", "name": "x", "writable": True}
    steps = [("nbd-server-start", address), ("block-export-add", export)]
    lines[at : at + 1] = [json.dumps({"execute": verb, "arguments": options}) for verb, options in steps]
    return "\n".join([*lines, ""])


def fails(socket: Path, request: str) -> bool:
    words = ["qemu-io", "-f", "raw", "-c", request, f"nbd+unix:///x?socket={socket}"]
    return subprocess.run(words, capture_output=True).returncode != 0


@needs_storage_daemon
@pytest.mark.parametrize("enlarged", [True, False])
def test_every_request_fails_and_a_flush_from_the_first_on(tmp_path: Path, enlarged: bool) -> None:
    """Without being enlarged it would confirm a flush of what died with the daemon: QEMU skips it."""
    backing = tmp_path / "vduse" / BACKING
    backing.parent.mkdir()
    script = as_nbd(stand_in_script(backing, tmp_path / "log"), tmp_path / "nbd")
    if not enlarged:
        script = "\n".join(line for line in script.splitlines() if "block_resize" not in line)
    backing.write_text(script)
    process = subprocess.Popen(["/bin/sh", backing])
    try:
        assert eventually((tmp_path / "nbd").exists), (tmp_path / "log").read_text()
        again = subprocess.run(["/bin/sh", backing], timeout=60)  # there is one: it ends
        assert again.returncode == 0
        assert fails(tmp_path / "nbd", "flush") is enlarged
        if enlarged:
            for request in ("read 0 512", "write 0 512", "write -z 0 4096", "discard 0 4096", "flush"):
                assert fails(tmp_path / "nbd", request), request
        with Qmp(backing.with_name(f"{BACKING}.s")) as qmp:
            qmp.command("quit")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@needs_storage_daemon
def test_one_that_dies_while_it_starts_is_started_again() -> None:
    with tempfile.TemporaryDirectory(prefix="island-stand-in-") as name:  # sockets want short paths
        daemon = Daemon(Path(name) / "0b0c9a4e-7c9c-4b55-a6a1-3a0d6a1d5a4e", run_program)
        backing = daemon.vduse / BACKING
        backing.parent.mkdir(parents=True)
        script = as_nbd(stand_in_script(backing, Path(name) / "log"), Path(name) / "nbd")
        backing.write_text(f"! mkdir {name}/died || exit 1\n{script}")
        daemon.start_stand_in(backing)
        try:
            assert (Path(name) / "died").is_dir()
            assert fails(Path(name) / "nbd", "flush")
        finally:
            daemon.end_stand_in(backing)
        assert find_listener(stand_in_socket(backing)) is None
