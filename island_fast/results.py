"""What each verb returns: the command line prints it, programs read its fields.

`as_json` returns plain types, under the same names as `--json` prints. Sizes are in bytes, times in seconds;
`created` is ISO 8601 in UTC.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from island_fast.results_base import Answer, SnapshotTaken

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "Adopted",
    "BitmapInfo",
    "Copied",
    "Damage",
    "Decided",
    "Deleted",
    "Difference",
    "DiskTaken",
    "DomainTaken",
    "ImageInfo",
    "InternalInfo",
    "Restored",
    "RestoredOnto",
    "Retained",
    "Salvaged",
    "Snapshot",
    "SnapshotShown",
    "SnapshotTaken",
    "SweepStep",
    "Swept",
    "Touched",
    "Unpinned",
    "Usage",
    "Verified",
    "VolumeUsage",
    "command_to_resume",
    "timestamp",
]


_WINDOW = 1 << 16  # extents that are made Python's at a time


def command_to_resume(snapshot: str, target: object, image_format: str) -> str:
    """Return the command that resumes a restore onto `target`: by the id, because "latest" can change."""
    more = "" if image_format == "qcow2" else f" --format {image_format}"
    return f"island restore {snapshot} --onto {shlex.quote(str(target))}{more}"


def timestamp(nanoseconds: int) -> str:
    """Return nanoseconds since 1970 UTC as ISO 8601 in whole seconds, such as 2026-01-31T12:00:00Z."""
    return datetime.fromtimestamp(nanoseconds // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, slots=True)
class Snapshot(Answer):
    """A snapshot in the repository. `bytes_stored` is the size of the objects that it wrote.

    `keep`: it is marked, and neither `delete` nor `retain` deletes it.
    """

    snapshot: str
    lineage: str
    parent: str | None
    volume: str
    label: str
    created: str
    volume_size: int
    bytes_stored: int
    keep: bool


@dataclass(frozen=True, slots=True)
class Marked(Answer):
    """A snapshot that was marked to be kept (`keep`), or whose mark was removed."""

    snapshot: str
    volume: str
    keep: bool


@dataclass(frozen=True, slots=True)
class SnapshotShown(Snapshot):
    """A snapshot, and what deleting it would free: see `Deleted`; None if damage prevents the computation.

    `consistency` is as in `DomainTaken`, or "offline" if no process had the image open for writing. `domain`,
    `disk` and `group` are as in `DomainTaken` for a running guest's disk.
    """

    bytes_unreferenced: int | None
    bytes_freed: int | None
    consistency: str | None = None
    domain: str | None = None
    disk: str | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskTaken(SnapshotTaken):
    """A snapshot that was just taken of a guest's disk; `disk` is its name in libvirt, `image` its file."""

    disk: str
    image: str


@dataclass(frozen=True, slots=True)
class DomainTaken(Answer):
    """Snapshots that were just taken of a running guest's disks at one moment.

    `group` is the id that they share if there are several. `consistency` is "filesystem" if the guest's file
    systems were frozen at that moment, otherwise "crash", as after a power cut; `reason` says why.
    """

    domain: str
    group: str | None
    consistency: str
    reason: str
    snapshots: tuple[DiskTaken, ...]


@dataclass(frozen=True, slots=True)
class Restored(Answer):
    """A snapshot that was restored into a new file.

    `bytes_read` were read from the store; `bytes_written` is data written to the file, without zeros.
    """

    snapshot: str
    target: str
    format: str
    volume_size: int
    bytes_read: int
    bytes_written: int
    objects_read: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Salvaged(Restored):
    """What could be proved intact of a snapshot, restored into a new file; the rest is zero in it.

    `bytes_lost` is what is zero because it is lost, and `extents_lost` says where, as (start, length) in
    bytes, ascending. If it is 0, the file holds the whole volume. `objects_damaged` are the names of the
    objects that could not be read as usual, because they are missing or damaged.
    """

    bytes_lost: int
    extents_lost: tuple[tuple[int, int], ...]
    objects_damaged: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RestoredOnto(Answer):
    """A snapshot that was restored onto an existing target, or with `dry_run` what that would write.

    `bytes_compared` were read from the target. Of what differed, `bytes_written` is data and `bytes_zeroed`
    zeros; the part of the target past the end of the volume counts as zeros. `bytes_read` were read from the
    store.
    """

    snapshot: str
    target: str
    format: str
    volume_size: int
    target_size: int
    bytes_compared: int
    bytes_written: int
    bytes_zeroed: int
    bytes_read: int
    objects_read: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Copied(Answer):
    """A snapshot that is now in the other repository, too: `copied` by this call, or there before.

    Or, if all were to be copied, one that was `deleted` there and therefore stays away.

    `parent` is the snapshot there whose blocks it shares. `blocks_sent` were sent by this call, `blocks_kept`
    by an earlier attempt that was interrupted. `bytes_read` were read from the repository that it was copied
    from.
    """

    snapshot: str
    volume: str
    parent: str | None
    label: str
    volume_size: int
    copied: bool
    blocks_sent: int
    blocks_kept: int
    bytes_read: int
    bytes_stored: int
    objects_written: int
    seconds: float
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class Deleted(Answer):
    """A snapshot that was deleted from the catalog, or with `dry_run` what that would do.

    `bytes_unreferenced` is the size of the snapshot's manifest and of the stored blocks that no other
    snapshot needs. `bytes_freed` is what the next sweep will remove because of this, less what it will
    rewrite; what is younger than the grace (24 hours in Swift) waits for a later one.
    """

    snapshot: str
    volume: str
    bytes_unreferenced: int
    bytes_freed: int


