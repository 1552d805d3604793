"""A command that is killed while the store has one of its writing requests, at each of them in turn.

The request is carried out after the process has died, or the store finds that nobody waits for it any more.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time

from tests.faults.swift.conftest import Life
from tests.support import qemu
from tests.support.swift_faults import Fault
from tests.support.swift_server import SwiftServer

pytestmark = qemu.needs_qemu


def is_killed_at(life: Life, swift: SwiftServer, method: str, number: int, *words: object) -> bool:
    """Run a command of the host, and kill it at its request `number` with this method; False if it ends."""
    swift.calm()
    swift.inject(Fault("hold", method=method, path=f"/{life.container}/", skip=number))
    environment = {
        **os.environ,
        "ISLAND_STATE": str(life._folder / "host"),
        "ISLAND_REPOSITORY": f"swift://{life.container}/repo",
    }
    command = [sys.executable, "-m", "island_fast", *map(str, words), "-q"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and swift.count(method, life.container) <= number:
        time.sleep(0.02)
    killed = process.poll() is None
    process.kill()
    assert process.wait() == (-9 if killed else 0)
    swift.calm()
    return killed


def test_snapshots_and_sweeps_that_are_killed_at_every_write(life: Life, swift: SwiftServer, aged: None):
    life.snapshot()
    for number in itertools.count():
        life.write(number % 40, 3)
        killed = is_killed_at(life, swift, "PUT", number, "snapshot", life.image, "--volume", "vol")
        life.snapshot()
        found = {one.snapshot for one in life.stranger().snapshots("vol")}
        late = found - life.truth.keys()  # what was killed, or not, and is a snapshot all the same
        assert len(late) <= 1
        life.truth.update(dict.fromkeys(late, qemu.content(life.image)))
        if not killed:
            break
    assert number >= 3, "a pack, a manifest and a record at least"
    life.check()
    for number in itertools.count():
        life.delete(min(life.truth))
        killed = is_killed_at(life, swift, "DELETE", number, "sweep", "--grace", "0")
        if not killed:
            break
        life.sweep()
    life.sweep()
    life.check()
    assert life.listed() >= life.names(), "what came late stays for a day: the host still expects it"
