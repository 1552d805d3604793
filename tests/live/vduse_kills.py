"""Rounds of kill -9 while a user writes to a VDUSE disk; `guest.py` calls `rounds_of_kills` with a host."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

from island_fast.cinder.attach.block_device import BlockDevice
from island_fast.errors import IslandError
from island_fast.qemu.programs import ProgramResult, run_program
from tests.live import actor
from tests.live.actor import ROOT, Remote
from tests.live.conftest import Host
from tests.live.test_attach import daemon_of, eventually
from tests.live.vduse_cases import kill_with_watcher

MARK = "island-round "
SIZE, BLOCK = 8 << 20, 4096
SLOTS = SIZE // BLOCK
PATIENCE = 300.0  # seconds that a write may take on an emulated machine; one that hangs takes longer
DIES = "daemon", "daemon and watcher"  # after these the user must see an error
VICTIMS = (
    *("daemon", "service that grows", "helper that attaches", "command", "daemon and watcher"),
    *("service that restarts", "helper that detaches", "service that attaches"),
)


def rounds_of_kills(host: Host) -> None:
    """After each round everything that was flushed is there, and no disk and no process is left."""
    rounds = int(os.environ["ISLAND_ROUNDS"])
    for number in range(rounds):
        victim = VICTIMS[number % len(VICTIMS)]
        begun = time.monotonic()
        said = _run_round(host, victim, random.Random(number))
        print(f"{MARK}{number + 1} {victim}: {said}, {time.monotonic() - begun:.0f} s", flush=True)


def _run_round(host: Host, victim: str, dice: random.Random) -> str:
    volume, image = host.volume(SIZE)
    link = _attach(host, volume, image)
    with User(link) as user:
        assert eventually(lambda: user.flushed > 3)
        after = _kill(host, volume, image, victim, dice)
        if victim in DIES:
            user.join()
            assert user.error == 5, f"the user saw {user.error}"
        elif "detaches" not in victim:
            done = user.flushed
            assert eventually(lambda: user.flushed > done + 3), f"the user saw {user.error}"
    if victim not in DIES:
        assert user.error == 0
    if after is not None:
        after()
    host.exports.stop(volume)
    assert host.devices() == []
    assert host.exports.volumes() == []
    left = subprocess.run(
        ["pgrep", "-f", "qemu-storage-daemon|/start$"], capture_output=True, text=True
    ).stdout
    assert not left, f"processes are left: {left}"
    _check(image, user.flushed)
    image.unlink()
    return f"{user.flushed} flushed, error {user.error}"


def _kill(host: Host, volume: str, image: Path, victim: str, dice: random.Random):
    """Kill the victim while the user writes; return what is left to do when the user has ended."""
    wait = dice.uniform(0, 3)
    if victim == "daemon":
        os.kill(daemon_of(host, volume), signal.SIGKILL)
    elif victim == "daemon and watcher":
        kill_with_watcher(daemon_of(host, volume))
        host.exports.care(volume)
    elif victim == "command":
        _kill_command(host, volume, image, wait)
    elif victim.startswith("service"):
        calls = {
            "grows": ("grow", volume, SIZE + BLOCK * dice.randrange(16, 512)),
            "restarts": ("restart", volume, image),
            "attaches": ("attach", volume, image),
        }
        _kill_service(host, calls[victim.split()[-1]], wait)
        _attach(host, volume, image)  # what the next service does
    elif victim == "helper that attaches":
        other, second = host.volume(SIZE)
        with _helper_that_dies(wait), contextlib.suppress(IslandError):
            host.exports.attach(other, second)
        _read_last(_attach(host, other, second))
        host.exports.stop(other)
        second.unlink()
    else:

        def detach() -> None:
            with _helper_that_dies(wait), contextlib.suppress(IslandError):
                host.exports.detach(volume)
            _read_last(_attach(host, volume, image))
            with _helper_that_dies(wait / 4), contextlib.suppress(IslandError):
                host.exports.stop(volume)

        return detach
    return None


def _attach(host: Host, volume: str, image: Path) -> Path:
    """Attach; once more if that fails, for on an emulated machine QEMU 7.2 can die while it starts."""
    try:
        return host.exports.attach(volume, image)
    except IslandError:
        return host.exports.attach(volume, image)


def _read_last(link: Path) -> None:
    with BlockDevice(link) as device:
        device.read_direct(SIZE - BLOCK, BLOCK)


def _kill_service(host: Host, call: tuple[object, ...], wait: float) -> None:
    """Have a service of its own do something, and kill it meanwhile."""
    service = Remote(host.run, host.links)

    def work() -> None:
        with contextlib.suppress(AssertionError, BrokenPipeError, IslandError):  # it has died
            service.call(str(call[0]), *call[1:])

    worker = threading.Thread(target=work)
    worker.start()
    time.sleep(wait)
    os.kill(service.pid, signal.SIGKILL)
    worker.join()
    service.close()


@contextlib.contextmanager
def _helper_that_dies(wait: float):
    """Kill the first program of root's that is run, some time after it began."""
    killed = []

    def run(command, /, *, root=False, env=None):
        if killed:
            return run_program(command, root=root, env=env)
        killed.append(command)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                out, err = process.communicate(timeout=wait)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
            return ProgramResult(list(command), process.returncode, out, err)

    with mock.patch.object(actor, "run_program", run):
        yield


def _kill_command(host: Host, volume: str, image: Path, wait: float) -> None:
    """Begin to take a snapshot of the volume, and kill that."""
    user = ["setpriv", f"--reuid={host.uid}", f"--regid={host.uid}", "--clear-groups"]
    words = ["snapshot", str(image), "--volume", volume, "--qmp", str(host.exports.monitor(volume))]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "ISLAND_STATE": str(host.images / "state"),
        "ISLAND_REPOSITORY": str(host.images / "repository"),
    }
    with subprocess.Popen(
        [*user, sys.executable, "-P", "-m", "island_fast", *words], cwd="/", env=environment
    ) as command:
        time.sleep(2 + 4 * wait)
        command.kill()


def _check(image: Path, flushed: int) -> None:
    """Check the image, and that every number that was flushed is in it, or a later one in its place."""
    subprocess.run(["qemu-img", "check", "-q", "-r", "all", "-f", "qcow2", image], check=False)
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", image], check=True)
    raw = image.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw], check=True)
    content = raw.read_bytes()
    raw.unlink()
    for slot in range(min(SLOTS, flushed + 1)):
        found = int.from_bytes(content[slot * BLOCK : slot * BLOCK + 8], "big")
        wanted = flushed - (flushed - slot) % SLOTS  # the last number that was flushed at this place
        assert max(wanted, 0) <= found <= flushed + 1, (slot, found, wanted, flushed)
        assert content[slot * BLOCK : (slot + 1) * BLOCK] == found.to_bytes(8, "big") * (BLOCK // 8)


class User:
    """Writes the next number over every block in turn, and flushes it, until it sees an error."""

    def __init__(self, link: Path) -> None:
        self._link = link.resolve()
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self.flushed = 0
        self.error = 0

    def __enter__(self) -> User:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self.join()

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the user's request hangs"

    def _write(self) -> None:
        try:
            with BlockDevice(self._link) as device:
                while not self._enough.is_set():
                    number = self.flushed + 1
                    device.write_direct(number % SLOTS * BLOCK, number.to_bytes(8, "big") * (BLOCK // 8))
                    device.flush()
                    self.flushed = number
        except OSError as error:
            self.error = error.errno or -1
