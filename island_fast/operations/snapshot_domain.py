"""Snapshots of a running libvirt guest: its disks at one moment, each a snapshot of its own volume.

One QMP transaction takes the pins of all disks, while the guest's file systems are frozen if that is
possible. Then the guest continues, and the disks are stored one by one. Snapshots that were taken together
have the same `group` in their manifests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

from island_fast.errors import IslandError, RefusedError, UsageError
from island_fast.images.backing import Backing
from island_fast.images.qcow2_source import Qcow2Source
from island_fast.operations.heal import heal_known_damage
from island_fast.operations.parent import SnapshotRequest, lineage_for_image
from island_fast.operations.snapshot import Member, PinMoment, take_snapshots
from island_fast.progress import Progress
from island_fast.qemu.freeze import FREEZES, FreezeResult, run_while_frozen
from island_fast.qemu.libvirt import Disk, Domain
from island_fast.repository.health import has_known_damage
from island_fast.repository.lineage import Lineage
from island_fast.repository.open import RepositoryBase
from island_fast.results import DiskTaken, DomainTaken
from island_fast.results_base import SnapshotTaken

__all__ = ["DomainRequest", "snapshot_domain"]


@dataclass(frozen=True, slots=True)
class DomainRequest:
    """What the caller asks for: see `Repository.snapshot_domain`."""

    domain: str
    disks: Sequence[str]
    freeze: str
    connect: str | None
    volume: str | None
    label: str
    full: bool
    compress: bool


@dataclass(frozen=True, slots=True)
class _OpenDisk:
    """A disk with its image, open as a source, and the lineage that its snapshot goes to."""

    disk: Disk
    source: Qcow2Source
    lineage: Lineage


def snapshot_domain(repository: RepositoryBase, request: DomainRequest, progress: Progress) -> DomainTaken:
    """Take the snapshots. If some disks cannot be stored, store the others; raise only if none is stored.

    Afterwards `repository.left_out` has an error for each disk that is missing, and one if the guest may
    still be frozen.
    """
    repository.left_out = []
    if request.freeze not in FREEZES:
        raise UsageError(f"{request.freeze!r} is not a way to freeze; use auto, require or never")
    with ExitStack() as stack:
        guest = stack.enter_context(Domain(request.domain, request.connect))
        disks = guest.find_disks(request.disks)
        if request.volume and len(disks) > 1:
            raise UsageError(
                f"--volume names one volume, but {guest.who} has the disks {_names(disks)}; choose one with "
                "--disk"
            )
        failures = _Failures(guest, disks)
        opened: list[_OpenDisk] = []
        for disk in disks:
            with failures.of(disk):
                source = _open_source(stack, guest, disk)
                lineage = lineage_for_image(repository, source, request.volume)
                opened.append(_OpenDisk(disk, source, lineage))
        _refuse_shared_volume(opened)
        failures.raise_if_all()
        repository.remember()
        ready: list[_OpenDisk] = []
        for one in opened:
            with failures.of(one.disk):
                if has_known_damage(one.lineage):
                    heal_known_damage(one.lineage, one.source, progress)
                ready.append(one)
        group = os.urandom(16).hex() if len(disks) > 1 else None
        members = [
            Member(one.lineage, one.source, _disk_request(repository, request, one.disk, disks, group))
            for one in ready
        ]
        pinning = _Pinning(guest, [one.source for one in ready], request.freeze)
        outcomes = take_snapshots(members, pinning, progress)
    taken: list[DiskTaken] = []
    for one, outcome in zip(ready, outcomes, strict=True):
        with failures.of(one.disk):
            if not isinstance(outcome, SnapshotTaken):
                raise outcome
            taken.append(DiskTaken(**asdict(outcome), disk=one.disk.name, image=str(one.disk.image)))
    failures.raise_if_all()
    moment = pinning.moment
    repository.left_out = failures.errors
    if moment.stuck:
        repository.left_out.append(IslandError(moment.stuck))  # last: the exit code is its
    return DomainTaken(guest.name, group, moment.consistency, moment.reason, tuple(taken))


def _open_source(stack: ExitStack, guest: Domain, disk: Disk) -> Qcow2Source:
    backing = [Backing.parse(text) for text in disk.backing]
    return stack.enter_context(Qcow2Source(disk.image, monitor=guest, backing=backing))


def _refuse_shared_volume(opened: Sequence[_OpenDisk]) -> None:
    """Raise RefusedError if two disks have one volume, as two new images of one name in two folders would."""
    seen: dict[str, Disk] = {}
    for one in opened:
        disk, lineage = one.disk, one.lineage
        other = seen.setdefault(lineage.name, disk)
        if other is not disk:
            raise RefusedError(
                f"disks {other.name} and {disk.name} would both be volume {lineage.name}; take the first "
                f"snapshot of one of them with --disk {disk.name} --volume and another name"
            )


def _disk_request(
    repository: RepositoryBase, request: DomainRequest, disk: Disk, disks: Sequence[Disk], group: str | None
) -> SnapshotRequest:
    return SnapshotRequest(
        repository.id,
        request.label,
        full=request.full,
        compress=request.compress,
        properties={
            "libvirt.domain": request.domain,
            "libvirt.disk": disk.name,
            "libvirt.disks": " ".join(one.name for one in disks),
        },
        group=group,
    )


class _Pinning:
    """Takes the pins of all disks; afterwards `moment` says how consistent the guest was."""

    moment: FreezeResult

    def __init__(self, guest: Domain, sources: Sequence[Qcow2Source], freeze: str) -> None:
        self._guest = guest
        self._sources = sources
        self._freeze = freeze
        self._created = 0

    def __call__(self, names: Sequence[str | None]) -> PinMoment:
        pins = [(source.node, name) for source, name in zip(self._sources, names, strict=True) if name]

        def pin() -> None:
            self._created = time.time_ns()  # not earlier: a freeze can take a minute
            self._guest.snapshot_create_all(pins)

        self.moment = run_while_frozen(self._guest, self._freeze, pin)
        return PinMoment(self._created, {"consistency": self.moment.consistency})


class _Failures:
    """The disks of a guest that could not be stored: `errors` has one for each, which names the disk."""

    def __init__(self, guest: Domain, disks: Sequence[Disk]) -> None:
        self._guest = guest
        self._disks = disks
        self.errors: list[IslandError] = []

    @contextmanager
    def of(self, disk: Disk) -> Iterator[None]:
        """Run the body; an error in it is added to `errors`, and the caller continues after the body."""
        try:
            yield
        except (IslandError, OSError) as error:
            kind = type(error) if isinstance(error, IslandError) else IslandError
            message = f"disk {disk.name} of {self._guest.who} is not stored: {self._reason(disk, error)}"
            named = kind(message)
            named.__cause__ = error
            self.errors.append(named)

    def raise_if_all(self) -> None:
        """Raise one error, of the last one's class and with all messages, if every disk failed."""
        if len(self.errors) == len(self._disks):
            raise type(self.errors[-1])("; ".join(map(str, self.errors))) from self.errors[-1]

    def _reason(self, disk: Disk, error: IslandError | OSError) -> str:
        reason = str(error)
        if isinstance(error, OSError) and error.strerror:
            reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        if "--volume" in reason and len(self._disks) > 1:
            others = " ".join(f"--disk {one.name}" for one in self._disks if one is not disk)
            reason += f"; --volume needs --disk {disk.name} alone, or leave it out with {others}"
        return reason


def _names(disks: Sequence[Disk]) -> str:
    return ", ".join(disk.name for disk in disks)
