"""What a case is, and the context it runs in: its folder, the sizes of volumes, and the installed peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from island_fast.bench.peers.all_peers import Found
from island_fast.bench.report import Counter, LeftOut, Row

__all__ = ["FULL_SCALE", "GIB", "MIB", "QUICK_SCALE", "Case", "Context", "Scale", "Size"]

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Size:
    """A volume of `volume` bytes, `allocated` of them written; it is measured in `pairs` pairs."""

    volume: int
    allocated: int
    pairs: int

    def __str__(self) -> str:
        """Return the allocated size for people, such as 1 GiB."""
        if self.allocated % GIB:
            return f"{self.allocated // MIB} MiB"
        return f"{self.allocated // GIB} GiB"


@dataclass(frozen=True, slots=True)
class Scale:
    """The sizes of a run: of the small volume and of the large one (None: the large one is left out)."""

    small: Size
    large: Size | None


FULL_SCALE = Scale(Size(4 * GIB, 1 * GIB, 7), Size(10 * GIB, 8 * GIB, 3))
QUICK_SCALE = Scale(Size(256 * MIB, 64 * MIB, 2), None)


@dataclass(frozen=True, slots=True)
class Context:
    """What the runner gives to each case.

    `scratch` is an empty folder for this case only, which the runner removes afterwards. `peers` has those
    that were asked for and are installed, by name. `show_progress` shows one line of progress. All
    random data must come from `seed`.
    """

    scratch: Path
    scale: Scale
    quick: bool
    seed: int
    peers: Mapping[str, Found]
    show_progress: Callable[[str], None]

    def has_peer(self, peer: str) -> bool:
        """Return whether a peer was asked for and is installed."""
        return peer in self.peers

    def target_unless_quick(self, value: float) -> float | None:
        """Return the target for a ratio; None with --quick, where most of the time is starting processes."""
        return None if self.quick else value


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure: `run` yields its rows and counters.

    A case is left out if one of the peers in `needs` is missing; a case that compares with several peers asks
    `Context.has_peer` for each. `space` returns the bytes that it needs in the temporary folder at a scale.
    A case with `swift` runs only with --swift.
    """

    name: str
    run: Callable[[Context], Iterator[Row | Counter | LeftOut]]
    needs: tuple[str, ...] = ()
    space: Callable[[Scale], int] = lambda scale: 0
    swift: bool = False
