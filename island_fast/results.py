"""What each verb answers: the values that doors show and programs read.

`as_json` gives plain types under the names that the command line documents. Sizes are in bytes, times in
seconds; `created` is ISO 8601 in UTC.
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
    "again",
    "timestamp",
]


def again(snapshot: str, target: object, image_format: str) -> str:
    """The command that goes on with a restore onto `target`; by the id, for "latest" may change."""
    more = "" if image_format == "qcow2" else f" --format {image_format}"
    return f"island restore {snapshot} --onto {shlex.quote(str(target))}{more}"


def timestamp(nanoseconds: int) -> str:
    """Nanoseconds since 1970 UTC as ISO 8601 with whole seconds, such as 2026-01-31T12:00:00Z."""
    return datetime.fromtimestamp(nanoseconds // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, slots=True)
class Snapshot(Answer):
    """A snapshot that is there. `bytes_stored` is the size of the objects it wrote."""

    snapshot: str
    lineage: str
    parent: str | None
    volume: str
    label: str
    created: str
    volume_size: int
    bytes_stored: int


@dataclass(frozen=True, slots=True)
class SnapshotShown(Snapshot):
    """A snapshot, and what deleting it would free: see `Deleted`; None if damage hides it.

    `consistency`, and of a running guest `domain`, `disk` and `group`, are as in `DomainTaken`.
    """

    bytes_unreferenced: int | None
    bytes_freed: int | None
    consistency: str | None = None
    domain: str | None = None
    disk: str | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskTaken(SnapshotTaken):
    """A snapshot just made of the disk that a guest's host calls `disk`, whose file is `image`."""

    disk: str
    image: str


@dataclass(frozen=True, slots=True)
class DomainTaken(Answer):
    """Snapshots just made of a running guest's disks at one moment; `group` is theirs if they are several.

    `consistency` is "filesystem" if the guest's file systems were frozen then, else "crash", as after a
    power cut; `reason` tells why.
    """

    domain: str
    group: str | None
    consistency: str
    reason: str
    snapshots: tuple[DiskTaken, ...]


@dataclass(frozen=True, slots=True)
class Restored(Answer):
    """A volume written from a snapshot. `bytes_read` came from the store, `bytes_written` are data."""

    snapshot: str
    target: str
    format: str
    volume_size: int
    bytes_read: int
    bytes_written: int
    objects_read: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RestoredOnto(Answer):
    """A target that is now a snapshot's volume, by writing what differed; or what that would write.

    `bytes_compared` are data that were read from the target. `bytes_written` were data in the snapshot, and
    `bytes_zeroed` zeros; what the target has behind the volume's end counts as zeros. `bytes_read` came from
    the store.
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
    """A snapshot that is in another repository now: `copied` by this call, or there before.

    `parent` is the one there whose blocks it shares. `blocks_sent` were sent, `blocks_kept` had been, by an
    attempt that was interrupted; `bytes_read` are data that came from the near repository.
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


@dataclass(frozen=True, slots=True)
class Deleted(Answer):
    """A snapshot taken out of the catalog, or what that would do.

    `bytes_unreferenced` are the stored bytes of slots that no snapshot needs any more and its manifest;
    `bytes_freed` is what the next sweep removes because of it, less what that rewrites.
    """

    snapshot: str
    volume: str
    bytes_unreferenced: int
    bytes_freed: int


@dataclass(frozen=True, slots=True)
class Decided(Answer):
    """A snapshot under a retention policy: the rules that keep it, or what deleting it freed (see `Deleted`).

    The figures are 0 for one that is kept.
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
    """What a retention policy did to a volume, or would do; figures are sums, `snapshots` oldest first."""

    volume: str
    kept: int
    deleted: int
    bytes_unreferenced: int
    bytes_freed: int
    snapshots: tuple[Decided, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Difference(Answer):
    """What may differ between two snapshots of a volume, as extents of `snapshot`.

    start, length: int64[n], bytes, ascending and disjoint. data: bool[n], whether the extent holds data in
    `snapshot`; else it is zero there. `bytes_changed` is the sum of `bytes_data` and `bytes_zero`.
    `since_size` is the size that the volume had in `since`.
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
        """Start, length and kind ("data" or "zero") of each extent."""
        columns = zip(self.start.tolist(), self.length.tolist(), self.data.tolist(), strict=True)
        return ((start, length, "data" if data else "zero") for start, length, data in columns)

    def as_json(self) -> dict[str, Any]:
        """The answer as one JSON object, the columns as rows."""
        columns = ("start", "length", "data")
        answer = {name: getattr(self, name) for name in self.__slots__ if name not in columns}
        return answer | {"extents": [{"start": s, "length": n, "kind": k} for s, n, k in self.extents()]}


