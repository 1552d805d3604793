"""Rounds of lives: so many per seed, and how often each thing happened in them."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.faults.machine import process
from tests.faults.machine.machine import (
    BEGINNING,
    COUNTS,
    GOES_ON,
    HELD_UP,
    INTERRUPTIONS,
    MANIFESTS_LOST,
    MANY,
    NOT_SENT,
    PUT_BACK,
    RECORD_LOST,
    WEATHER,
    GatewayMachine,
    Machine,
    held_up,
)
from tests.faults.machine.model import Volume
from tests.faults.machine.process import Fault
from tests.faults.machine.troubles import ADOPTING, COMMITTING, READING

STEPS = 40

VERBS = ("snapshot", "delete", "dry run", "sweep", "adopt", "restore", "list")
FAULTS = (
    process.CRASH_BEFORE, process.CRASH_AFTER, process.LOST, process.FAILED,
    process.EXPIRED, process.LATE, process.DUPLICATE, process.STALE, process.CUT,
    process.LISTING, process.DENIED, process.SWAPPED, process.AGED, process.REFUSED, process.RACE,
    *process.HARD,
)  # fmt: skip
INTRUDERS = tuple(dict.fromkeys(COMMITTING + ADOPTING + READING))


def round_of(number: int, lives: int, *, shrink: bool = False, refuses: bool = True) -> None:
    """Live so many lives; the seed `number` decides all of them. Without `shrink`, failures stay as met."""
    life = seed(number)(type("Life", (Machine if refuses else GatewayMachine,), {}))
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    run_state_machine_as_test(
        life,
        settings=settings(
            max_examples=lives,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )


def tour() -> None:
    """Each fault and each intruder once, at a command that meets it, in a life of its own."""
    for kind in FAULTS[: -len(process.HARD) - 1] + process.HARD:
        verb = "restore" if kind in (process.STALE, process.CUT) else "sweep"
        _must_meet(verb, Fault(kind, _at(kind)))
    for what in INTRUDERS:
        kind = process.RACE if "same moment" in what else process.INTRUSION
        verb = "adopt" if what in ADOPTING else "snapshot" if what in COMMITTING else "restore"
        where, skip = {
            "adopt": ("record", 0),
            "snapshot": ("any", 3) if what == "a delete" else ("put", 0),
            "restore": ("get", 0),
        }[verb]
        _must_meet(verb, Fault(kind, where, skip, what=what))


def march() -> None:
    """Every change of every command is where something goes wrong, or somebody comes in between.

    Each is tried twice, by different luck: of listings, of nodes.
    """
    wrong = (process.CRASH_BEFORE, process.CRASH_AFTER, process.LATE_OUTAGE)
    for luck, (verb, intruders) in itertools.product(
        (1, 2), (("snapshot", COMMITTING), ("sweep", COMMITTING), ("adopt", ADOPTING))
    ):
        for skip in range(6 if verb == "sweep" else 4):
            for kind in wrong:
                _met(verb, Fault(kind, "put" if kind == process.LATE_OUTAGE else "change", skip), luck)
            for what in intruders:
                if "same moment" not in what:
                    _met(verb, Fault(process.INTRUSION, "change", skip, what=what), luck)


def interruptions() -> None:
    """Every PUT of a snapshot is its last; the next one meets the volume as it was, or otherwise."""
    for kind in INTERRUPTIONS:
        for skip in range(6):
            for writes in ({}, {0: 15, 2: 11}, {1: 0, 7: 14}):
                life = Machine()
                try:
                    life.begin(seed=1, young=False)
                    life.interrupted(0, {}, writes, kind, skip, deleted=skip % 2 == 1)
                    life.look_again()
                    life.delete(0, [skip], False, ())
                    life.look_again()
                    life.end()
                finally:
                    life.world.close()


def refusals() -> None:
    """A record is refused: at once, after a try whose outcome is unknown, or when it is sent again."""
    at_once = (Fault(process.REFUSED, "record"),)
    after_a_try = (Fault(process.LATE, "record"), Fault(process.REFUSED, "record"))
    unknown = (Fault(process.LATE, "record"), Fault(process.CRASH_BEFORE, "record"))
    for verb in ("snapshot", "delete", "sweep", "adopt"):
        for luck in (1, 2, 3):
            for faults, again in ((at_once, ()), (after_a_try, ()), (unknown, at_once)):
                life = Machine()
                try:
                    life.begin(seed=luck, young=False)
                    host = life.hosts[0]
                    life.snapshot(0, {0: 11}, 0, {}, False, ())
                    life.look_again()
                    if verb == "snapshot":
                        life.snapshot(0, {0: 12}, 0, {}, False, _fresh(faults))
                    elif verb == "delete":
                        life.delete(0, [1], False, _fresh(faults))
                    elif verb == "adopt":
                        life.adopt_at(life.hosts[1], life.volumes[0], _fresh(faults))
                    else:
                        life.delete(0, [0], False, ())
                        life.sweep(0, 0, 30, _fresh(faults))
                    life.look_again()
                    if again:  # whoever only looks goes on
                        listed = life.run(
                            host, "list", life.volumes[0], lambda r: r.snapshots(), _fresh(again)
                        )
                        assert listed.done, f"reading wants to write: {listed.error!r}"
                        life.everything = True
                        life.look_again()
                    life.everyone_looks(0)
                    life.account.land(9)
                    life.look_again()
                    life.end()
                finally:
                    life.world.close()


def _fresh(faults: tuple[Fault, ...]) -> tuple[Fault, ...]:
    return tuple(replace(fault) for fault in faults)


def old_states() -> None:
    """A host gets an old state back, from when a snapshot was interrupted that was taken and swept since."""
    for skip in range(1, 5):
        for writes in ({}, {0: 15, 2: 11}):
            life = Machine()
            try:
                life.begin(seed=1, young=False)
                life.snapshot(0, MANY, 0, {}, False, (Fault(process.CRASH_AFTER, "put", skip),))
                life.look_again()
                life.keep_or_put_back(0)
                life.snapshot(0, writes, 0, {}, False, ())
                life.look_again()
                life.delete(0, [len(life.volumes[0].visible) - 1], False, ())
                life.look_again()
                for _ in range(2):
                    life.sweep(0, 0, 100, ())
                    life.look_again()
                life.keep_or_put_back(0)
                life.snapshot(0, {5: 17}, 0, {}, False, ())
                life.look_again()
                life.clone(0)
                life.snapshot(0, {5: 18}, 0, {}, True, ())
                life.look_again()
                life.end()
            finally:
                life.world.close()


BEGUN = (process.CRASH_AFTER, process.LATE_OUTAGE, process.DUPLICATE, process.REFUSED)


def beginnings() -> None:
    """Where no PUT is refused, an epoch is begun, and something goes wrong at one of its PUTs.

    Another host begins the same one: in the middle, at once, when just under an hour has passed, or when the
    claim of the first one has expired; and what was held up arrives as late as it can.
    """
    for epoch in (0, 1):
        first_record = 1 + epoch  # after the claim, and the stop
        for skip in range(first_record + 1):
            for kind in BEGUN:
                _begin_twice(epoch, (Fault(kind, "record", skip),))
            for minutes in (0, 58, 95):
                _begin_twice(epoch, held_up(skip), minutes)
            for what in ("an adoption" if epoch else BEGINNING, *HELD_UP):
                _begin_twice(epoch, (Fault(process.INTRUSION, "record", skip, what=what),))
        # What was not sent is sent again when its claim is over, and another's record is under way.
        _begin_twice(epoch, (Fault(process.CRASH_BEFORE, "record", first_record),), 95, held_up(1))


def _begin_twice(
    epoch: int, faults: tuple[Fault, ...], minutes: int = 0, meeting: tuple[Fault, ...] = ()
) -> None:
    """A host begins `epoch` and meets `faults`; `minutes` later another host does, `meeting` others."""
    life = GatewayMachine()
    try:
        life.begin(seed=1, young=not epoch)
        volume = life.volumes[0]
        _begin_at(life, volume, epoch, 1, faults)
        life.look_again()
        life.world.pass_time(minutes * 60.0)
        life.everything = True
        life.look_again()
        if not any(fault.what in HELD_UP for fault in faults):  # the other one is there already
            _begin_at(life, volume, epoch, 0, meeting)
        life.look_again()
        for number in (1, 0):  # which also sends again what is pending
            life.run(life.hosts[number], "list", volume, lambda r: r.snapshots(), ())
        life.everything = True
        life.look_again()
        for host in life.hosts:
            if volume.exists and life.owns(host, volume):
                life.take(host, volume, (), nested=True)
        life.look_again()
        life.world.pass_time(3600.0)
        life.everything = True
        life.look_again()
        life.end()
    finally:
        life.world.close()


def _begin_at(life: Machine, volume: Volume, epoch: int, host: int, faults: tuple[Fault, ...]) -> None:
    """A host makes the volume by its first snapshot, or adopts it."""
    if epoch:
        life.adopt_at(life.hosts[host], volume, faults)
    else:
        life.take(life.hosts[host], volume, faults)


def _at(kind: str) -> str:
    """What a fault must be planted in to happen in `_met`."""
    places = {process.STALE: "plain", process.CUT: "plain", process.DENIED: "head"}
    places |= dict.fromkeys((process.LISTING, process.SWAPPED, process.AGED), "list")
    return places.get(kind, "record")


def _met(verb: str, fault: Fault, luck: int = 1) -> None:
    """A life with a few commands, of which `verb` meets the fault. `luck` is the life's seed."""
    fault = replace(fault)
    life = Machine()
    try:
        life.begin(seed=luck, young=False)
        if verb == "restore":
            life.restore(0, 1, 1, None, (fault,))
        elif verb == "adopt":
            life.adopt(0, 1, True, (fault,))
        elif verb == "snapshot":
            life.snapshot(0, {0: 11, 1: 12, 2: 13, 3: 14}, 0, {}, False, (fault,))
        else:
            every = {0: 11, 1: 12, 2: 13, 3: 14, 4: 14, 5: 12}
            for writes in (every, {0: 17, 3: 18, 4: 19}, {1: 17}):
                life.snapshot(0, writes, 0, {}, False, ())
                life.look_again()
            life.delete(0, [3], False, ())  # leaves two packs more than half dead
            life.sweep(0, 0, 30, (fault,))
        life.look_again()
        life.end()
    finally:
        life.world.close()


def _must_meet(verb: str, fault: Fault) -> None:
    before = COUNTS.copy()
    _met(verb, fault)
    names = {fault.kind, fault.what, f"{fault.kind}: {fault.what}"}
    assert any(COUNTS[name] > before[name] for name in names), f"{fault} did not happen to {verb}"


def table(counts: Counter[str] = COUNTS) -> str:
    """How often each command ended how, and each fault happened."""
    return "\n".join(f"{count:8}  {what}" for what, count in sorted(counts.items()))


def never(counts: Counter[str] = COUNTS) -> list[str]:
    """Commands, faults, intrusions and events that did not happen at all."""
    intruders = [f"another process: {what}" for what in INTRUDERS if "same moment" not in what]
    older = (PUT_BACK, RECORD_LOST, MANIFESTS_LOST)
    happened = {what: counts[what] for what in (*FAULTS, *WEATHER, *intruders, *older, GOES_ON, NOT_SENT)}
    happened |= {f"{verb}: done": counts[f"{verb}: done"] for verb in VERBS}
    return sorted(what for what, count in happened.items() if not count)
