"""The base class of all answers, and the answer of a snapshot.

All other answers are in `results.py`. Creating the classes there takes longer than the snapshot of an
unchanged volume, which must not need them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Answer", "SnapshotTaken"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a verb returns: the command line prints it, programs read its fields."""

    def as_json(self) -> dict[str, Any]:
        """Return the answer as one JSON object."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class SnapshotTaken(Answer):
    """A snapshot that was just taken, how its changes were found, and the work that it took.

    `rule` is "table-diff" or "full-scan", and `reason` says why. `blocks_candidate` are the blocks that could
    have changed, `blocks_changed` those that differ from the parent. `blocks_kept` were not sent again,
    because an earlier `attempt` at this snapshot had sent them. `blocks_sampled` are blocks that a table diff
    found unchanged and that were read nevertheless, to test it; if one differs from the parent, the rule is
    "full-scan". `bytes_read` is data read from the image, the sample included.
    `notes` are sentences for the user about what was left behind, such as an old pin.
    """

    snapshot: str
    lineage: str
    parent: str | None
    volume: str
    label: str
    volume_size: int
    rule: str
    reason: str
    blocks_candidate: int
    blocks_changed: int
    blocks_kept: int
    blocks_sampled: int
    bytes_read: int
    bytes_stored: int
    objects_written: int
    attempt: int
    seconds: float
    notes: tuple[str, ...] = ()
