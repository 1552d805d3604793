"""Two hosts and their account: how a command runs, is cut off, and what it leaves behind.

Everything runs in one process and one thread, by one clock and one source of randomness, so that a seed
repeats a life. A crash ends a command at a request; as a killed process runs no `finally`, the host's local
state and the images are put back to what they were at that moment.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from island_fast.api import Repository
from island_fast.errors import DamagedError, IslandError, StoreError, StoreRefusedError
from island_fast.images import open as source_module
from island_fast.repository import local_state, pack_reader, pack_writer, workers
from island_fast.repository.identity import Identity, Machine
from island_fast.repository.lineage import Lineage
from island_fast.repository.local_state import LocalState
from island_fast.stores import retry, swift_connection
from island_fast.stores.retry import RetryPolicy
from island_fast.stores.swift import SwiftStore
from island_fast.stores.swift_auth import Token
from tests.faults.machine.memory_gateway import Gateway
from tests.faults.machine.memory_image import MemoryImage, MemorySource
from tests.faults.machine.memory_swift import Account, Late
from tests.faults.machine.process import Connection, Crash, Fault, Process

CONTAINER, PREFIX = "box", "repository"
LISTED_BY_THEN = 0.8  # how often a listing shows, an hour or days later, what was stored before
PATIENCE = RetryPolicy(total=60.0, first=0.5, longest=5.0)
SHM = Path("/dev/shm")
NOWHERE = Path("/dev/null/nowhere")  # local state that can neither be read nor written: no caches

# Small, so that a few blocks fill several packs and a few records cross a checkpoint.
CHECKPOINT_EVERY, MAX_SLOTS, BATCH = 4, 4, 2


class Keys:
    """A stand-in for SwiftAuth."""

    verify = True
    cert = (None, None)

    def get_token(self) -> Token:
        return Token("http://memory/v1/account", "token")

    def renew(self, expired: Token) -> Token:
        return self.get_token()

    def address(self) -> str:
        return "memory"

    def refusal_error(self) -> StoreError:
        return StoreError("Swift refuses the token")


class Inline:
    """An executor that does the work at once: threads would make a seed's life another one each time."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args))
        except BaseException as error:  # noqa: BLE001 - as the real one does
            future.set_exception(error)
        return future

    def shutdown(self, **_: Any) -> None:
        pass


def _flock(file: Any, operation: int) -> None:
    """A lock that is held is held by this very process: to wait for it would be for ever."""
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        assert operation & fcntl.LOCK_NB, "a command waits for a lock that the one around it holds"
        raise


@dataclass(frozen=True)
class Host:
    """A host by number, and the folder of its local state."""

    number: int
    root: Path

    @property
    def state(self) -> LocalState:
        return LocalState(self.root)


@dataclass
class Outcome:
    """How a command ended: `done` with `value`, by `error`, or neither, by a crash."""

    process: Process
    done: bool = False
    value: Any = None
    error: IslandError | None = None

    @property
    def crashed(self) -> bool:
        return not self.done and self.error is None

    @property
    def undisturbed(self) -> bool:
        """Whether nothing that happened explains a failure."""
        process = self.process
        return not (self.crashed or process.hard or process.intruded or process.refused or process.misled)

    @property
    def refused(self) -> bool:
        """Whether the command failed by a refusal: then what it was at has not happened, and never will."""
        return self.process.refused and isinstance(self.error, StoreRefusedError)


