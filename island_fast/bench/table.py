"""The table that a person reads."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from island_fast.bench.results import Counter, Report, Row, Spread

__all__ = ["draw", "number", "reach_text"]


def number(value: float) -> str:
    """Three digits, whatever the size."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def reach_text(reach: float | None, better: str) -> str:
    """Such as "at least 12"; "" for none."""
    if reach is None:
        return ""
    return f"at {'least' if better == 'higher' else 'most'} {reach:g}"


def draw(report: Report, console: Console) -> None:
    """Write the report as tables to a console."""
    console.print(f"island {report.versions['island']}, {report.started}", highlight=False)
    console.print("; ".join(f"{key} {value}" for key, value in report.machine.items()), highlight=False)
    if report.rows:
        console.print(_rows(report))
    if report.counters:
        console.print(_counters(report))
    for one in report.left_out:
        console.print(f"left out: {one.name}: {one.reason}", highlight=False)
    for note in _notes(report):
        console.print(note, highlight=False)


def _rows(report: Report) -> Table:
    """Medians, quartiles, ratios with their interval, what was to reach."""
    table = Table("work", "against", "ours", "theirs", "unit", "ratio", "95 %", "to reach", "pairs")
    for column in table.columns[2:]:
        column.justify = "right"
        column.no_wrap = True
    for row in report.rows:
        table.add_row(
            row.work,
            row.against,
            _with_quartiles(row.ours),
            _with_quartiles(row.theirs),
            row.unit,
            _ratio(row),
            f"{number(row.ratio.sure_low)} to {number(row.ratio.sure_high)}",
            reach_text(row.reach, row.better),
            str(len(row.ratio.values)),
        )
    return table


def _with_quartiles(spread: Spread) -> str:
    return f"{number(spread.median)} ({number(spread.low)}-{number(spread.high)})"


def _ratio(row: Row) -> str:
    """The ratio; bold where it was reached, red where not."""
    text = f"{number(row.ratio.median)}x"
    return {True: f"[bold green]{text}[/]", False: f"[bold red]{text}[/]", None: text}[row.reached]


def _counters(report: Report) -> Table:
    table = Table("counted", "value", "unit", "to reach")
    for column in table.columns[1:]:
        column.justify = "right"
    for counter in report.counters:
        table.add_row(counter.name, _value(counter), counter.unit, reach_text(counter.reach, counter.better))
    return table


def _value(counter: Counter) -> str:
    text = f"{counter.value:,.0f}" if counter.value == int(counter.value) else number(counter.value)
    return f"[bold red]{text}[/]" if counter.reached is False else text


def _notes(report: Report) -> Iterator[str]:
    noted = {row.name: row.notes for row in report.rows} | {one.name: one.notes for one in report.counters}
    for name, notes in noted.items():
        for note in notes:
            yield f"{name}: {note}"
