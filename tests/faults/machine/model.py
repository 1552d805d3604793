"""The model of one volume: what must be there, what may be, and what must not."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.faults.machine.memory_image import Content


@dataclass
class Doubt:
    """A command of unknown outcome, by `writer`: a snapshot of `content`, or a delete of `deleted`."""

    writer: str
    content: Content | None = None
    deleted: tuple[str, ...] = ()
    id: str | None = None  # of the snapshot, once it was seen


@dataclass
class Volume:
    """The model of one volume: what must be live, what may be, what must not, and the catalog's last word."""

    name: str
    home: int
    certain: dict[str, Content] = field(default_factory=dict)
    seen: dict[str, Content] = field(default_factory=dict)  # of doubtful snapshots, while in doubt
    gone: set[str] = field(default_factory=set)
    doubts: list[Doubt] = field(default_factory=list)
    proved: dict[str, frozenset[str]] = field(default_factory=dict)  # objects it was restored from
    changes: int = -1  # of the lineage's objects, when it was looked at
    visible: tuple[str, ...] = ()
    exists: bool = False
    owner: str = ""
    stopped: bool = False

    @property
    def path(self) -> str:
        return f"/images/{self.name}.qcow2"

    def must_be_live(self, snapshot: str) -> bool:
        """Whether it was reported as taken, and no delete of it is in doubt: any command may settle that."""
        return snapshot in self.certain and all(snapshot not in doubt.deleted for doubt in self.doubts)

    def content(self, snapshot: str) -> Content:
        return self.certain.get(snapshot) or self.seen[snapshot]