class World:
    """The account, the hosts, the images by path, and the patches that put them in place."""

    def __init__(self, seed: int, counts: Counter[str], *, refuses: bool = True) -> None:
        self.account = Account(seed, counts) if refuses else Gateway(seed, counts)
        self._refuses = refuses
        self.images: dict[str, MemoryImage] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="machine-", dir=SHM if SHM.is_dir() else None))
        self.hosts = [Host(number, self.folder / f"host{number}") for number in (0, 1)]
        for host in self.hosts:
            host.root.mkdir()
        self.stack = ExitStack()
        self._copies = 0
        self._patch(random.Random(seed))
        with self.account.by(Process(self.account)):
            self.repository_id = self._open(self.hosts[0].state).id

    def close(self) -> None:
        self.stack.close()
        shutil.rmtree(self.folder)

    def _patch(self, draw: random.Random) -> None:
        def replaced(target: Any, name: str, value: Any) -> None:
            self.stack.enter_context(mock.patch.object(target, name, value))

        def retry_by_account(attempt: Callable[[], Any], policy: RetryPolicy) -> Any:
            return retry.retry(attempt, policy, clock=self.account.clock, sleep=self.account.sleep)

        def source(path: Path, *_: Any, **__: Any) -> MemorySource:
            return MemorySource(path, self.images[str(path)], self.account.now)

        def connection(**_: Any) -> Connection:
            return Connection(self.account, self.account.acting[-1])

        replaced(swift_connection, "client", SimpleNamespace(Connection=connection))
        replaced(swift_connection, "retry", retry_by_account)
        replaced(source_module, "Qcow2Source", source)
        replaced(pack_writer, "MAX_SLOTS", MAX_SLOTS)
        replaced(pack_reader, "BATCH", BATCH)
        replaced(pack_writer, "PACK_SIZE", 1 << 20)
        replaced(workers, "ThreadPoolExecutor", Inline)
        replaced(pack_writer, "ThreadPoolExecutor", Inline)
        replaced(os, "urandom", draw.randbytes)
        locks = {name: getattr(fcntl, name) for name in dir(fcntl) if name.startswith("LOCK_")}
        replaced(local_state, "fcntl", SimpleNamespace(flock=_flock, **locks))
        # Hosts are folders, and a crash puts one in the place of another.
        replaced(Identity, "_machine", lambda identity: Machine(*[identity._root.name] * 3))
        replaced(Identity, "_place", lambda identity: (1, 1))
        replaced(Identity, "_is_copy", lambda identity, entry: False)  # no host sees another's disk
        replaced(os, "fsync", lambda fd: None)  # processes die here, hosts do not
        clock = SimpleNamespace(**{name: getattr(time, name) for name in ("time", "monotonic")})
        clock.sleep = self.account.sleep
        clock.time_ns = lambda: int(self.account.now * 1e9)
        for name, module in sorted(sys.modules.items()):
            if name.startswith("island_fast.") and getattr(module, "time", None) is time:
                replaced(module, "time", clock)
            if name.startswith("island_fast.") and hasattr(module, "CHECKPOINT_EVERY"):
                replaced(module, "CHECKPOINT_EVERY", CHECKPOINT_EVERY)

    # Commands.

    def _open(self, state: LocalState) -> Repository:
        store = SwiftStore(CONTAINER, PREFIX, Keys(), PATIENCE)  # type: ignore[arg-type]
        store.known_to_refuse = self._refuses
        return Repository(store, state, create=True)

    def run(
        self,
        host: Host,
        command: Callable[[Repository], Any],
        faults: list[Fault],
        intrude: Callable[[str], bool] = lambda what: True,
        rival: Late | None = None,
    ) -> Outcome:
        """One process of `host` that meets `faults`. Damage is never an outcome."""
        frozen: list[Path] = []
        images: dict[str, Any] = {}

        def died() -> None:
            self._copies += 1
            frozen.append(self.folder / f"copy{self._copies}")
            shutil.copytree(host.root, frozen[0])
            images.update({path: image.kept() for path, image in self.images.items()})

        outcome = Outcome(Process(self.account, faults, died, intrude, rival=rival))
        try:
            with self.account.by(outcome.process):
                outcome.value = command(self._open(host.state))
                outcome.done = True
        except Crash:
            pass
        except DamagedError:
            raise
        except IslandError as error:
            outcome.error = error
        if frozen:
            outcome.done, outcome.error = False, None
            shutil.rmtree(host.root)
            frozen[0].rename(host.root)
            for path, kept in images.items():
                self.images[path].put_back(kept)
        if isinstance(outcome.error, StoreError):
            hindered = outcome.process.hard or outcome.process.refused
            assert hindered, f"gave up although the store answered: {outcome.error}"
        return outcome

    def reader(self, name: str) -> Lineage:
        """The lineage, freshly read without faults by somebody without caches."""
        with self.account.by(Process(self.account)):
            lineage = self._open(LocalState(NOWHERE)).lineage(name)
            lineage.refresh()
            lineage.is_stopped()
        return lineage

    # What happens to hosts.

    def files(self, host: Host, lineage: str) -> Path:
        return host.root / self.repository_id / lineage

    def locked(self, host: Host, lineage: str, lock: str = "lock") -> bool:
        """Whether a command of the host holds the lineage's lock, or its other one, for sweeps."""
        path = self.files(host, lineage) / lock
        if not path.exists():
            return False
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def pass_time(self, seconds: float) -> None:
        """Time passes for the store, listings mostly catch up; registrations, dated by files, grow older."""
        self.account.land_due(self.account.now + seconds)
        self.account.now += seconds
        if self.account.random.random() < LISTED_BY_THEN:
            self.account.catch_up()
        for host in self.hosts:
            for path in host.root.glob("*/*/running/*"):
                status = path.stat()
                os.utime(path, (status.st_atime - seconds, status.st_mtime - seconds))

    def under_way(self, lineage: str) -> bool:
        """Whether some record may yet arrive."""
        return any(f"/{lineage}/catalog/" in late.name for late in self.account.late)

    def claimed(self, lineage: str) -> bool:
        """Whether a claim of somebody can be in the way."""
        return any(f"/{lineage}/catalog/" in name and "-claim-" in name for name in self.account.rows)

    def pending(self, lineage: str) -> bool:
        """Whether some host has a record of unknown outcome."""
        return any(
            not path.name.startswith(".")
            for host in self.hosts
            for path in self.files(host, lineage).glob("pending/*")
        )

    def objects(self, lineage: str) -> dict[str, bytes]:
        """All objects of a lineage, by their names below the repository."""
        below = f"{PREFIX}/{lineage}/"
        found = self.account.objects()
        return {n.removeprefix(f"{PREFIX}/"): data for n, data in found.items() if n.startswith(below)}
