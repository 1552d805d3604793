"""What every verb answers with, and the answer of a snapshot, which alone must not wait for all others.

The rest is in `results.py`: the classes there take more time to make than an unchanged volume's snapshot.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Answer", "SnapshotTaken"]


@dataclass(frozen=True, slots=True)
class Answer:
    """A value that doors show and programs read."""

    def as_json(self) -> dict[str, Any]:
        """The answer as one JSON object."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class SnapshotTaken(Answer):
    """A snapshot just made, by which rule and why, and the work it took.

    `blocks_candidate` may have changed, `blocks_changed` differ from the parent; `bytes_read` is data read
    from the image; `blocks_kept` were not sent, because an earlier `attempt` at this snapshot had sent
    them; `notes` are sentences for the user about what was left behind.
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
    bytes_read: int
    bytes_stored: int
    objects_written: int
    attempt: int
    seconds: float
    notes: tuple[str, ...] = ()
