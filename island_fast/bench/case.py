"""What a piece of work is, and what it gets: room, sizes, and which peers are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from island_fast.bench.report import Counter, LeftOut, Row

__all__ = ["GIB", "MIB", "QUICK", "WHOLE", "Context", "Scale", "Size", "Work"]

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Size:
    """A volume of `volume` bytes of which `allocated` are written, and how many pairs it is measured in."""

    volume: int
    allocated: int
    pairs: int

    def __str__(self) -> str:
        """As people write it, such as 1 GiB."""
        if self.allocated % GIB:
            return f"{self.allocated // MIB} MiB"
        return f"{self.allocated // GIB} GiB"


@dataclass(frozen=True, slots=True)
class Scale:
    """How big all is: the small volume and the large one (None: it is left out)."""

    small: Size
    large: Size | None


WHOLE = Scale(Size(4 * GIB, 1 * GIB, 7), Size(10 * GIB, 8 * GIB, 3))
QUICK = Scale(Size(256 * MIB, 64 * MIB, 2), None)


@dataclass(frozen=True, slots=True)
class Context:
    """What every piece of work gets.

    `scratch` is an empty folder of its own, removed afterwards. `versions` are those of the peers that are
    there and were asked for, by name. `tell` shows one line of progress. All chance comes from `seed`.
    """

    scratch: Path
    scale: Scale
    quick: bool
    seed: int
    versions: Mapping[str, str]
    tell: Callable[[str], None]

    def has(self, peer: str) -> bool:
        """Whether a peer is there, and was asked for."""
        return peer in self.versions

    def reach(self, value: float) -> float | None:
        """What a ratio is to come to; None with --quick, where starting processes outweighs the work."""
        return None if self.quick else value


@dataclass(frozen=True, slots=True)
class Work:
    """A piece of work that gives one row or more.

    `needs` are peers without which it is left out; one that gives rows against several asks `Context.has`.
    `space` is the room that it takes, in bytes, at a scale. `swift` work is done only if that is asked for.
    """

    name: str
    run: Callable[[Context], Iterator[Row | Counter | LeftOut]]
    needs: tuple[str, ...] = ()
    space: Callable[[Scale], int] = lambda scale: 0
    swift: bool = False
