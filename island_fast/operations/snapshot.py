"""`snapshot`: pin, find what changed, send it, commit, drop the old pin.

The order is the protocol: the registration is written before the first object, packs before the manifest, the
manifest before the record, and the old pin is dropped only after the record. A failure before the record
leaves the image as it was, and packs that the next attempt keeps or a sweep removes. docs/reliability.md says
what a crash leaves at each step.
"""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np

from island_fast import __version__
from island_fast.arrays import Int64s
from island_fast.dirtymap import DirtyMap, intersect_intervals, merge_intervals, subtract_intervals
from island_fast.errors import IslandError, StoreRefusedError
from island_fast.formats.catalog import SnapshotAdded, SnapshotRow
from island_fast.formats.manifest import Manifest, build_pack_table
from island_fast.formats.runs import Runs
from island_fast.images.pins import pin_name
from island_fast.images.source import TABLE_DIFF, Change, Source, View
from island_fast.operations.image_of_volume import accept_image, describe_image
from island_fast.operations.parent import ParentChoice, SnapshotRequest, choose_parent
from island_fast.operations.sample import compare_sample
from island_fast.progress import Progress
from island_fast.qcow2.snapshots import InternalSnapshot, PinnedBase
from island_fast.repository.clock import read_clock
from island_fast.repository.health import Health, has_known_damage
from island_fast.repository.lineage import Lineage
from island_fast.repository.local_state import Registration
from island_fast.repository.snapshot_writer import (
    SnapshotWriter,
    StoredSnapshot,
    find_interrupted,
    next_attempt,
)
from island_fast.repository.streams import send_blocks
from island_fast.results_base import SnapshotTaken

__all__ = ["Member", "PinMoment", "SnapshotRequest", "take_snapshot", "take_snapshots"]

_LOG = logging.getLogger(__name__)


def take_snapshot(
    lineage: Lineage,
    source: Source,
    request: SnapshotRequest,
    progress: Progress,
) -> SnapshotTaken:
    """Take a snapshot of `source` into `lineage`, which was refreshed and accepts this image.

    Resume an interrupted attempt, if there is one: keep its id, and do not send again what it sent. After an
    error nothing is visible in the repository, and the image has the pins that it had before.
    """
    return _SnapshotRun(lineage, source, request, progress).run()


@dataclass(frozen=True, slots=True)
class Member:
    """One of several volumes that are snapshotted at one moment; its image can be pinned."""

    lineage: Lineage
    source: Source
    request: SnapshotRequest


@dataclass(frozen=True, slots=True)
class PinMoment:
    """The moment at which pins were taken: nanoseconds since 1970, and what properties record about it."""

    created: int
    facts: Mapping[str, str]


TakePins = Callable[[Sequence[str | None]], PinMoment]
"""Takes the pins with these names, one for each member; None for a member that gets no pin."""


