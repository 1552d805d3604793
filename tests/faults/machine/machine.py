"""The state machine: two hosts, two volumes, any order of commands and faults, against a model.

The model knows contents by snapshot id, and what must be there. A command that reported success counts for
ever. One that failed or was cut off is in doubt until no host holds a record of unknown outcome and none is
under way: until then both outcomes are right, and from then on what a reader without faults sees stays.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from island_fast.dirtymap import BLOCK_SIZE
from island_fast.errors import DamagedError
from island_fast.formats.names import catalog_name, stop_name
from island_fast.operations.sweep import sweep
from island_fast.progress import silent
from island_fast.repository.pack_reader import PackReader
from island_fast.stores.swift import SwiftStore
from tests.faults.machine.books import balanced, is_content, object_names, restored
from tests.faults.machine.memory_image import CONTENTS, HOLE, MemoryImage
from tests.faults.machine.memory_swift import DAY, NODES, Late
from tests.faults.machine.model import Doubt, Volume
from tests.faults.machine.process import (
    CRASH_AFTER,
    CRASH_BEFORE,
    DENIED,
    LATE,
    LATE_OUTAGE,
    LOST_OUTAGE,
    REFUSED,
    Fault,
)
from tests.faults.machine.troubles import ADOPTING, COMMITTING, LATEST, READING, troubles
from tests.faults.machine.world import PREFIX, Host, Outcome, World

HOUR = 3600.0
MOST = 7  # live snapshots of a volume
COUNTS: Counter[str] = Counter()  # of commands, their outcomes and faults, over all lives of this process

LOST_STOP, STRANGER = "stops lost", "a stranger's object"
PUT_BACK, RECORD_LOST, MANIFESTS_LOST = "an older copy put back", "newest record lost", "manifests lost"
TIMES = {"an hour passes": HOUR, "a day passes": 25 * HOUR, "a week passes": 8 * DAY}
CLONED, KEPT = "state cloned", "state kept, or put back"
WEATHER = (
    "a host looks", "a host looks", "state lost", "caches lost", "late PUTs land", "late PUTs land",
    "replication", "node away or back", "node away or back", CLONED, KEPT, LOST_STOP, STRANGER, *TIMES,
)  # fmt: skip
GOES_ON, NOT_SENT = "an interrupted snapshot goes on", "blocks that were not sent again"
INTERRUPTIONS = (CRASH_BEFORE, CRASH_AFTER, LATE_OUTAGE, LOST_OUTAGE)
MANY = {0: 11, 1: 12, 2: 13, 3: 14, 5: 11, 6: 12}
WRITES = st.dictionaries(st.integers(0, 11), st.integers(HOLE, CONTENTS - 1), max_size=4)
LONG = ("a sweep a day later", "there and back")  # what takes longer than an hour
BEGINNING = "a first snapshot by another host"
HELD_UP = ("a first record that is held up",)
CHANGING = ("snapshot", "delete", "sweep", "adopt")
VOLUMES = st.integers(0, 1)
PICK = st.integers(0, MOST - 1)


def held_up(skip: int) -> tuple[Fault, ...]:
    """A PUT of the catalog, after so many others, comes late, and its command fails and does not know."""
    return Fault(LATE, "record", skip), Fault(REFUSED, "record", skip)


class Machine(RuleBasedStateMachine):
    """See above. `initialize` begins a life, `teardown` ends it and looks at what is left."""

    refusing = True  # the store, a PUT on a name that is taken

    def __init__(self) -> None:
        super().__init__()
        self.volumes = [Volume("alpha", 0), Volume("beta", 1)]
        self.everything = True  # look at both volumes, whatever changed
        self.targets = 0
        self.kept: dict[int, list[list[Doubt]]] = {}  # by host whose state was kept: the doubts of then
        self.aged: set[int] = (
            set()
        )  # hosts with an old state; what was tried since can stand in the way of an attempt
        self.strangers: set[str] = set()
        self.copy: Any = None  # of the repository, as it was once
        self.world: World | None = None

    @initialize(seed=st.integers(0, 1 << 16), young=st.sampled_from((False, False, False, True)))
    def begin(self, seed: int, young: bool) -> None:
        """A new repository, or one with a few snapshots."""
        self.world = World(seed, COUNTS, refuses=self.refusing)
        self.account = self.world.account
        self.hosts = self.world.hosts
        for volume in self.volumes:
            self.world.images[volume.path] = MemoryImage((1, 2, 3, 4, 5, 0))
        self.look_again()
        for written in () if young else ({}, {0: 6, 1: 7}, {1: 8, 2: 9, 3: 10}):
            self.world.images[self.volumes[0].path].write(written, 6)
            assert self.take(self.hosts[0], self.volumes[0], ()).done
            self.look_again()

    def teardown(self) -> None:
        if self.world is None:
            return
        try:
            if sys.exc_info()[0] is None:
                self.end()
        finally:
            self.world.close()

    # Commands and what the model makes of their outcomes.

    def run(
        self, host: Host, verb: str, volume: Volume, command: Any, faults: Any, rival: Late | None = None
    ) -> Outcome:
        """Run a command with faults; `volume` is the one that intruders meddle with."""
        planted = [replace(fault) for fault in faults]
        if not self.refusing:
            planted = [one for one in map(self._possible, planted) if one]
        outcome = self.world.run(host, command, planted, lambda what: self.intrude(what, host, volume), rival)
        ending = "crashed" if outcome.crashed else "failed" if outcome.error else "done"
        COUNTS[f"{verb}: {ending}"] += 1
        return outcome

    def expected(self, outcome: Outcome, volume: Volume, allowed: bool) -> None:
        """An undisturbed command of a host that may do it succeeds; of another it never does."""
        if allowed and self.sure(volume) and outcome.undisturbed:
            assert outcome.done, f"it failed without a reason: {outcome.error!r}"

    def sure(self, volume: Volume) -> bool:
        """Whether nothing that went before can still change the catalog."""
        return not (
            self.world.pending(volume.name)
            or self.world.under_way(volume.name)
            or self.world.claimed(volume.name)
        )

    def _possible(self, fault: Fault) -> Fault | None:
        """The fault as a gateway can have it, which denies nothing twice; None for what is relied on.

        A process does not stand still for an hour between two requests of an adoption.
        """
        if fault.kind == DENIED:
            fault.times = 1
        return None if fault.what in LONG else fault

    def owns(self, host: Host, volume: Volume) -> bool:
        if not volume.exists:
            return host.number == volume.home or not self.refusing
        return volume.owner == host.state.writer and not volume.stopped

    def owner(self, volume: Volume) -> Host | None:
        return next((host for host in self.hosts if self.owns(host, volume)), None)

    def take(self, host: Host, volume: Volume, faults: Any, nested: bool = False, **how: Any) -> Outcome:
        """A snapshot. One that is `nested` in another command may fail because of that."""
        content, writer = self.world.images[volume.path].content, host.state.writer
        allowed, sure = self.owns(host, volume), self.sure(volume)
        outcome = self.run(
            host, "snapshot", volume,
            lambda repository: repository.snapshot(volume.path, volume=volume.name, **how), faults,
        )  # fmt: skip
        if outcome.done:
            assert allowed or not sure, "a host that does not own the volume took a snapshot"
            snapshot = outcome.value.snapshot
            COUNTS[GOES_ON] += outcome.value.attempt > 0
            COUNTS[NOT_SENT] += outcome.value.blocks_kept
            assert snapshot not in volume.certain, "an id was used twice"
            assert snapshot not in volume.gone, "the id of a deleted snapshot was used again"
            volume.certain[snapshot] = content
        else:
            if not outcome.refused:
                volume.doubts.append(Doubt(writer, content))
            surprised = nested or host.number in self.aged
            self.expected(outcome, volume, allowed and sure and not surprised)
        return outcome

    def remove(
        self, host: Host, volume: Volume, snapshots: tuple[str, ...], faults: Any, nested: bool = False
    ) -> Outcome:
        writer = host.state.writer
        allowed, sure = self.owns(host, volume), self.sure(volume)
        references = [f"{volume.name}@{snapshot}" for snapshot in snapshots]
        outcome = self.run(host, "delete", volume, lambda repository: repository.delete(references), faults)
        if outcome.done:
            assert allowed or not sure, "a host that does not own the volume deleted a snapshot"
            for snapshot in snapshots:
                volume.certain.pop(snapshot, None)
                volume.seen.pop(snapshot, None)
                volume.gone.add(snapshot)
        else:
            if not (outcome.refused and len(snapshots) == 1):  # else those before it are gone
                volume.doubts.append(Doubt(writer, deleted=snapshots))
            self.expected(outcome, volume, allowed and sure and not nested)
        return outcome

    def sweep_at(self, host: Host, volume: Volume, faults: Any, unknown: bool = False) -> Outcome:
        """A sweep; only one that is to remove `unknown` objects touches those of a stranger.

        A host that owns nothing, where there is something, has nothing to do and says so.
        """
        existing = [each for each in self.volumes if each.exists]
        allowed = not existing or any(each.owner == host.state.writer for each in existing)
        strangers = [name for name in sorted(self.strangers) if self.account.holds(name)]
        outcome = self.run(
            host, "sweep", volume, lambda repository: repository.sweep(unknown=unknown), faults
        )
        if not unknown and not outcome.process.intruded:
            assert all(map(self.account.holds, strangers)), "a stranger's object was swept"
        for each in self.volumes:
            self.expected(outcome, each, allowed)
        return outcome

    def adopt_at(self, host: Host, volume: Volume, faults: Any, rival: Late | None = None) -> Outcome:
        exists = volume.exists
        outcome = self.run(
            host, "adopt", volume, lambda repository: repository.adopt(volume.name), faults, rival
        )
        if outcome.done:
            owner = self.world.reader(volume.name).owner
            assert owner == host.state.writer, "a host was told that it is the owner, and it is not"
        else:
            self.expected(outcome, volume, exists)
        return outcome

    def restore_at(self, host: Host, volume: Volume, snapshot: str, faults: Any) -> Outcome:
        self.targets += 1
        target = self.world.folder / f"target{self.targets}"
        content = volume.content(snapshot)
        outcome = self.run(
            host, "restore", volume,
            lambda r: r.restore(f"{volume.name}@{snapshot}", target, image_format="raw"), faults,
        )  # fmt: skip
        if outcome.done:
            blocks = np.frombuffer(target.read_bytes(), np.uint8).reshape(-1, BLOCK_SIZE)
            assert is_content(blocks, content), f"snapshot {snapshot} restores other bytes"
        else:
            still = volume.must_be_live(snapshot)
            assert not (outcome.undisturbed and still), f"{snapshot} is lost: {outcome.error!r}"
            if outcome.process.intruded and not outcome.process.hard and not outcome.crashed:
                assert not still, f"{snapshot} is live and did not restore: {outcome.error!r}"
        target.unlink(missing_ok=True)
        return outcome

    # Another process's command between two requests of one.

    def intrude(self, what: str, host: Host, volume: Volume) -> bool:
        """False if it cannot be now: a lock is held, or there is nothing to do it to."""
        other = self.hosts[1 - host.number]
        if what == "an adoption":
            return volume.exists and self.adopt_at(other, volume, ()).done
        if what == BEGINNING:
            self.take(other, volume, (), nested=True)
            return True
        if what in HELD_UP:
            begin = self.adopt_at if volume.exists else self.take
            begin(other, volume, held_up(1 + volume.exists))
            return True
        if what == "an adoption at the same moment":
            running = self.account.acting[-1]
            running.racing = self.adopt_at(other, volume, (), running.racing).process.rival
            return True
        if what == "the owner goes on":
            owner = self.owner(volume)
            return owner not in (None, host) and self.take(owner, volume, (), nested=True) is not None
        if what == "the owner deletes":
            owner = self.owner(volume)
            return owner not in (None, host) and self.remove_one(owner, volume)
        host = self.owner(volume) or host
        if self.held("lock", *self.hosts):
            return False
        if what in LATEST:  # the newest one may be the base of a running snapshot
            chosen = volume.visible[LATEST[what] :][:1]
            if chosen and chosen[0] in volume.certain:
                self.remove(host, volume, chosen, (), nested=True)
            return True
        if what == "a delete":
            return self.remove_one(host, volume)
        if what == "there and back":
            return self.there_and_back(host, volume)
        if self.held("sweep", host):
            return False
        if what == "a delete and a sweep" and not self.remove_one(host, volume):
            return False
        if what == "lost registrations":
            for path in self.world.files(host, volume.name).glob("running/*"):
                path.unlink()
        self.world.pass_time(30 * HOUR)
        self.sweep_at(host, volume, ())
        return True

    def held(self, lock: str, *hosts: Host) -> bool:
        return any(self.world.locked(host, each.name, lock) for host in hosts for each in self.volumes)

    def there_and_back(self, host: Host, volume: Volume) -> bool:
        """Another host adopts, sweeps a day later, and the first one adopts again."""
        other = self.hosts[1 - host.number]
        if not volume.exists or self.held("sweep", other):
            return False
        self.adopt_at(other, volume, ())
        self.world.pass_time(30 * HOUR)
        self.sweep_at(other, volume, ())
        self.adopt_at(host, volume, ())
        return True

    def remove_one(self, host: Host, volume: Volume) -> bool:
        """Delete one of the snapshots that are surely there: the first, in random order, that may go."""
        known = [snapshot for snapshot in volume.visible if snapshot in volume.certain]
        self.account.random.shuffle(known)
        return any(self.remove(host, volume, (snapshot,), (), nested=True).done for snapshot in known)

    # Rules.

    def ready(self, number: int, stranger: bool, faults: Any) -> tuple[Volume, Host] | None:
        """The volume and a host to work at: its owner, or another. Where there is none, one adopts."""
        volume = self.volumes[number]
        owner = self.owner(volume)
        if owner is None:
            self.adopt_at(self.hosts[len(volume.visible) % 2], volume, faults)
            return None
        return volume, self.hosts[1 - owner.number] if stranger and volume.exists else owner

    @rule(
        number=VOLUMES, writes=WRITES, blocks=st.sampled_from((0, 0, 0, 4, 9, 12)),
        how=st.sampled_from(({}, {}, {}, {"pin": False}, {"full": True})),
        stranger=st.sampled_from((False,) * 9 + (True,)), faults=troubles(COMMITTING),
    )  # fmt: skip
    def snapshot(
        self, number: int, writes: dict[int, int], blocks: int, how: Any, stranger: bool, faults: Any
    ) -> None:
        image = self.world.images[self.volumes[number].path]
        image.write(writes, blocks or len(image.blocks))
        found = self.ready(number, stranger, faults)
        if found and len(found[0].visible) < MOST:
            self.take(found[1], found[0], faults, **how)

    @rule(
        number=VOLUMES, picks=st.lists(PICK, min_size=1, max_size=2, unique=True),
        stranger=st.sampled_from((False,) * 9 + (True,)), faults=troubles(COMMITTING),
    )  # fmt: skip
    def delete(self, number: int, picks: list[int], stranger: bool, faults: Any) -> None:
        found = self.ready(number, stranger, faults)
        if found and found[0].visible:
            volume, host = found
            chosen = dict.fromkeys(volume.visible[pick % len(volume.visible)] for pick in picks)
            self.remove(host, volume, tuple(chosen), faults)

    @rule(
        number=VOLUMES,
        pick=PICK,
        host=VOLUMES,
        writes=st.one_of(st.none(), WRITES),
        faults=troubles(READING),
    )
    def restore(self, number: int, pick: int, host: int, writes: dict[int, int] | None, faults: Any) -> None:
        """Restore a snapshot; with `writes`, work goes on in that image, as a branch."""
        volume = self.volumes[number]
        if volume.visible:
            snapshot = volume.visible[pick % len(volume.visible)]
            row, content = self.world.reader(volume.name).state.live[snapshot], volume.content(snapshot)
            done = self.restore_at(self.hosts[host], volume, snapshot, faults).done
            if done and writes is not None:
                image = MemoryImage(content, row.pin)
                image.write(writes, len(image.blocks))
                self.world.images[volume.path] = image

    @rule(number=VOLUMES, pick=PICK, one=WRITES, two=WRITES, figures=st.booleans())
    def study(self, number: int, pick: int, one: dict[int, int], two: dict[int, int], figures: bool) -> None:
        """What must happen often and takes several commands."""
        if figures:
            self.figures(number, pick)
        else:
            self.family(number, pick, one, two)

    @rule(
        number=VOLUMES, one=WRITES, two=WRITES, kind=st.sampled_from(INTERRUPTIONS),
        skip=st.integers(0, 4), deleted=st.booleans(),
    )  # fmt: skip
    def interrupted(
        self, number: int, one: dict[int, int], two: dict[int, int], kind: str, skip: int, deleted: bool
    ) -> None:
        """A snapshot of many blocks ends at one of its PUTs, and the volume is snapshotted again."""
        self.snapshot(number, MANY | one, 0, {}, False, (Fault(kind, "put", skip),))
        self.look_again()
        if deleted:
            self.delete(number, [MOST - 1], False, ())
            self.look_again()
        self.snapshot(number, two, 0, {}, False, ())

    def family(self, number: int, pick: int, one: dict[int, int], two: dict[int, int]) -> None:
        """Two branches from one snapshot, which then goes, and one of the branches with it."""
        for writes in (one, two):
            self.restore(number, pick, 0, writes, ())
            self.snapshot(number, {}, 0, {}, False, ())
            self.look_again()
        self.delete(number, [pick], False, ())
        self.look_again()
        self.delete(number, [MOST - 1], False, ())

    @rule(
        host=VOLUMES, number=VOLUMES, hours=st.sampled_from((0, 2, 30, 100)), faults=troubles(COMMITTING),
        unknown=st.sampled_from((False, False, False, True)),
    )  # fmt: skip
    def sweep(self, host: int, number: int, hours: int, faults: Any, unknown: bool = False) -> None:
        self.world.pass_time(hours * HOUR)
        self.sweep_at(self.hosts[host], self.volumes[number], faults, unknown)

    @rule(number=VOLUMES, host=VOLUMES, moved=st.booleans(), faults=troubles(ADOPTING))
    def adopt(self, number: int, host: int, moved: bool, faults: Any) -> None:
        """The volume moves to another host, with its image or as restored there."""
        volume = self.volumes[number]
        if volume.exists:
            done = self.adopt_at(self.hosts[host], volume, faults).done
            self.look_again()
            if done and not moved:
                self.restore(number, MOST - 1, host, {}, ())

    def figures(self, number: int, pick: int) -> None:
        """What a dry run tells of a delete is what it and the sweep after it then do."""
        volume = self.volumes[number]
        host = self.owner(volume)
        if not volume.visible or host is None or not self.sure(volume):
            return
        self.account.settled()
        self.quiet_sweep(host, volume)
        self.quiet_sweep(host, volume)
        snapshot = f"{volume.name}@{volume.visible[pick % len(volume.visible)]}"
        before = self.world.objects(volume.name)
        dry = self.run(host, "dry run", volume, lambda r: r.delete([snapshot], dry_run=True), ()).value
        assert self.world.objects(volume.name) == before, "a dry run changed something"
        wet = self.remove(host, volume, (snapshot.partition("@")[2],), ()).value
        self.quiet_sweep(host, volume)
        after = self.world.objects(volume.name)
        assert dry == wet, "the dry run told other figures than the delete"
        freed = sum(len(d) for n, d in before.items() if "/catalog/" not in n)
        freed -= sum(len(d) for n, d in after.items() if "/catalog/" not in n)
        why = (
            {n: len(before[n]) for n in before.keys() - after.keys()},
            {n: len(after[n]) for n in after.keys() - before.keys()},
        )
        assert dry[0].bytes_freed == freed, (
            f"the delete freed {freed} bytes and told {dry[0].bytes_freed}: {why}"
        )

    def quiet_sweep(self, host: Host, volume: Volume) -> None:
        self.world.pass_time(2 * DAY)
        self.account.catch_up()
        self.sweep_at(host, volume, (), unknown=True)

    def everyone_looks(self, host: int) -> None:
        """A host with caches, which settles what it left, sees what one without them sees."""
        for volume in self.volumes:
            if volume.exists:
                outcome = self.run(
                    self.hosts[host], "list", volume, lambda r, v=volume: r.snapshots(v.name), ()
                )
                shown = {row.snapshot for row in outcome.value}
                assert shown == set(self.world.reader(volume.name).state.live), "a host sees other snapshots"

    @rule(what=st.sampled_from(WEATHER), number=VOLUMES, node=st.sampled_from(NODES))
    def weather(self, what: str, number: int, node: int) -> None:
        """What happens without anybody's command."""
        COUNTS[what] += 1
        self.everything = True
        root = self.hosts[number].root
        if what == "a host looks":
            self.everyone_looks(number)
        elif what == "state lost":
            shutil.rmtree(root)
            root.mkdir()
        elif what == CLONED:
            self.clone(number)
        elif what == KEPT:
            self.keep_or_put_back(number)
        elif what == "caches lost":
            for folder in root.glob("*/*/cache"):
                shutil.rmtree(folder)
        elif what in TIMES:
            self.world.pass_time(TIMES[what])
        elif what == "late PUTs land":
            self.account.land(1 + node)
        elif what == "replication":
            self.account.replicate()
        elif what == LOST_STOP:
            self.lose_stops(self.volumes[number])
        elif what == STRANGER:
            self.strangers.add(self.account.plant(f"{PREFIX}/{self.volumes[number].name}/packs"))
        elif self.account.down:  # a node comes back with what it had
            self.account.down.clear()
        elif not self.account.thin():
            self.account.down.add(node)

    def clone(self, number: int) -> None:
        """The other host becomes a copy of this one, but for what the machine itself is."""
        twin = self.hosts[1 - number]
        shutil.rmtree(twin.root)
        shutil.copytree(self.hosts[number].root, twin.root)
        assert twin.state.writer != self.hosts[number].state.writer, "two hosts write as one"

    def keep_or_put_back(self, number: int) -> None:
        """The host's local state is kept elsewhere; the next time the host gets it back."""
        root, kept = self.hosts[number].root, self.world.folder / f"kept{number}"
        if number not in self.kept:
            shutil.copytree(root, kept)
            self.kept[number] = [[replace(one, id=None) for one in each.doubts] for each in self.volumes]
            return
        if not self.refusing:  # nothing of what comes later may be under way
            self.account.land(len(self.account.late))
            self.world.pass_time(HOUR)
        shutil.rmtree(root)
        kept.rename(root)
        for volume, doubts in zip(self.volumes, self.kept.pop(number), strict=True):
            volume.doubts += doubts
        self.aged.add(number)

    def lose_stops(self, volume: Volume) -> None:
        """The store loses the stops of epochs that another has followed."""
        for epoch in range(self.world.reader(volume.name).epoch if volume.exists else 0):
            if self.holds(catalog_name(volume.name, epoch + 1, 0)):
                self.account.lose(f"{PREFIX}/{stop_name(volume.name, epoch)}")

    @rule(
        number=VOLUMES, stranger=st.booleans(), verb=st.sampled_from(CHANGING),
        what=st.sampled_from((PUT_BACK, PUT_BACK, RECORD_LOST, MANIFESTS_LOST)),
    )  # fmt: skip
    def put_back(self, number: int, stranger: bool, verb: str, what: str) -> None:
        """For a moment the repository is older than what a host knows of it: that host changes nothing."""
        volume, world = self.volumes[number], self.world
        owner = self.owner(volume)
        if owner is None or not volume.exists or not self.sure(volume):
            return
        if what == PUT_BACK and not self.copy:
            return
        host = self.hosts[1 - owner.number] if stranger and verb == "adopt" else owner
        lineage = world.reader(volume.name)
        newest = lineage.current_record_names[-1]
        known = (world.files(host, volume.name) / "cache" / newest.partition("/")[2]).exists()
        kept = self.account.keep()
        if what == PUT_BACK:
            self.account.put_back(self.copy)
        elif what == RECORD_LOST:
            self.account.lose(f"{PREFIX}/{newest}")
        else:
            for row in lineage.state.live.values():
                self.account.lose(f"{PREFIX}/{lineage.manifest_name(row)}")
        gone = not self.holds(newest) and known
        if what == MANIFESTS_LOST:
            gone = verb == "snapshot" and bool(lineage.state.live)
        if gone and (verb != "delete" or volume.visible):
            before = world.objects(volume.name)
            refused = self.refuses(host, volume, verb)
            assert world.objects(volume.name) == before, f"{verb} changed something although {what}"
            assert refused, f"{verb} went well although {what}"
            COUNTS[what] += 1
        self.account.put_back(kept)
        self.everything = True
        if self.copy is None or what != PUT_BACK:
            self.copy = kept

    def refuses(self, host: Host, volume: Volume, verb: str) -> bool:
        """Whether a command ends with damage. A sweep is of this volume alone: the other is as old."""
        commands: dict[str, Any] = {
            "snapshot": lambda r: r.snapshot(volume.path, volume=volume.name),
            "delete": lambda r: r.delete([f"{volume.name}@{volume.visible[0]}"]),
            "sweep": lambda r: sweep(r.existing_lineage(volume.name), r.store.grace, False, False, silent),
            "adopt": lambda r: r.adopt(volume.name),
        }
        try:
            self.world.run(host, commands[verb], [])
        except DamagedError:
            return True
        return False

    # What must be true.

    @invariant()
    def look_again(self) -> None:
        if self.world is not None:
            assert self.account.youngest >= SwiftStore.grace, "an object went before the grace was over"
            for volume in self.volumes:
                changes = self.account.changes[volume.name]
                if self.everything or volume.changes != changes:
                    self.look(volume)
                    volume.changes = changes
            self.everything = False

    def look(self, volume: Volume) -> None:
        """Compare the catalog, and every byte of every live snapshot, with the model."""
        lineage = self.world.reader(volume.name)
        live = dict(lineage.state.live) if lineage.exists else {}
        assert lineage.exists or not volume.exists, "the lineage is gone"
        returned = volume.gone & live.keys()
        assert not returned, f"deleted snapshots came back: {returned}"
        loose = {snapshot for doubt in volume.doubts for snapshot in doubt.deleted} | set(volume.seen)
        lost = volume.certain.keys() - live.keys() - loose
        assert not lost, f"snapshots that were reported as taken are gone: {lost}"
        packs = PackReader(lineage)
        for snapshot, row in live.items():
            names = object_names(self.world, lineage, row)
            if volume.proved.get(snapshot) == names and all(map(self.holds, names)):
                continue
            blocks = restored(self.world, lineage, row, packs)
            if snapshot not in volume.certain and snapshot not in volume.seen:
                self.recognize(volume, snapshot, blocks)
            assert is_content(blocks, volume.content(snapshot)), f"{snapshot} restores other bytes"
            volume.proved[snapshot] = names
        volume.exists = lineage.exists
        volume.owner = lineage.owner if lineage.exists else ""
        volume.stopped = lineage.is_stopped()
        if not self.in_doubt(volume):
            known = volume.certain | volume.seen
            volume.gone |= known.keys() - live.keys()
            volume.certain = {snapshot: known[snapshot] for snapshot in live}
            volume.seen.clear()
            volume.doubts.clear()
        volume.visible = tuple(live)

    def holds(self, name: str) -> bool:
        return self.account.holds(f"{PREFIX}/{name}")

    def in_doubt(self, volume: Volume) -> bool:
        """Whether outcomes may still change: until hosts have settled what they left.

        A host that lost its state cannot settle. What it sent may arrive until another epoch has begun.
        """
        writers = {host.state.writer for host in self.hosts}
        lost = any(doubt.writer == volume.owner not in writers for doubt in volume.doubts)
        return self.world.pending(volume.name) or (lost and self.world.under_way(volume.name))

    def recognize(self, volume: Volume, snapshot: str, blocks: Any) -> None:
        """A snapshot that no command reported must be one in doubt."""
        for doubt in volume.doubts:
            if doubt.content is not None and doubt.id is None and is_content(blocks, doubt.content):
                doubt.id = snapshot
                volume.seen[snapshot] = doubt.content
                return
        raise AssertionError(f"snapshot {snapshot} is none that was ever taken")

    def end(self) -> None:
        """Everything heals, days pass, the owners sweep: then nothing may be there that is not needed."""
        self.account.settled()
        if not self.refusing:
            self.world.pass_time(2 * HOUR)  # claims that are left over count no more
        for host in range(2):
            self.everyone_looks(host)
        self.everything = True
        self.look_again()
        for volume in self.volumes:
            if volume.exists and self.owner(volume) is None:
                assert self.adopt_at(self.hosts[0], volume, ()).done
        self.everything = True
        self.look_again()
        for _ in range(2):
            for host in self.hosts:
                self.quiet_sweep(host, self.volumes[0])
        self.everything = True
        for volume in self.volumes:
            volume.proved.clear()
        self.look_again()
        for volume in self.volumes:
            if volume.exists:  # a first record that never arrived waits for the host's next snapshot
                assert not self.world.pending(volume.name)
                balanced(self.world, volume.name)


class GatewayMachine(Machine):
    """The same where the store refuses no PUT. Both hosts may begin a volume that is not there yet."""

    refusing = False
