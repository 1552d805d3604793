"""Verbs in processes of their own, which kill themselves or stand still at a call of the store.

`python -m tests.faults.crash.actor` has everything imported and forks one process for each job that comes on
standard input, so a process costs milliseconds. Requests and answers are lines of JSON: {"start": JOB} is
answered by the process id, {"wait": ID} by the exit status (negative: the signal), null if it is not to be
waited for and the process runs on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from island_fast.api import Repository
from island_fast.errors import IslandError
from island_fast.repository import pack_reader, pack_writer
from island_fast.repository.local_state import LocalState
from island_fast.stores.directory import DirectoryStore
from tests.faults.crash.watched import ELSEWHERE, Call, Elsewhere, WatchedStore

PATIENCE = 120.0  # seconds that a held process waits before it gives up
MAKING = ("snapshot", "copy")


@dataclass(frozen=True)
class Hold:
    """Stand still at the first call of `verb` (a pattern, as `name` is) at that moment, once.

    The process makes the file `gate`.reached then, and goes on when there is a file `gate`.
    """

    verb: str
    name: str
    moment: str
    gate: str


@dataclass(frozen=True)
class Job:
    """One verb of `repository` with `state`, both folders; `outcome` is the file that tells how it went.

    Packs that are made hold `slots` slots. `kill` is the number of a call and one of its moments,
    or that of a change elsewhere. Programs are looked for in the folder `programs` first.
    """

    verb: str
    repository: str
    state: str
    outcome: str
    arguments: dict[str, Any]
    older: float = 0.0
    slots: int = 4
    programs: str = ""
    kill: tuple[int, str] | None = None
    holds: tuple[Hold, ...] = ()

    @classmethod
    def read(cls, value: dict[str, Any]) -> Job:
        """Inverse of `dataclasses.asdict` and a way through JSON."""
        kill, holds = value.pop("kill"), value.pop("holds")
        return cls(**value, kill=tuple(kill) if kill else None, holds=tuple(Hold(**one) for one in holds))


def _copied(repository: Repository, source: str) -> list[dict[str, Any]]:
    """Everything in the folder `source`, one pack after the other."""
    repository.store.uploads = 1
    with Repository(DirectoryStore(source), repository.state) as near:
        return [one.as_json() for one in near.copy(repository)]


VERBS: dict[str, Callable[..., Any]] = {
    "copy": _copied,
    "snapshot": lambda repository, **words: repository.snapshot(**words).as_json(),
    "delete": lambda repository, snapshot: [one.as_json() for one in repository.delete([snapshot])],
    "sweep": lambda repository, **words: [one.as_json() for one in repository.sweep(**words)],
    "restore": lambda repository, **words: repository.restore(**words).as_json(),
    "list": lambda repository: [one.as_json() for one in repository.snapshots()],
    "verify": lambda repository, **words: repository.verify(**words).as_json(),
    "adopt": lambda repository, volume: repository.adopt(volume).as_json(),
}


def perform(job: Job) -> int:
    """Carry `job` out; the exit code."""
    if job.verb in MAKING:  # a reader refuses packs of more slots
        pack_reader.BATCH = pack_writer.MAX_SLOTS = job.slots
    if job.programs:
        os.environ["PATH"] = f"{job.programs}:{os.environ['PATH']}"
    waiting = list(job.holds)

    def dies_at(number: int, moment: str) -> None:
        if job.kill == (number, moment):
            _tell(job, reached=job.kill)
            os.kill(os.getpid(), signal.SIGKILL)

    def step(call: Call, moment: str) -> None:
        dies_at(call.number, moment)
        for hold in [h for h in waiting if h.moment == moment]:
            if re.fullmatch(hold.verb, call.verb) and re.search(hold.name, call.name):
                waiting.remove(hold)
                _stand_still(Path(hold.gate))

    elsewhere = Elsewhere(job.repository, lambda number: dies_at(number, ELSEWHERE))
    store = WatchedStore(DirectoryStore(job.repository, create_ok=True), step, job.older)
    try:
        with Repository(store, LocalState(Path(job.state)), create=job.verb in MAKING) as repository:
            answer = VERBS[job.verb](repository, **job.arguments)
    except IslandError as error:
        _tell(job, error=type(error).__name__, message=str(error), traceback=traceback.format_exc())
        return error.exit_code
    _tell(
        job,
        answer=answer,
        calls=[dataclasses.astuple(call) for call in store.calls],
        elsewhere=elsewhere.count,
    )
    return 0


def _tell(job: Job, **outcome: Any) -> None:
    Path(job.outcome).write_text(json.dumps(outcome))


def _stand_still(gate: Path) -> None:
    gate.with_name(f"{gate.name}.reached").touch()
    deadline = time.monotonic() + PATIENCE
    while not gate.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody opened {gate}")
        time.sleep(0.002)


def _become(job: Job) -> None:
    """The forked process: does `job` and ends."""
    code = 99
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        code = perform(job)
    except BaseException:
        _tell(job, error="escaped", message=traceback.format_exc())
        raise
    finally:
        os._exit(code)


def _answer(request: dict[str, Any]) -> int | None:
    if "start" in request:
        pid = os.fork()
        if not pid:
            _become(Job.read(request["start"]))
        return pid
    pid, status = os.waitpid(request["wait"], 0 if request["to_the_end"] else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
