"""Compare a report with an earlier one: what became worse by more than the spread."""

from __future__ import annotations

from collections.abc import Iterator

from island_fast.bench.report import Counter, Report, Row, Spread
from island_fast.bench.table import format_number
from island_fast.errors import UsageError

__all__ = ["COUNT_TOLERANCE", "check_same_scale", "find_regressions"]

COUNT_TOLERANCE = 0.001
"""Share by which a count can be worse unnoticed: stored ids and times make it vary a little."""

_ENOUGH_PAIRS = 5  # for an interval of 94 %
_FEW_PAIRS_FACTOR = 1.5


def check_same_scale(quick: bool, baseline: Report) -> None:
    """Raise UsageError if the baseline was measured at another scale than this run will be."""
    if baseline.parameters.get("quick") is not quick:
        other = "without" if quick else "with"
        raise UsageError(f"the baseline was measured {other} --quick; measure the same way to compare")


def find_regressions(report: Report, baseline: Report) -> Iterator[str]:
    """Yield a sentence for each ratio and each counter that is worse than in the baseline.

    A ratio is worse if its whole interval lies on the worse side of the baseline's. A counter is worse if it
    is worse by more than its noise, or by more than COUNT_TOLERANCE if that is larger. Rows and counters that
    only one of the two reports has are not compared.
    """
    rows = {row.name: row for row in baseline.rows}
    for row in report.rows:
        before = rows.get(row.name)
        if before and before.ratio_is == row.ratio_is and _is_row_worse(row, before):
            now, was = _format_ratio(row.ratio), _format_ratio(before.ratio)
            yield f"{row.name}: {row.ratio_is} is {now}, and was {was}"
    counters = {counter.name: counter for counter in baseline.counters}
    for counter in report.counters:
        earlier = counters.get(counter.name)
        if earlier and earlier.unit == counter.unit and _is_counter_worse(counter, earlier):
            unit = f" {counter.unit}" if counter.unit else ""
            yield f"{counter.name}: {counter.value:,g}{unit}, and was {earlier.value:,g}{unit}"


def _format_ratio(ratio: Spread) -> str:
    low, high = format_number(ratio.sure_low), format_number(ratio.sure_high)
    return f"{format_number(ratio.median)} ({low} to {high})"


def _is_row_worse(row: Row, before: Row) -> bool:
    (low, high), (was_low, was_high) = _widen_if_few(row.ratio), _widen_if_few(before.ratio)
    return high < was_low if row.better == "higher" else low > was_high


def _widen_if_few(ratio: Spread) -> tuple[float, float]:
    """Return the interval, half as wide again either way if it comes from few pairs and says little."""
    if len(ratio.values) >= _ENOUGH_PAIRS:
        return ratio.sure_low, ratio.sure_high
    return ratio.sure_low / _FEW_PAIRS_FACTOR, ratio.sure_high * _FEW_PAIRS_FACTOR


def _is_counter_worse(counter: Counter, before: Counter) -> bool:
    tolerated = max(counter.noise, COUNT_TOLERANCE) * abs(before.value)
    if counter.better == "higher":
        return counter.value < before.value - tolerated
    return counter.value > before.value + tolerated
