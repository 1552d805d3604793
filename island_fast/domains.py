"""Snapshots of a running libvirt guest: its disks at one moment, each a snapshot of a volume of its own.

One QMP transaction takes all pins, while the guest's file systems are frozen where that can be done. Then the
guest goes on, and the disks are stored one by one. What belongs together has one `group` in the manifests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from island_fast.answer import SnapshotTaken
from island_fast.errors import IslandError, RefusedError, UsageError
from island_fast.healing import mend_known
from island_fast.health import knows_damage
from island_fast.host.freezing import FREEZES, Moment, at_one_moment
from island_fast.host.libvirt import Disk, Domain
from island_fast.lineage import Lineage
from island_fast.opening import OpenRepository
from island_fast.progress import Progress
from island_fast.results import DiskTaken, DomainTaken
from island_fast.source import Backing, Qcow2Source, Source
from island_fast.taking import Member, Request, take_together

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


def take_domain(
    repository: OpenRepository, lineage_for: Choice, wish: Wish, progress: Progress
) -> DomainTaken:
    """Take the snapshots. If some disks cannot be stored, the others are, and an error tells which.

    `repository.left_out` tells afterwards of a guest that may still be frozen.
    """
    if wish.freeze not in FREEZES:
        raise UsageError(f"{wish.freeze!r} is no way to freeze; use auto, require or never")
    with ExitStack() as stack:
        guest = stack.enter_context(Domain(wish.domain, wish.connect))
        disks = guest.disks(wish.disks)
        if wish.volume and len(disks) > 1:
            raise UsageError(
                f"--volume names one volume, and {guest.who} has the disks {_names(disks)}; choose one "
                "with --disk"
            )
        sources = [_held(stack, guest, disk) for disk in disks]
        lineages = [lineage_for(source, wish.volume) for source in sources]
        _refuse_shared(disks, lineages)
        group = os.urandom(16).hex() if len(disks) > 1 else None
        members = [
            Member(lineage, source, _request(repository, wish, disk, disks, group))
            for disk, source, lineage in zip(disks, sources, lineages, strict=True)
        ]
        for one in members:
            if knows_damage(one.lineage):
                mend_known(one.lineage, one.source, repository.state.writer, progress)
        pinning = _Pinning(guest, sources, wish.freeze)
        outcomes = take_together(members, pinning, progress)
    repository.left_out = [IslandError(pinning.moment.stuck)] if pinning.moment.stuck else []
    return _answer(guest, group, pinning.moment, disks, outcomes)


class _Pinning:
    """Takes the pins of all disks; `moment` is how the guest was then."""

    moment: Moment

    def __init__(self, guest: Domain, sources: Sequence[Qcow2Source], freeze: str) -> None:
        self._guest = guest
        self._sources = sources
        self._freeze = freeze

    def __call__(self, names: Sequence[str]) -> Mapping[str, str]:
        pins = [(source.node, name) for source, name in zip(self._sources, names, strict=True)]
        self.moment = at_one_moment(self._guest, self._freeze, lambda: self._guest.snapshot_create_all(pins))
        for source in self._sources:
            source.reload()
        return {"consistency": self.moment.consistency}


def _held(stack: ExitStack, guest: Domain, disk: Disk) -> Qcow2Source:
    backing = [Backing.parse(text) for text in disk.backing]
    return stack.enter_context(Qcow2Source(disk.image, monitor=guest, backing=backing))


def _refuse_shared(disks: Sequence[Disk], lineages: Sequence[Lineage]) -> None:
    """Two new images of one name, in two folders, would go to one volume."""
    seen: dict[str, Disk] = {}
    for disk, lineage in zip(disks, lineages, strict=True):
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


def _answer(
    guest: Domain,
    group: str | None,
    moment: Moment,
    disks: Sequence[Disk],
    outcomes: Sequence[SnapshotTaken | IslandError | OSError],
) -> DomainTaken:
    taken, failed = [], []
    for disk, outcome in zip(disks, outcomes, strict=True):
        if isinstance(outcome, SnapshotTaken):
            taken.append(DiskTaken(**asdict(outcome), disk=disk.name, image=str(disk.image)))
        else:
            failed.append((disk, outcome))
    if failed:
        raise _failure(guest, [one.disk for one in taken], failed)
    return DomainTaken(guest.name, group, moment.consistency, moment.reason, tuple(taken))


def _failure(
    guest: Domain, stored: Sequence[str], failed: Sequence[tuple[Disk, IslandError | OSError]]
) -> IslandError:
    """The first error, of its kind, with which disks were stored in front of it."""
    error = failed[0][1]
    said = str(error) if isinstance(error, IslandError) else (error.strerror or str(error))
    missing = _names([disk for disk, _ in failed])
    kind = type(error) if isinstance(error, IslandError) else IslandError
    there = f"{', '.join(stored)} stored, " if stored else ""
    return kind(f"of the disks of {guest.who}, {there}{missing} not stored: {said}")


def _names(disks: Sequence[Disk]) -> str:
    return ", ".join(disk.name for disk in disks)
