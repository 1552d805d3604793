"""Snapshots of a running libvirt guest: its disks at one moment, each a snapshot of a volume of its own.

One QMP transaction takes all pins, while the guest's file systems are frozen where that can be done. Then the
guest goes on, and the disks are stored one by one. What belongs together has one `group` in the manifests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

from island_fast.errors import IslandError, RefusedError, UsageError
from island_fast.images.backing import Backing
from island_fast.images.qcow2_source import Qcow2Source
from island_fast.images.source import Source
from island_fast.operations.heal import mend_known
from island_fast.operations.snapshot import Member, Pinned, Request, take_together
from island_fast.progress import Progress
from island_fast.qemu.freeze import FREEZES, FreezeResult, run_while_frozen
from island_fast.qemu.libvirt import Disk, Domain
from island_fast.repository.health import knows_damage
from island_fast.repository.lineage import Lineage
from island_fast.repository.open import OpenRepository
from island_fast.results import DiskTaken, DomainTaken
from island_fast.results_base import SnapshotTaken

__all__ = ["Wish", "take_domain"]

Choice = Callable[[Source, str | None], Lineage]
"""The lineage of a source, refreshed, where `volume` may name it: see `Repository.snapshot`."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for: see `Repository.snapshot_domain`."""

    domain: str
    disks: Sequence[str]
    freeze: str
    connect: str | None
    volume: str | None
    label: str
    full: bool
    compress: bool


@dataclass(frozen=True, slots=True)
class _Found:
    """A disk that is held, and the lineage that its snapshot goes to."""

    disk: Disk
    source: Qcow2Source
    lineage: Lineage


def take_domain(
    repository: OpenRepository, lineage_for: Choice, wish: Wish, progress: Progress
) -> DomainTaken:
    """Take the snapshots. If some disks cannot be stored, the others are; an error only if none is.

    `repository.left_out` tells afterwards which disks are missing and why, and of a guest that may still be
    frozen.
    """
    repository.left_out = []
    if wish.freeze not in FREEZES:
        raise UsageError(f"{wish.freeze!r} is no way to freeze; use auto, require or never")
    with ExitStack() as stack:
        guest = stack.enter_context(Domain(wish.domain, wish.connect))
        disks = guest.find_disks(wish.disks)
        if wish.volume and len(disks) > 1:
            raise UsageError(
                f"--volume names one volume, and {guest.who} has the disks {_names(disks)}; choose one "
                "with --disk"
            )
        failures = _Failures(guest, disks)
        found: list[_Found] = []
        for disk in disks:
            with failures.of(disk):
                found.append(_found(stack, guest, disk, lineage_for, wish.volume))
        _refuse_shared(found)
        failures.raise_if_all()
        ready: list[_Found] = []
        for one in found:
            with failures.of(one.disk):
                if knows_damage(one.lineage):
                    mend_known(one.lineage, one.source, repository.state.writer, progress)
                ready.append(one)
        group = os.urandom(16).hex() if len(disks) > 1 else None
        members = [
            Member(one.lineage, one.source, _request(repository, wish, one.disk, disks, group))
            for one in ready
        ]
        pinning = _Pinning(guest, [one.source for one in ready], wish.freeze)
        outcomes = take_together(members, pinning, progress)
    taken: list[DiskTaken] = []
    for one, outcome in zip(ready, outcomes, strict=True):
        with failures.of(one.disk):
            taken.append(_answer(one.disk, outcome))
    failures.raise_if_all()
    moment = pinning.moment
    repository.left_out = failures.errors
    if moment.stuck:
        repository.left_out.append(IslandError(moment.stuck))  # last: the exit code is its
    return DomainTaken(guest.name, group, moment.consistency, moment.reason, tuple(taken))


class _Pinning:
    """Takes the pins of all disks; `moment` is how the guest was then."""

    moment: FreezeResult

    def __init__(self, guest: Domain, sources: Sequence[Qcow2Source], freeze: str) -> None:
        self._guest = guest
        self._sources = sources
        self._freeze = freeze
        self._created = 0

    def __call__(self, names: Sequence[str | None]) -> Pinned:
        pins = [(source.node, name) for source, name in zip(self._sources, names, strict=True) if name]

        def pin() -> None:
            self._created = time.time_ns()  # a freeze may have taken a minute
            self._guest.snapshot_create_all(pins)

        self.moment = run_while_frozen(self._guest, self._freeze, pin)
        return Pinned(self._created, {"consistency": self.moment.consistency})


def _found(stack: ExitStack, guest: Domain, disk: Disk, lineage_for: Choice, volume: str | None) -> _Found:
    source = _held(stack, guest, disk)
    return _Found(disk, source, lineage_for(source, volume))


def _held(stack: ExitStack, guest: Domain, disk: Disk) -> Qcow2Source:
    backing = [Backing.parse(text) for text in disk.backing]
    return stack.enter_context(Qcow2Source(disk.image, monitor=guest, backing=backing))


def _refuse_shared(found: Sequence[_Found]) -> None:
    """Two new images of one name, in two folders, would go to one volume."""
    seen: dict[str, Disk] = {}
    for one in found:
        disk, lineage = one.disk, one.lineage
        other = seen.setdefault(lineage.name, disk)
        if other is not disk:
            raise RefusedError(
                f"disks {other.name} and {disk.name} would both be volume {lineage.name}; take the first "
                f"snapshot of one with --disk {disk.name} --volume and another name"
            )


def _request(
    repository: OpenRepository, wish: Wish, disk: Disk, disks: Sequence[Disk], group: str | None
) -> Request:
    return Request(
        repository.id,
        repository.state.writer,
        wish.label,
        full=wish.full,
        compress=wish.compress,
        properties={
            "libvirt.domain": wish.domain,
            "libvirt.disk": disk.name,
            "libvirt.disks": " ".join(one.name for one in disks),
        },
        group=group,
    )


def _answer(disk: Disk, outcome: SnapshotTaken | IslandError | OSError) -> DiskTaken:
    if isinstance(outcome, SnapshotTaken):
        return DiskTaken(**asdict(outcome), disk=disk.name, image=str(disk.image))
    raise outcome


class _Failures:
    """Why some disks of a guest are not stored; `errors`, each named after its disk."""

    def __init__(self, guest: Domain, disks: Sequence[Disk]) -> None:
        self._guest = guest
        self._disks = disks
        self.errors: list[IslandError] = []

    @contextmanager
    def of(self, disk: Disk) -> Iterator[None]:
        """Note what fails in the body, and go on behind it."""
        try:
            yield
        except (IslandError, OSError) as error:
            kind = type(error) if isinstance(error, IslandError) else IslandError
            made = kind(f"disk {disk.name} of {self._guest.who} is not stored: {self._said(disk, error)}")
            made.__cause__ = error
            self.errors.append(made)

    def raise_if_all(self) -> None:
        """One error, of the last one's kind, that says what all say, if no disk is left."""
        if len(self.errors) == len(self._disks):
            raise type(self.errors[-1])("; ".join(map(str, self.errors))) from self.errors[-1]

    def _said(self, disk: Disk, error: IslandError | OSError) -> str:
        said = str(error)
        if isinstance(error, OSError) and error.strerror:
            said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        if "--volume" in said and len(self._disks) > 1:
            others = " ".join(f"--disk {one.name}" for one in self._disks if one is not disk)
            said += f"; --volume needs --disk {disk.name} alone, or leave it out with {others}"
        return said


def _names(disks: Sequence[Disk]) -> str:
    return ", ".join(disk.name for disk in disks)
