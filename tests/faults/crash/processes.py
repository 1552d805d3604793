"""Starting and watching the processes of `actor.py`, and the folders that they work in."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.faults.crash.actor import Hold, Job
from tests.faults.crash.watched import Call
from tests.support import qemu

ROOT = Path(__file__).resolve().parents[3]
BLOCK = 65536
VOLUME = "vol"
PATIENCE = 120.0  # seconds until a test gives up what it waits for


def wait_until(there: Callable[[], object], what: str) -> None:
    """Return as soon as `there()` is true."""
    deadline = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.002)


class Actors:
    """The process that forks the others. A context manager; ends what is left."""

    def __enter__(self) -> Actors:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.crash.actor"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._running: set[int] = set()
        return self

    def __exit__(self, *_: object) -> None:
        for pid in sorted(self._running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self.wait(pid)
        self._process.communicate(timeout=30)

    def start(self, job: Job) -> int:
        """The id of a process that does `job`."""
        pid = self._ask(start=asdict(job))
        self._running.add(pid)
        return pid

    def wait(self, pid: int, *, to_the_end: bool = True) -> int | None:
        """Its exit status; None if it runs on and is not to be waited for."""
        status: int | None = self._ask(wait=pid, to_the_end=to_the_end)
        if status is not None:
            self._running.discard(pid)
        return status

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@dataclass
class Actor:
    """A process of its own that was started to do one verb."""

    actors: Actors
    pid: int
    outcome: Path
    gates: dict[str, Path]
    status: int | None = None

    def wait(self) -> int:
        """Wait for its end; the exit status, negative for a signal."""
        if self.status is None:
            self.status = self.actors.wait(self.pid)
        assert self.status is not None
        return self.status

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        if self.status is None:
            self.status = self.actors.wait(self.pid, to_the_end=False)
        return self.status is None

    def kill(self) -> None:
        """End it by kill -9, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def told(self) -> dict[str, Any]:
        """What it said at its end."""
        told: dict[str, Any] = json.loads(self.outcome.read_text())
        return told

    def done(self) -> Any:
        """Wait for its end, which must be a good one; the answer of its verb."""
        status = self.wait()
        assert status == 0, (status, self.outcome.exists() and self.told())
        return self.told()["answer"]

    def calls(self) -> list[Call]:
        """Its calls of the store, once it came to a good end."""
        return [Call(*call) for call in self.told()["calls"]]

    def reached(self, gate: str) -> None:
        """Wait until it stands still at `gate`."""
        wait_until(lambda: self.stands(gate) or not self.runs, f"process at {gate}")
        assert self.stands(gate), self.told()

    def stands(self, gate: str) -> bool:
        """Whether it has come to `gate`."""
        return self.gates[gate].with_name(f"{gate}.reached").exists()

    def open(self, gate: str) -> None:
        """Let it go on."""
        self.gates[gate].touch()

    def asks_for_lock(self) -> bool:
        """Whether it has a lineage's lock file open: it holds the lock, or waits for it."""
        with contextlib.suppress(FileNotFoundError):  # it just ended
            for entry in Path(f"/proc/{self.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # it just closed that one
                    if os.readlink(entry).endswith(f"/{VOLUME}/lock"):
                        return True
        return False


class World:
    """A repository, local states and images in one folder. Everything is always at the same path."""

    def __init__(self, folder: Path, actors: Actors) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.repository = folder / "repository"
        self.image = folder / f"{VOLUME}.qcow2"
        self._actors = actors
        self._numbers = itertools.count()

    def state(self, name: str = "state") -> Path:
        """The folder of local state of one host."""
        return self.folder / name

    def start(
        self, verb: str, *, state: str = "state", holds: tuple[Hold, ...] = (), **options: Any
    ) -> Actor:
        """Start `verb` in a process; options are those of `Job`, all others are the verb's arguments."""
        mine = {name: options.pop(name) for name in ("older", "slots", "kill", "programs") if name in options}
        number = next(self._numbers)
        gates = {hold.gate: self.folder / hold.gate for hold in holds}
        outcome = self.folder / f"outcome-{number}"
        outcome.unlink(missing_ok=True)
        job = Job(
            verb=verb, repository=str(self.repository), state=str(self.state(state)), outcome=str(outcome),
            arguments=options, holds=tuple(Hold(h.verb, h.name, h.moment, str(gates[h.gate])) for h in holds),
            **mine,
        )  # fmt: skip
        return Actor(self._actors, self._actors.start(job), outcome, gates)

    def run(self, verb: str, **options: Any) -> Any:
        """Do `verb` in a process; its answer."""
        return self.start(verb, **options).done()

    def snapshot(self, image: Path | None = None, **options: Any) -> str:
        """Take a snapshot of the (main) image; its id."""
        taken: str = self.run("snapshot", image=str(image or self.image), **options)["snapshot"]
        return taken

    def create(self, blocks: int = 64) -> None:
        """Make the image."""
        qemu.create(self.image, blocks * BLOCK, lazy_refcounts="on")

    def write(self, first: int, blocks: int, seed: int, image: Path | None = None) -> None:
        """Write blocks that do not compress, the same ones for the same arguments."""
        piece = self.folder / "piece"
        piece.write_bytes(random.Random(f"{first} {seed}").randbytes(blocks * BLOCK))
        qemu.write_file(image or self.image, first * BLOCK, piece)
        piece.unlink()

    def keep(self, where: Path) -> None:
        """Copy everything to the new folder `where`."""
        copy(self.folder, where)

    def put_back(self, where: Path) -> None:
        """Make everything as it was kept in `where`."""
        shutil.rmtree(self.folder)
        copy(where, self.folder)


def copy(source: Path, target: Path) -> None:
    """Copy a folder; an object becomes a second name of the same file, which nothing writes to again."""

    def each(one: str, other: str) -> None:
        (os.link if "repository" in Path(one).parts else shutil.copy2)(one, other)

    shutil.copytree(source, target, copy_function=each)


def set_back(paths: list[Path], seconds: float) -> None:
    """Make files look as if they had been written `seconds` ago."""
    then = time.time() - seconds
    for path in paths:
        os.utime(path, (then, then))
