"""The state machine, for some minutes at most, and what it once found, step by step.

MACHINE_SEED=n .venv/bin/pytest tests/faults/machine runs other lives; `make machine` runs as many as wanted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.faults.machine.machine import BEGINNING, COUNTS, Machine
from tests.faults.machine.process import CRASH_BEFORE, DUPLICATE, INTRUSION, LATE, LATE_OUTAGE, Fault
from tests.faults.machine.rounds import (
    beginnings,
    interruptions,
    march,
    never,
    old_states,
    refusals,
    round_of,
    table,
    tour,
)

SEED = int(os.environ.get("MACHINE_SEED", "6"))
LIVES = 30
LIVES_AT_GATEWAY = 10


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A repository with three snapshots of the volume alpha, which host 0 owns."""
    life = Machine()
    life.begin(seed=1, young=False)
    yield life
    life.world.close()


@pytest.mark.long
@pytest.mark.timeout(900)  # on a machine that is busy with other work
def test_nothing_is_lost_and_space_comes_back() -> None:
    print(f"MACHINE_SEED={SEED}")
    COUNTS.clear()
    tour()
    march()
    interruptions()
    refusals()
    old_states()
    round_of(SEED, LIVES)
    print(table())
    assert not never(), "these never happened, so nothing is known about them"


def test_nothing_is_lost_where_no_put_is_refused() -> None:
    """Behind a gateway like Ceph's, with PUTs of every kind that arrive up to an hour late."""
    print(f"MACHINE_SEED={SEED}")
    COUNTS.clear()
    beginnings()
    round_of(SEED, LIVES_AT_GATEWAY, refuses=False)
    print(table())
    for what in ("snapshot: failed", "adopt: failed", "adopt: done", LATE, LATE_OUTAGE, DUPLICATE, BEGINNING):
        assert any(what in name for name, count in COUNTS.items() if count), f"{what} never happened"


def test_a_snapshot_is_refused_if_its_lineage_went_away_and_came_back(machine: Machine) -> None:
    """The owner in between has swept its packs: nothing told him of the registration."""
    alpha, host = machine.volumes[0], machine.hosts[0]
    machine.world.images[alpha.path].write({0: 11}, 6)
    taken = machine.take(host, alpha, (Fault(INTRUSION, "put", 1, what="there and back"),))
    assert taken.process.intruded
    assert "changed hands" in str(taken.error)
    machine.everything = True
    machine.look_again()
    machine.end()


def test_an_interrupted_adoption_keeps_no_other_volume_from_being_swept(machine: Machine) -> None:
    alpha, beta = machine.volumes
    host = machine.hosts[1]
    assert machine.adopt_at(host, alpha, ()).done
    assert machine.take(host, beta, ()).done
    machine.look_again()
    assert machine.remove(host, beta, beta.visible, ()).done
    assert not machine.adopt_at(machine.hosts[0], alpha, (Fault(CRASH_BEFORE, "record", 1),)).done
    machine.look_again()
    assert alpha.stopped
    machine.quiet_sweep(host, beta)
    assert all("/catalog/" in name for name in machine.world.objects("beta"))
