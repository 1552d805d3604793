"""The results of a run of the bench, as values and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from island_fast.errors import DamagedError, NotFoundError

__all__ = ["Counter", "LeftOut", "Report", "Row", "Spread", "load_report"]

_OURS = ("island", "python", "numpy")

FORMAT = 1
"""Version of the JSON; a report with another one is refused."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Measured values with their median and quartiles (`low` and `high`).

    `sure_low` to `sure_high` is the confidence interval of the median; see `timing.summarize`.
    """

    median: float
    low: float
    high: float
    sure_low: float
    sure_high: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """What one piece of work took island and a peer, in pairs. `ours` and `theirs` are in `unit`.

    `ratio` has one value for each pair, and `ratio_is` says which way round it is ("theirs / ours" or "ours /
    theirs"). `reach` is its target: at least that much if `better` is "higher", at most if it is "lower";
    None: no target.
    """

    work: str
    against: str
    unit: str
    ours: Spread
    theirs: Spread
    ratio: Spread
    ratio_is: str
    reach: float | None
    better: str
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Identifies the row in its report."""
        return f"{self.work}, against {self.against}"

    @property
    def reached(self) -> bool | None:
        """Whether the median meets the target; None if there is no target."""
        return _is_reached(self.ratio.median, self.reach, self.better)


@dataclass(frozen=True, slots=True)
class Counter:
    """A count or a size, which is the same in every run with the same seed on any machine.

    `reach` is its target, the most that it should be (with `better` "higher", the least). A value that does
    differ from run to run, such as memory, differs by less than `noise`, a share of the value.
    """

    name: str
    value: float
    unit: str = ""
    reach: float | None = None
    better: str = "lower"
    notes: tuple[str, ...] = ()
    noise: float = 0.0

    @property
    def reached(self) -> bool | None:
        """Whether the value meets the target; None if there is no target."""
        return _is_reached(self.value, self.reach, self.better)


def _is_reached(value: float, reach: float | None, better: str) -> bool | None:
    if reach is None:
        return None
    return value >= reach if better == "higher" else value <= reach


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A peer or a case that was not measured, and why; `failed` if it was tried."""

    name: str
    reason: str
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """One run: when and on which machine, the versions and parameters, and the results."""

    started: str
    machine: dict[str, str]
    versions: dict[str, str]
    parameters: dict[str, Any]
    rows: tuple[Row, ...]
    counters: tuple[Counter, ...]
    left_out: tuple[LeftOut, ...]

    def describe_peers(self) -> str:
        """Return the peers with their versions, such as "restic 0.19.1, borg 1.4.5"."""
        peers = {name: version for name, version in self.versions.items() if name not in _OURS}
        return ", ".join(f"{name} {version}" for name, version in peers.items())

    def to_json(self) -> str:
        """Return the report as JSON text, which `from_json` reads."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote. Raises ValueError, TypeError or KeyError for anything else."""
        value = json.loads(text)
        if value.pop("format") != FORMAT:
            raise ValueError("it has another format version")
        value["rows"] = tuple(_read_row(one) for one in value["rows"])
        value["counters"] = tuple(
            Counter(**{**one, "notes": tuple(one["notes"])}) for one in value["counters"]
        )
        value["left_out"] = tuple(LeftOut(**one) for one in value["left_out"])
        return cls(**value)


def _read_row(value: dict[str, Any]) -> Row:
    for key in ("ours", "theirs", "ratio"):
        value[key] = Spread(**{**value[key], "values": tuple(value[key]["values"])})
    value["notes"] = tuple(value["notes"])
    return Row(**value)


def load_report(path: Path) -> Report:
    """Read a report from a file. Raises NotFoundError or DamagedError."""
    try:
        return Report.from_json(path.read_text())
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist; make one with --json {path}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(
            f"{path} is not a valid report of this bench ({error}); make one with --json"
        ) from error