@dataclass(frozen=True, slots=True)
class Decided(Answer):
    """A snapshot under a retention policy: the rules that keep it, or what deleting it freed: see `Deleted`.

    The figures are 0 for a snapshot that is kept.
    """

    snapshot: str
    created: str
    label: str
    kept: bool
    reasons: tuple[str, ...]
    bytes_unreferenced: int
    bytes_freed: int


@dataclass(frozen=True, slots=True)
class Retained(Answer):
    """What a retention policy did to a volume, or with `dry_run` would do.

    The figures are sums over `snapshots`, which are listed oldest first.
    """

    volume: str
    kept: int
    deleted: int
    bytes_unreferenced: int
    bytes_freed: int
    snapshots: tuple[Decided, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Difference(Answer):
    """What can differ between two snapshots of a volume, as extents of `snapshot`.

    `start` and `length` are int64[n], in bytes, ascending and disjoint. `data` is bool[n]: whether the extent
    holds data in `snapshot`, or zeros. `bytes_changed` is the sum of `bytes_data` and `bytes_zero`.
    `since_size` is the size of the volume in `since`.
    """

    volume: str
    since: str
    snapshot: str
    since_size: int
    volume_size: int
    bytes_changed: int
    bytes_data: int
    bytes_zero: int
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    data: NDArray[np.bool_]

    def extents(self) -> Iterator[tuple[int, int, str]]:
        """Yield start, length and kind ("data" or "zero") of each extent."""
        for first in range(0, len(self.start), _WINDOW):
            part = slice(first, first + _WINDOW)
            rows = zip(
                self.start[part].tolist(), self.length[part].tolist(), self.data[part].tolist(), strict=True
            )
            yield from ((start, length, "data" if data else "zero") for start, length, data in rows)

    def as_json(self) -> dict[str, Any]:
        """Return the answer as one JSON object, with one object for each extent."""
        columns = ("start", "length", "data")
        answer = {name: getattr(self, name) for name in self.__slots__ if name not in columns}
        return answer | {"extents": [{"start": s, "length": n, "kind": k} for s, n, k in self.extents()]}


@dataclass(frozen=True, slots=True)
class VolumeUsage(Answer):
    """How much data a volume's snapshots hold and how much space they use; all volumes if `volume` is None.

    Three sizes are before compression, in whole blocks, without zeros. `bytes_logical` is the sum of the data
    of each snapshot; `bytes_distinct` counts a block that several snapshots share only once; `bytes_shared`
    is the part of `bytes_distinct` that more than one snapshot holds.

    Three sizes are as stored. `bytes_stored` is the size of the packs and manifests that the catalog names.
    `bytes_dead` is the part of it that no snapshot needs and no sweep has removed yet. `bytes_freed` is what
    a sweep without grace would free of that; it can be less, because a sweep does not rewrite a pack that is
    mostly needed.

    `compression` is bytes_distinct / (bytes_stored - bytes_dead), or None if no snapshot needs anything.
    """

    volume: str | None
    snapshots: int
    bytes_logical: int
    bytes_distinct: int
    bytes_shared: int
    bytes_stored: int
    bytes_dead: int
    bytes_freed: int
    compression: float | None


@dataclass(frozen=True, slots=True)
class Usage(Answer):
    """How much space volumes use, each of them and in total."""

    volumes: tuple[VolumeUsage, ...]
    total: VolumeUsage


@dataclass(frozen=True, slots=True)
class SweepStep(Answer):
    """What a sweep does to an object, and why.

    "remove" it, "rewrite" a pack without its dead slots, or "keep" what is younger than the grace, or what
    this host cannot account for.
    """

    action: str
    object: str
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Swept(Answer):
    """What a sweep did to a volume, or with `dry_run` would do.

    `bytes_freed` is `bytes_removed` less `bytes_rewritten` and `bytes_kept`. `bytes_kept` is what the store
    keeps of the removed objects, as versions or under a lock, as far as it says so or its own count shows it.
    `objects_unknown` counts what stays although no record names it, because this host did not store it:
    another host may need it, or have left it. At most 131072 of those are among the `steps`, and no sweep
    removes more objects that no record names. `objects_waiting` counts what stays although no snapshot needs
    it, because it is younger than the grace; a later sweep frees `bytes_waiting` of it.
    """

    volume: str
    objects_removed: int
    packs_repacked: int
    bytes_removed: int
    bytes_rewritten: int
    bytes_kept: int
    bytes_freed: int
    objects_unknown: int
    bytes_unknown: int
    objects_waiting: int
    bytes_waiting: int
    steps: tuple[SweepStep, ...]


@dataclass(frozen=True, slots=True)
class Adopted(Answer):
    """A volume that this host owns now; `epoch` counts its adoptions."""

    volume: str
    snapshots: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Unpinned(Answer):
    """The pins that were dropped from an image; `bytes_freed` is how much less its file uses on disk."""

    image: str
    pins: tuple[str, ...]
    bytes_freed: int


@dataclass(frozen=True, slots=True)
class InternalInfo(Answer):
    """An internal snapshot in an image; `pin_of` is the island snapshot that it pins, if it is a pin."""

    name: str
    id: str
    created: str
    volume_size: int
    pin_of: str | None


@dataclass(frozen=True, slots=True)
class BitmapInfo(Answer):
    """A persistent dirty bitmap in an image; `granularity` is the bytes of the volume for each bit."""

    name: str
    granularity: int
    state: str


@dataclass(frozen=True, slots=True)
class ImageInfo(Answer):
    """A description of a qcow2 image. Sizes are in bytes; `in_use` if a process has it open for writing.

    `next_rule` is how the next snapshot would find what changed, `next_reason` says why, and `pinned_base` is
    the snapshot that the image would be compared with. `refuses_overwrites`: whether the repository's store
    itself keeps a name from being used twice, if this host has asked it. They are None if no repository was
    asked.
    """

    image: str
    format: str
    version: int
    volume_size: int
    file_size: int
    cluster_size: int
    compression: str
    backing_file: str | None
    features: tuple[str, ...]
    in_use: bool
    internal_snapshots: tuple[InternalInfo, ...]
    bitmaps: tuple[BitmapInfo, ...]
    bitmap_trouble: str | None
    volume: str | None = None
    pinned_base: str | None = None
    next_rule: str | None = None
    next_reason: str | None = None
    refuses_overwrites: bool | None = None


@dataclass(frozen=True, slots=True)
class Touched(Answer):
    """A snapshot that damage affects: how many bytes of its volume, and where, as (start, length) in bytes.

    `extents_left_out` is the number of further extents that are not listed.
    """

    snapshot: str
    bytes: int
    extents: tuple[tuple[int, int], ...]
    extents_left_out: int


@dataclass(frozen=True, slots=True)
class Damage(Answer):
    """An object that is not as it was written: its name, the kind of damage, a sentence, and what to do.

    `snapshots` are those that need what is lost, or if the object was repaired (`mended`), those that needed
    it. `remedy` says what can be done; it is empty for an object that was repaired.
    """

    volume: str
    object: str
    kind: str
    message: str
    snapshots: tuple[Touched, ...]
    mended: bool
    remedy: str


@dataclass(frozen=True, slots=True)
class Verified(Answer):
    """What was verified, for how many snapshots, and all damage that was found.

    All `objects` were looked up, and `objects_read` of them were read in full. `objects_unproved` have never
    been read in full and found undamaged by this host. `bytes_compared` is the data that was read from the
    image to compare a snapshot with its pin.
    """

    snapshots: int
    objects: int
    objects_read: int
    objects_unproved: int
    bytes_read: int
    bytes_compared: int
    damages: tuple[Damage, ...]
    seconds: float
