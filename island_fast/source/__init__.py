"""What a snapshot is taken of: an image, held, pinned where it can be, and asked what changed."""

from island_fast.source.base import (
    FULL_SCAN,
    TABLE_DIFF,
    Base,
    Change,
    Source,
    View,
    pin_name,
    pinned_lineage,
    pinned_snapshot,
)
from island_fast.source.chain import Backing
from island_fast.source.qcow2 import Qcow2Source
from island_fast.source.raw import RawSource

__all__ = [
    "FULL_SCAN",
    "TABLE_DIFF",
    "Backing",
    "Base",
    "Change",
    "Qcow2Source",
    "RawSource",
    "Source",
    "View",
    "pin_name",
    "pinned_lineage",
    "pinned_snapshot",
]
