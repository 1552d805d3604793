"""The table that a person reads."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from island_fast.bench.report import Counter, Report, Row, Spread
from island_fast.cli import text as show

__all__ = ["draw", "number", "reach_text"]


def number(value: float) -> str:
    """Three digits, whatever the size."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def reach_text(reach: float | None, better: str) -> str:
    """Such as "at least 12"; "" for none."""
    if reach is None:
        return ""
    return f"at {'least' if better == 'higher' else 'most'} {reach:.3g}"


def draw(report: Report, console: Console) -> None:
    """Write the report as tables to a console."""
    console.print(f"island {report.versions['island']}, {report.started}", highlight=False)
    console.print("; ".join(_sizes(report)), highlight=False)
    console.print("; ".join(f"{key} {value}" for key, value in report.machine.items()), highlight=False)
    if report.rows:
        console.print(_rows(report))
    if report.counters:
        console.print(_counters(report))
    for one in report.left_out:
        how = "failed" if one.failed else "left out"
        console.print(f"{how}: {one.name}: {one.reason}", highlight=False, markup=False)
    for note in _notes(report):
        console.print(note, highlight=False, markup=False)


def _sizes(report: Report) -> Iterator[str]:
    """How big the volumes were."""
    for name in ("small", "large"):
        if size := report.parameters.get(name):
            data, volume = (show.size(size[key]) for key in ("allocated", "volume"))
            yield f"the {name} volume: {data} of data in {volume}"


def _rows(report: Report) -> Table:
    """A line for each work, and below it one for each peer: medians, ratios, and how sure they are."""
    table = Table("", "ours", "theirs", "ratio", "95 %", "to reach", "pairs", box=box.SIMPLE, padding=(0, 1))
    for column in table.columns[1:]:
        column.no_wrap = True
        column.justify = "right"
    named = ""
    for row in report.rows:
        if row.work != named:
            table.add_row(f"[bold]{row.work}[/]")
            named = row.work
        table.add_row(
            f"  against {row.against}",
            _median(row.ours, row.unit),
            _median(row.theirs, row.unit),
            _ratio(row),
            f"{number(row.ratio.sure_low)} to {number(row.ratio.sure_high)}",
            reach_text(row.reach, row.better),
            str(len(row.ratio.values)),
        )
    return table


def _median(spread: Spread, unit: str) -> str:
    """The median, and half of what lies between the quartiles as a share of it."""
    share = (spread.high - spread.low) / 2 / spread.median if spread.median else 0.0
    return f"{number(spread.median)} {unit} ±{share:3.0%}"


def _ratio(row: Row) -> str:
    """The ratio; bold where it was reached, red where not."""
    text = f"{number(row.ratio.median)}x"
    return {True: f"[bold green]{text}[/]", False: f"[bold red]{text}[/]", None: text}[row.reached]


def _counters(report: Report) -> Table:
    table = Table("counted", "value", "unit", "to reach", box=box.SIMPLE)
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
        if notes:
            yield f"{name}: {'; '.join(notes)}"
