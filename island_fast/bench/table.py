"""Print a report as tables for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from island_fast.bench.report import Report, Row, Spread
from island_fast.cli import text as text_module

__all__ = ["format_number", "format_target", "print_report"]


def format_number(value: float) -> str:
    """Return a number with about three digits."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def format_target(reach: float | None, better: str) -> str:
    """Return a target as text, such as "at least 12"; "" if there is none."""
    if reach is None:
        return ""
    return f"at {'least' if better == 'higher' else 'most'} {reach:.3g}"


def print_report(report: Report, console: Console) -> None:
    """Print a report as tables, with what was left out, and notes."""
    against = f", against {peers}" if (peers := report.describe_peers()) else ""
    console.print(f"island {report.versions['island']}{against}, {report.started}", highlight=False)
    console.print("; ".join(_describe_volumes(report)), highlight=False)
    console.print("; ".join(f"{key} {value}" for key, value in report.machine.items()), highlight=False)
    if report.rows:
        console.print(_make_row_table(report))
    if report.counters:
        console.print(_make_counter_table(report))
    for one in report.left_out:
        how = "failed" if one.failed else "left out"
        console.print(f"{how}: {one.name}: {one.reason}", highlight=False, markup=False)
    noted = {row.name: row.notes for row in report.rows} | {one.name: one.notes for one in report.counters}
    for name, notes in noted.items():
        if notes:
            console.print(f"{name}: {'; '.join(notes)}", highlight=False, markup=False)


def _describe_volumes(report: Report) -> Iterator[str]:
    """Yield the size of each volume."""
    for name in ("small", "large"):
        if size := report.parameters.get(name):
            data, volume = (text_module.size(size[key]) for key in ("allocated", "volume"))
            yield f"the {name} volume: {data} of data in {volume}"


def _make_row_table(report: Report) -> Table:
    """Return a table with a heading for each work, and below it a line for each peer."""
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
            _format_median(row.ours, row.unit),
            _format_median(row.theirs, row.unit),
            _format_ratio(row),
            f"{format_number(row.ratio.sure_low)} to {format_number(row.ratio.sure_high)}",
            format_target(row.reach, row.better),
            str(len(row.ratio.values)),
        )
    return table


def _format_median(spread: Spread, unit: str) -> str:
    """Return the median, and half the distance between the quartiles as a share of it."""
    share = (spread.high - spread.low) / 2 / spread.median if spread.median else 0.0
    return f"{format_number(spread.median)} {unit} ±{share:3.0%}"


def _format_ratio(row: Row) -> str:
    """Return the ratio, green if it meets its target and red if not."""
    text = f"{format_number(row.ratio.median)}x"
    return {True: f"[bold green]{text}[/]", False: f"[bold red]{text}[/]", None: text}[row.reached]


def _make_counter_table(report: Report) -> Table:
    table = Table("counted", "value", "unit", "to reach", box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for counter in report.counters:
        whole = counter.value == int(counter.value)
        value = f"{counter.value:,.0f}" if whole else format_number(counter.value)
        if counter.reached is False:
            value = f"[bold red]{value}[/]"
        target = format_target(counter.reach, counter.better)
        table.add_row(counter.name, value, counter.unit, target)
    return table
