"""What a run of the bench found: values, and the same as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from island_fast.errors import DamagedError, NotFoundError

__all__ = ["Counter", "LeftOut", "Report", "Row", "Spread", "load"]

FORMAT = 1
"""Of the JSON; another one is not read."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Some measured values: their median and quartiles; the true median lies in `sure_low` to `sure_high`."""

    median: float
    low: float
    high: float
    sure_low: float
    sure_high: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One piece of work, ours against another's, in pairs. `ours` and `theirs` are in `unit`.

    `ratio` has one value for each pair, and `ratio_is` says which way round; `reach` is what it should come
    to, from above or below as `better` ("higher" or "lower") says; None: nothing is promised.
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
        """What tells this row from all others of a report."""
        return f"{self.work}, against {self.against}"

    @property
    def reached(self) -> bool | None:
        """Whether the median came to what it should; None where nothing is promised."""
        return _reached(self.ratio.median, self.reach, self.better)


@dataclass(frozen=True, slots=True)
class Counter:
    """Something counted, or a size: the same in every run with the same seed on any machine.

    `reach` is the most (or with `better` "higher" the least) that it should come to. What differs from run to
    run after all, such as memory, differs by less than `noise`, as a share of it.
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
        """Whether it is what it should be; None where nothing is promised."""
        return _reached(self.value, self.reach, self.better)


def _reached(value: float, reach: float | None, better: str) -> bool | None:
    if reach is None:
        return None
    return value >= reach if better == "higher" else value <= reach


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A peer, or a piece of work, that was not measured, and why; `failed` if that was tried."""

    name: str
    reason: str
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """One run: where, with what, how, and what was found."""

    started: str
    machine: dict[str, str]
    versions: dict[str, str]
    parameters: dict[str, Any]
    rows: tuple[Row, ...]
    counters: tuple[Counter, ...]
    left_out: tuple[LeftOut, ...]

    def as_json(self) -> str:
        """The report as JSON text; `load` reads it back."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `as_json` wrote. Raises ValueError, TypeError or KeyError for anything else."""
        value = json.loads(text)
        if value.pop("format") != FORMAT:
            raise ValueError("it has another format")
        value["rows"] = tuple(_row(one) for one in value["rows"])
        value["counters"] = tuple(
            Counter(**{**one, "notes": tuple(one["notes"])}) for one in value["counters"]
        )
        value["left_out"] = tuple(LeftOut(**one) for one in value["left_out"])
        return cls(**value)


def _row(value: dict[str, Any]) -> Row:
    for key in ("ours", "theirs", "ratio"):
        value[key] = Spread(**{**value[key], "values": tuple(value[key]["values"])})
    value["notes"] = tuple(value["notes"])
    return Row(**value)


def load(path: Path) -> Report:
    """Read a report from a file. Raises NotFoundError or DamagedError."""
    try:
        return Report.from_json(path.read_text())
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist; make one with --json {path}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{path} is no report of this bench ({error}); make one with --json") from error
