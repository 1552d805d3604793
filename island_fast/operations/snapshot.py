"""Taking a snapshot: pin, find the change, send it, commit, drop the old pin.

The order is the protocol: the registration before the first object, packs before the manifest, the manifest
before the record, the old pin dropped only after it. A failure before the record leaves the image as it was,
and packs that the next attempt keeps or a sweep removes; what a crash leaves at each step is in
docs/reliability.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np

from island_fast import __version__
from island_fast.arrays import Int64s
from island_fast.dirtymap import DirtyMap, intersect_intervals, merge_intervals, subtract_intervals
from island_fast.errors import IslandError
from island_fast.formats.catalog import Record
from island_fast.formats.manifest import Manifest, build_pack_table
from island_fast.formats.runs import Runs
from island_fast.images.pins import pin_name
from island_fast.images.source import Change, Source, View
from island_fast.operations.parent import Request, Start, choose
from island_fast.progress import Progress
from island_fast.qcow2.snapshots import InternalSnapshot, PinnedBase
from island_fast.repository.health import Health, knows_damage
from island_fast.repository.lineage import Lineage
from island_fast.repository.local_state import Registration
from island_fast.repository.snapshot_writer import Stored, Storing, find_interrupted
from island_fast.repository.streams import send_blocks
from island_fast.results_base import SnapshotTaken

__all__ = ["Member", "Pinned", "Request", "resent", "take", "take_together"]


def take(
    lineage: Lineage,
    source: Source,
    request: Request,
    progress: Progress,
) -> SnapshotTaken:
    """Take a snapshot of `source` into `lineage`, which was refreshed and accepts this image.

    An attempt that was interrupted is gone on with: its id is this one's, and what it sent is not sent again.
    On an error nothing is visible in the repository, and the image keeps the pins that it had.
    """
    return _Taking(lineage, source, request, progress).run()


@dataclass(frozen=True, slots=True)
class Member:
    """One of several volumes that are snapshotted at one moment: see `take`. Its image can be pinned."""

    lineage: Lineage
    source: Source
    request: Request


@dataclass(frozen=True, slots=True)
class Pinned:
    """The moment when pins were taken: nanoseconds since 1970, and what properties tell of it."""

    created: int
    facts: Mapping[str, str]


Pins = Callable[[Sequence[str | None]], Pinned]
"""Takes the pins of these names, one for each member; None for one that is left out."""


def take_together(
    members: Sequence[Member], pin: Pins, progress: Progress
) -> list[SnapshotTaken | IslandError | OSError]:
    """Take snapshots of several volumes at the moment when `pin` takes their pins, then store one by one.

    Each is as whole as if it were alone: one that fails takes its pin with it, is an error in the answer, and
    keeps none of the others from being stored. One that fails before gets no pin; `pin` is not called if
    none is left. What `pin` raises, and interruptions, undo all that are not stored yet.
    """
    with ExitStack() as all_of_them:
        begun = [_begun(one, all_of_them, progress) for one in members]
        names = [one.name if isinstance(one, _Begun) else None for one in begun]
        moment = pin(names) if any(names) else Pinned(0, {})
        return [_ended(one, moment) if isinstance(one, _Begun) else one for one in begun]


@dataclass(frozen=True, slots=True)
class _Begun:
    """One that waits for its pin `name`; `stack` undoes it."""

    taking: _Taking
    stack: ExitStack
    name: str


def _begun(member: Member, all_of_them: ExitStack, progress: Progress) -> _Begun | IslandError | OSError:
    taking = _Taking(member.lineage, member.source, member.request, progress)
    try:
        with ExitStack() as stack:
            name = taking.begin(stack)
            return _Begun(taking, all_of_them.enter_context(stack.pop_all()), name)
    except (IslandError, OSError) as error:
        return error


def _ended(one: _Begun, moment: Pinned) -> SnapshotTaken | IslandError | OSError:
    try:
        return one.taking.end(one.stack, one.name, moment)
    except (IslandError, OSError) as error:
        return error


def new_id() -> str:
    """A snapshot id that nobody has used."""
    return os.urandom(16).hex()


class _Taking:
    """One snapshot being taken. `_begin` sets `_id`, `_start` (from what) and `_registration`."""

    _start: Start
    _registration: Registration
    _storing: Storing

    def __init__(
        self,
        lineage: Lineage,
        source: Source,
        request: Request,
        progress: Progress,
    ) -> None:
        self._lineage = lineage
        self._source = source
        self._request = request
        self._progress = progress
        self._committing = False

    @property
    def _id(self) -> str:
        return self._registration.snapshot

    def run(self) -> SnapshotTaken:
        began = time.monotonic()
        created = time.time_ns()
        with ExitStack() as stack:
            self._begin(stack)
            internal = self._internal(stack)
            taken = self._store(internal, created)
        notes = self._drop_old_pins(internal)
        return replace(taken, seconds=time.monotonic() - began, notes=notes)

    # The same in two steps, with the pin taken between them by the caller.

    def begin(self, stack: ExitStack) -> str:
        """Do all that comes before the pin, and return its name; `stack` undoes it."""
        self._begin(stack)
        return self._expect_pin(stack)

    def end(self, stack: ExitStack, name: str, moment: Pinned) -> SnapshotTaken:
        """Store the pin `name`, which somebody else took. Leaves `stack`."""
        began = time.monotonic()
        properties = dict(self._request.properties) | dict(moment.facts)
        self._request = replace(self._request, properties=properties)
        with stack:
            self._source.reload()
            internal = self._source.find_named(name)
            taken = self._store(internal, moment.created)
        notes = self._drop_old_pins(internal)
        return replace(taken, seconds=time.monotonic() - began, notes=notes)

    def _store(self, internal: InternalSnapshot | None, created: int) -> SnapshotTaken:
        """Find the change, send it and commit."""
        view = self._source.view(internal)
        change = self._source.find_change(view, self._start.base, self._start.why_not, self._progress)
        parent, storing = self._parent_runs(), self._storing
        change, whole = resent(self._lineage, change, parent)
        sent = send_blocks(
            view.read, change.data, storing.known(whole), storing.sink(), self._progress,
            compress=self._request.compress,
        )  # fmt: skip
        stored = storing.stored(sent, parent, change.replaced)
        replaced = subtract_intervals(change.replaced, sent.same.runs())
        pin = internal.identity if internal else self._would_be_pin(created, view)
        manifest = self._manifest(change, stored.runs, pin, view, created)
        row = storing.commit(manifest, stored.packs, stored.dead, self._last_word)
        return SnapshotTaken(
            snapshot=row.id,
            lineage=self._lineage.name,
            parent=row.parent,
            volume=self._lineage.name,
            label=row.label,
            volume_size=row.volume_size,
            rule=change.rule,
            reason=change.reason,
            blocks_candidate=change.candidates.count(),
            blocks_changed=_changed(stored, parent, replaced, view.blocks),
            blocks_kept=sent.kept.count(),
            bytes_read=view.bytes_read,
            bytes_stored=row.stored + row.manifest_size,
            objects_written=self._storing.objects,
            attempt=row.attempt,
            seconds=0.0,
        )

    # From what.

    def _begin(self, stack: ExitStack) -> None:
        """Make the lineage if it is new, choose parent and base, and register before the first object."""
        lineage, request = self._lineage, self._request
        with lineage.locked():
            made = not lineage.exists
            if made:
                lineage.create(request.writer)
            lineage.require_owner(request.writer)
            lineage.files.set_image(self._source.path)
            before = find_interrupted(lineage)
            self._start = choose(lineage, self._source, request)
            parent = self._start.parent.id if self._start.parent else None
            snapshot, attempt = (before.snapshot, before.attempt + 1) if before else (new_id(), 0)
            self._registration = Registration(snapshot, attempt, parent, lineage.epoch)
            stack.enter_context(lineage.files.register(self._registration))
        self._storing = Storing(lineage, self._registration, request.writer)
        self._storing.objects += made

    # The image.

    def _internal(self, stack: ExitStack) -> InternalSnapshot | None:
        """The internal snapshot to store: a given one, a new pin, or None for the image as it is."""
        if self._request.at is not None:
            return self._source.find_named(self._request.at)
        if not self._request.pin or self._source.reason_not_pinnable:
            return None
        return self._source.pin(self._expect_pin(stack))

    def _expect_pin(self, stack: ExitStack) -> str:
        """Make way for the pin, and have it dropped on an error; returns its name."""
        name = self._pin_name
        if self._registration.attempt:
            self._source.discard_pin(name)  # the one of the attempt that was interrupted
        stack.enter_context(self._unpinned_on_error(name))
        return name

    @property
    def _pin_name(self) -> str:
        return pin_name(self._request.repository, self._lineage.name, self._id)

    @contextmanager
    def _unpinned_on_error(self, name: str) -> Iterator[None]:
        """Drop the new pin if the body fails, or is interrupted, before the record could be written."""
        try:
            yield
        except BaseException:
            if not self._committing:
                with suppress(IslandError, OSError):
                    self._source.discard_pin(name)
            raise

    def _would_be_pin(self, created: int, view: View) -> PinnedBase:
        """The identity that the pin of a restored image gets when this image keeps none."""
        return PinnedBase(self._pin_name, "1", created // 10**9, created % 10**9, view.volume_size)

    def _drop_old_pins(self, internal: InternalSnapshot | None) -> tuple[str, ...]:
        """Drop every pin of the lineage but the new one; what cannot be dropped is told, and no error."""
        if internal is None or self._request.at is not None:
            return ()
        notes = []
        for old in self._source.pins(self._request.repository, self._lineage.name):
            if old.identity != internal.identity:
                try:
                    self._source.unpin(old)
                except IslandError as error:
                    notes.append(f"the old pin {old.name} stays until the next snapshot: {error}")
        if not notes:
            self._lineage.files.forget_retired()
        return tuple(notes)

    # What is stored.

    def _parent_runs(self) -> Runs:
        parent = self._start.parent
        return self._lineage.manifest(parent).runs_by_key(self._lineage.numbers) if parent else Runs.empty()

    def _manifest(self, change: Change, runs: Runs, pin: PinnedBase, view: View, created: int) -> Manifest:
        table, runs = build_pack_table(runs, self._lineage.name, self._lineage.numbers)
        facts = {
            "tool": f"island {__version__}",
            "host": os.uname().nodename,
            "consistency": "crash",
            **self._source.facts,
        }
        return Manifest(
            lineage=self._lineage.name,
            snapshot=self._id,
            attempt=self._registration.attempt,
            parent=self._registration.parent,
            group=self._request.group,
            volume_size=view.volume_size,
            created=created,
            label=self._request.label,
            rule=change.rule,
            reason=change.reason,
            seed=self._lineage.seed,
            pin=pin,
            packs=table,
            runs=runs,
            properties=facts | dict(self._request.properties),
        )

    def _last_word(self, record: Record) -> Record:
        self._progress("commit", 0, 0)
        self._committing = True
        return record


def _changed(stored: Stored, parent: Runs, replaced: Int64s, blocks: int) -> int:
    """How many of the volume's blocks differ from the parent's; `replaced` are those not inherited."""
    gone = subtract_intervals(
        intersect_intervals(replaced, np.array([[0, blocks]])), stored.fresh.intervals()
    )
    return stored.fresh.blocks + sum(part.within(gone).blocks for part in parent.windows())


def resent(lineage: Lineage, change: Change, parent: Runs) -> tuple[Change, Runs]:
    """`change` with the blocks that the parent has lost, as this host knows, and what of `parent` is proof.

    Such blocks are read from the image and sent again, whatever they hold: an entry that points to a lost
    block is not inherited. `parent` holds pack keys.
    """
    if not knows_damage(lineage):
        return change, parent
    gone = parent.among(Health(lineage).lost()).intervals()
    here = DirtyMap.from_runs(change.candidates.blocks, np.minimum(gone, change.candidates.blocks))
    again = replace(
        change,
        candidates=change.candidates | here,
        data=change.data | here,
        replaced=merge_intervals(np.concatenate([change.replaced, gone])),
    )
    return again, parent.within(subtract_intervals(parent.intervals(), gone))