@dataclass(frozen=True, slots=True)
class VolumeUsage(Answer):
    """What a volume's live snapshots hold and take; of all volumes if `volume` is None. Sizes in bytes.

    Before compression, in whole blocks, zeros not counted: `bytes_logical` is the data of each snapshot,
    summed; `bytes_distinct` counts a block that several of them share once; `bytes_shared` is the part of
    that which more than one holds. As stored: `bytes_stored` are the packs and manifests that the catalog
    names; `bytes_dead` the part that no snapshot needs and no sweep has removed; `bytes_freed` what a sweep
    without grace would free of it, for a pack that is mostly needed stays as it is. `compression` is
    bytes_distinct / (bytes_stored - bytes_dead), None where nothing is needed.
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
    """What volumes take, each and in all."""

    volumes: tuple[VolumeUsage, ...]
    total: VolumeUsage


@dataclass(frozen=True, slots=True)
class SweepStep(Answer):
    """What a sweep does to an object: "remove" it, or "rewrite" a pack without its dead slots; and why."""

    action: str
    object: str
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Swept(Answer):
    """What a sweep did in one lineage, or would do. `bytes_freed` is removed less rewritten."""

    volume: str
    objects_removed: int
    packs_repacked: int
    bytes_removed: int
    bytes_rewritten: int
    bytes_freed: int
    steps: tuple[SweepStep, ...]


@dataclass(frozen=True, slots=True)
class Adopted(Answer):
    """A lineage that this host owns now."""

    volume: str
    snapshots: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Unpinned(Answer):
    """The pins that were dropped from an image; `bytes_freed` is what its file takes less on disk."""

    image: str
    pins: tuple[str, ...]
    bytes_freed: int


@dataclass(frozen=True, slots=True)
class InternalInfo(Answer):
    """An internal snapshot in an image; `pin_of` is the snapshot that it pins, if it is one of ours."""

    name: str
    id: str
    created: str
    volume_size: int
    pin_of: str | None


@dataclass(frozen=True, slots=True)
class BitmapInfo(Answer):
    """A persistent dirty bitmap in an image: bytes of volume for each bit, and what it is worth."""

    name: str
    granularity: int
    state: str


@dataclass(frozen=True, slots=True)
class ImageInfo(Answer):
    """What an image says of itself. Sizes are in bytes; `in_use`: a process has it open for writing.

    `next_rule` is how the next snapshot would find the change, `next_reason` why, `pinned_base` the snapshot
    that it would be compared with; None where no repository was asked.
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


@dataclass(frozen=True, slots=True)
class Touched(Answer):
    """A snapshot that damage touches: how many bytes of its volume, and where, as (start, length) in bytes.

    `extents_left_out` more are not listed.
    """

    snapshot: str
    bytes: int
    extents: tuple[tuple[int, int], ...]
    extents_left_out: int


@dataclass(frozen=True, slots=True)
class Damage(Answer):
    """An object that is not as it was written: its name, in what way, a sentence, and what can be done.

    `snapshots` are those that need what is lost; of an object that was mended, those that needed it.
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
    """What was verified, of how many snapshots, and all damage that was found.

    All `objects` were looked for; `objects_read` were read whole now; `objects_unproved` this host has never
    read whole and found right. `bytes_compared` is the volume's data that was compared with a pinned base.
    """

    snapshots: int
    objects: int
    objects_read: int
    objects_unproved: int
    bytes_read: int
    bytes_compared: int
    damages: tuple[Damage, ...]
    seconds: float
