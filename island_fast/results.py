"""What each verb answers: the values that doors show and programs read.

`as_json` gives plain types under the names that the command line documents. Sizes are in bytes, times in
seconds; `created` is ISO 8601 in UTC.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from island_fast.answer import Answer, SnapshotTaken

__all__ = [
    "Adopted",
    "BitmapInfo",
    "Copied",
    "Deleted",
    "ImageInfo",
    "InternalInfo",
    "Restored",
    "Snapshot",
    "SnapshotShown",
    "SnapshotTaken",
    "SweepStep",
    "Swept",
    "Unpinned",
    "timestamp",
]


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
    """A snapshot, and what deleting it would free: see `Deleted`; None if damage hides it."""

    bytes_unreferenced: int | None
    bytes_freed: int | None


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