def take_snapshots(
    members: Sequence[Member], take_pins: TakePins, progress: Progress
) -> list[SnapshotTaken | IslandError | OSError]:
    """Take snapshots of several volumes at the moment when `take_pins` takes their pins; store one by one.

    Each snapshot is independent of the others. If one fails, its pin is dropped, its error stands in its
    place in the answer, and the others are stored. One that fails before the pins are taken gets no pin;
    `take_pins` is not called if none is left. If `take_pins` raises, or an interruption comes, everything
    that is not stored yet is undone.
    """
    with ExitStack() as everything:
        prepared = [_try_prepare(one, everything, progress) for one in members]
        names = [one.name if isinstance(one, _Prepared) else None for one in prepared]
        moment = take_pins(names) if any(names) else PinMoment(0, {})
        return [_try_store(one, moment) if isinstance(one, _Prepared) else one for one in prepared]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A snapshot that waits for its pin `name`; leaving `stack` undoes the preparation."""

    run: _SnapshotRun
    stack: ExitStack
    name: str


def _try_prepare(
    member: Member, everything: ExitStack, progress: Progress
) -> _Prepared | IslandError | OSError:
    run = _SnapshotRun(member.lineage, member.source, member.request, progress)
    try:
        with ExitStack() as stack:
            name = run.prepare(stack)
            return _Prepared(run, everything.enter_context(stack.pop_all()), name)
    except (IslandError, OSError) as error:
        return error


def _try_store(one: _Prepared, moment: PinMoment) -> SnapshotTaken | IslandError | OSError:
    try:
        return one.run.store(one.stack, one.name, moment)
    except (IslandError, OSError) as error:
        return error


class _SnapshotRun:
    """One snapshot being taken. `_register` sets `_choice`, `_registration` and `_writer`."""

    _choice: ParentChoice
    _registration: Registration
    _writer: SnapshotWriter

    def __init__(
        self,
        lineage: Lineage,
        source: Source,
        request: SnapshotRequest,
        progress: Progress,
    ) -> None:
        self._lineage = lineage
        self._source = source
        self._request = request
        self._progress = progress
        self._committing = False
        self._sampled = 0
        self._notes: list[str] = []

    @property
    def _id(self) -> str:
        return self._registration.snapshot

    def run(self) -> SnapshotTaken:
        """Take the snapshot, with its pin."""
        began = time.monotonic()
        created = read_clock()
        with ExitStack() as stack:
            self._register(stack)
            internal = self._take_or_find_internal(stack)
            taken = self._send_and_commit(internal, created)
        notes = (*self._notes, *self._drop_old_pins(internal))
        return replace(taken, seconds=time.monotonic() - began, notes=notes)

    # The same in two steps; between them the caller takes the pin.

    def prepare(self, stack: ExitStack) -> str:
        """Do everything that comes before the pin, and return its name; leaving `stack` undoes it."""
        read_clock()  # a wrong one is refused before anything is made
        self._register(stack)
        return self._prepare_pin(stack)

    def store(self, stack: ExitStack, name: str, moment: PinMoment) -> SnapshotTaken:
        """Store the pin `name`, which the caller took. Leaves `stack`."""
        began = time.monotonic()
        properties = dict(self._request.properties) | dict(moment.facts)
        self._request = replace(self._request, properties=properties)
        with stack:
            self._source.reload()
            internal = self._source.find_named(name)
            taken = self._send_and_commit(internal, moment.created)
        notes = (*self._notes, *self._drop_old_pins(internal))
        return replace(taken, seconds=time.monotonic() - began, notes=notes)

    # Before the pin: the registration, the lineage, the parent.

    def _register(self, stack: ExitStack) -> None:
        """Create the lineage if it is new, choose parent and base, and register before the first object."""
        lineage = self._lineage
        with lineage.hold_lock(just_read=True):
            made = not lineage.exists
            if made:
                lineage.create()
            lineage.require_owner()
            if note := accept_image(lineage, self._source):
                self._notes.append(note)
            lineage.require_standing()
            lineage.files.set_image(describe_image(self._source))
            before = find_interrupted(lineage)
            self._choice = choose_parent(lineage, self._source, self._request)
            parent = self._choice.parent.id if self._choice.parent else None
            if self._choice.parent:
                lineage.require_manifest(self._choice.parent)
            snapshot, attempt = (before.snapshot, next_attempt(lineage, before)) if before else (make_id(), 0)
            at = lineage.newest_number
            self._registration = Registration(snapshot, attempt, parent, lineage.epoch, record=at)
            stack.enter_context(lineage.files.registrations.register(self._registration))
        self._writer = SnapshotWriter(lineage, self._registration)
        self._writer.objects += made

    # The pin.

    def _take_or_find_internal(self, stack: ExitStack) -> InternalSnapshot | None:
        """Return the internal snapshot to store: a given one, a new pin, or None for the image as it is."""
        if self._request.at is not None:
            return self._source.find_named(self._request.at)
        if not self._request.pin or self._source.reason_not_pinnable:
            return None
        return self._source.pin(self._prepare_pin(stack))

    def _prepare_pin(self, stack: ExitStack) -> str:
        """Make way for the pin, and have it dropped on an error; return its name."""
        name = self._pin_name
        if self._registration.attempt:
            self._source.discard_pin(name)  # the one of the attempt that was interrupted
        stack.enter_context(self._drop_pin_on_error(name))
        return name

    @property
    def _pin_name(self) -> str:
        return pin_name(self._request.repository, self._lineage.name, self._id)

    @contextmanager
    def _drop_pin_on_error(self, name: str) -> Iterator[None]:
        """Drop the new pin if the body fails, or is interrupted, and the record cannot have been written."""
        try:
            yield
        except BaseException as error:
            if not self._committing or isinstance(error, StoreRefusedError):
                with suppress(IslandError, OSError):
                    self._source.discard_pin(name)
            raise

    def _drop_old_pins(self, internal: InternalSnapshot | None) -> tuple[str, ...]:
        """Drop every pin of the lineage except the new one.

        Return a sentence for each pin that cannot be dropped: the snapshot is stored, so that is not an
        error.
        """
        if self._request.at is not None:
            return ()
        if internal is None:
            left = self._source.pins(self._request.repository, self._lineage.name)
            if not left or self._source.reason_not_pinnable is None:
                return ()
            why, image = self._source.reason_not_pinnable, shlex.quote(str(self._source.path))
            return (
                f"the image still holds the pin {left[-1].name}, which no snapshot can use, because {why}; "
                f"run 'island unpin {image}'",
            )
        notes: list[str] = []
        for old in self._source.pins(self._request.repository, self._lineage.name):
            if old.identity != internal.identity:
                try:
                    self._source.unpin(old)
                except IslandError as error:
                    notes.append(f"the old pin {old.name} stays until the next snapshot: {error}")
        if not notes:
            self._lineage.files.forget_deleted()
        return tuple(notes)

    # What is stored.

    def _send_and_commit(self, internal: InternalSnapshot | None, created: int) -> SnapshotTaken:
        """Find what changed, send it and commit."""
        view = self._source.view(internal)
        parent, writer = self._parent_runs(), self._writer
        if self._request.full and self._choice.parent:
            check_packs(self._lineage, self._choice.parent)
        change = self._find_change(view, parent)
        change, whole = resend_damaged(self._lineage, change, parent)
        sent = send_blocks(
            view.read, change.data, writer.known_blocks(whole), writer.pack_writer(), self._progress,
            compress=self._request.compress,
        )  # fmt: skip
        base = self._choice.base.internal if self._choice.base else None
        self._source.require_unchanged([] if internal is None else [internal, *([base] if base else [])])
        stored = writer.locate_blocks(sent, parent, change.replaced)
        replaced = subtract_intervals(change.replaced, sent.same.runs())
        pin = internal.identity if internal else self._pin_for_restores(created, view)
        manifest = self._manifest(change, stored.runs, pin, view, created)
        row = writer.commit(manifest, stored, self._note_commit)
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
            blocks_changed=_count_changed(stored, parent, replaced, view.blocks),
            blocks_kept=sent.kept.count(),
            blocks_sampled=self._sampled,
            bytes_read=view.bytes_read,
            bytes_stored=row.stored + row.manifest_size,
            objects_written=self._writer.objects,
            attempt=row.attempt,
            seconds=0.0,
        )

    def _find_change(self, view: View, parent: Runs) -> Change:
        """Find what may have changed; test a table diff by a sample, and if it fails, scan in full."""
        change = self._source.find_change(view, self._choice.base, self._choice.why_not, self._progress)
        if change.rule != TABLE_DIFF:
            return change
        lineage, index = self._lineage, self._writer.packs.cached_index
        sample = compare_sample(view, change, parent, index, lineage.seed, self._id)
        self._sampled = sample.blocks
        if sample.differing is None:
            return change
        why = f"block {sample.differing} differs from the parent, which the tables do not show"
        self._notes.append(
            f"{why}: the image was repaired, or written to by something other than qemu, since snapshot "
            f"{self._registration.parent}; everything was read, and this snapshot is complete"
        )
        return self._source.find_change(view, None, why, self._progress)

    def _parent_runs(self) -> Runs:
        """Return the runs of the parent, with pack keys; none without a parent."""
        parent = self._choice.parent
        return self._lineage.manifest(parent).runs_by_key(self._lineage.numbers) if parent else Runs.empty()

    def _manifest(self, change: Change, runs: Runs, pin: PinnedBase, view: View, created: int) -> Manifest:
        table, runs = build_pack_table(runs, self._lineage.name, self._lineage.numbers)
        facts = {
            "tool": f"island {__version__}",
            "host": os.uname().nodename,
            "consistency": "crash",
            **self._source.facts,
        }
        if self._request.at is not None:
            facts["consistency"] = "crash"  # a guest may have been running when that one was taken
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

    def _pin_for_restores(self, created: int, view: View) -> PinnedBase:
        """Return the identity that the pin of a restored image gets if this image keeps none."""
        return PinnedBase(self._pin_name, "1", created // 10**9, created % 10**9, view.volume_size)

    def _note_commit(self, _: SnapshotAdded) -> None:
        """Note that the record is about to be sent: from here on the new pin stays, whatever happens."""
        self._progress("commit", 0, 0)
        self._committing = True


def make_id() -> str:
    """Make a snapshot id that nobody has used."""
    return os.urandom(16).hex()


def _count_changed(stored: StoredSnapshot, parent: Runs, replaced: Int64s, blocks: int) -> int:
    """Count the volume's blocks that differ from the parent's; `replaced` are those not inherited."""
    gone = subtract_intervals(
        intersect_intervals(replaced, np.array([[0, blocks]])), stored.fresh.intervals()
    )
    return stored.fresh.blocks + sum(part.within(gone).blocks for part in parent.windows())


def check_packs(lineage: Lineage, parent: SnapshotRow) -> None:
    """Ask the store for each pack that `parent` needs; note, and log, those that are not there or damaged.

    What only they hold is then not inherited.
    """
    from island_fast.repository.integrity.lineage import LineageCheck  # only a full scan on request needs it

    check = LineageCheck(lineage, [parent], whole=False)
    check.run([item for item in check.items() if item.key is not None], False, lambda item: None)
    for finding in check.findings:
        if finding.key is not None:
            _LOG.warning("%s; what is lost of it is sent again", finding.message)


def resend_damaged(lineage: Lineage, change: Change, parent: Runs) -> tuple[Change, Runs]:
    """Add the blocks that the parent has lost, as far as this host knows, to `change`.

    Return the new change, and the runs of `parent`, which holds pack keys, without the lost blocks. Lost
    blocks are read from the image and sent again, whatever they hold: an entry that points to a lost block
    is not inherited.
    """
    if not has_known_damage(lineage):
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
