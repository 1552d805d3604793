"""A report against an earlier one: what became worse by more than the spread."""

from __future__ import annotations

from collections.abc import Iterator

from island_fast.bench.report import Counter, Report, Row, Spread
from island_fast.bench.table import number
from island_fast.errors import UsageError

__all__ = ["check_alike", "worse"]

_ENOUGH = 5  # pairs, for an interval of 94 %
_WIDER = 1.5


def check_alike(quick: bool, baseline: Report) -> None:
    """Raise UsageError if the baseline was measured at another scale than is asked for."""
    if baseline.parameters.get("quick") is not quick:
        other = "without" if quick else "with"
        raise UsageError(f"the baseline was measured {other} --quick; measure alike to compare")


def worse(report: Report, baseline: Report) -> Iterator[str]:
    """Say, in a sentence each, which ratios and counters are worse than they were.

    A ratio is worse if its interval lies wholly on the worse side of the earlier one's; a counter if it is on
    the worse side by more than its noise, which most have none of. What only one of both has is not compared.
    """
    rows = {row.name: row for row in baseline.rows}
    for row in report.rows:
        before = rows.get(row.name)
        if before and before.ratio_is == row.ratio_is and _is_worse(row, before):
            was, now = before.ratio, row.ratio
            yield (
                f"{row.name}: {row.ratio_is} is {number(now.median)} "
                f"({number(now.sure_low)} to {number(now.sure_high)}), and was {number(was.median)} "
                f"({number(was.sure_low)} to {number(was.sure_high)})"
            )
    counters = {counter.name: counter for counter in baseline.counters}
    for counter in report.counters:
        earlier = counters.get(counter.name)
        if earlier and earlier.unit == counter.unit and _is_higher_cost(counter, earlier):
            unit = f" {counter.unit}" if counter.unit else ""
            yield f"{counter.name}: {counter.value:,g}{unit}, and was {earlier.value:,g}{unit}"


def _is_worse(row: Row, before: Row) -> bool:
    (low, high), (was_low, was_high) = _bounds(row.ratio), _bounds(before.ratio)
    return high < was_low if row.better == "higher" else low > was_high


def _bounds(ratio: Spread) -> tuple[float, float]:
    """The interval; of few pairs it says little, so it is taken half as wide again either way."""
    if len(ratio.values) >= _ENOUGH:
        return ratio.sure_low, ratio.sure_high
    return ratio.sure_low / _WIDER, ratio.sure_high * _WIDER


def _is_higher_cost(counter: Counter, before: Counter) -> bool:
    noise = counter.noise * abs(before.value)
    if counter.better == "higher":
        return counter.value < before.value - noise
    return counter.value > before.value + noise
