"""Make the tables of docs/benchmarks.md from benchmarks/baseline.json.

scripts/benchmarks.py            check that the page has these tables
scripts/benchmarks.py --write    write them into the page
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from island_fast.bench.report import Counter, Report, Row, load_report
from island_fast.bench.table import format_number, format_target

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
BASELINE = ROOT / "benchmarks" / "baseline.json"
_TABLES = re.compile(r"(?<=<!-- tables -->\n).*?(?=<!-- end of tables -->)", re.DOTALL)


def make_tables(report: Report) -> str:
    """Return the report as the page shows it."""
    return "\n".join(
        [*_describe(report), "", *_make_row_table(report.rows), "", *_make_counter_table(report.counters), ""]
    )


def _describe(report: Report) -> Iterator[str]:
    machine = "; ".join(f"{key} {value}" for key, value in report.machine.items())
    yield f"Measured on {report.started[:10]} against {report.describe_peers()}.\n"
    ours = "; ".join(f"{name} {report.versions[name]}" for name in ("island", "python", "numpy"))
    yield f"{ours}; {machine}."


def _make_row_table(rows: tuple[Row, ...]) -> Iterator[str]:
    yield "| work | against | ours | theirs | ratio (95 %) | to reach | pairs |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        ours, theirs = (f"{format_number(spread.median)} {row.unit}" for spread in (row.ours, row.theirs))
        sure = f"({format_number(row.ratio.sure_low)} to {format_number(row.ratio.sure_high)})"
        ratio = _mark(f"{format_number(row.ratio.median)}x", row.reached)
        reach = format_target(row.reach, row.better)
        cells = [row.work, row.against, ours, theirs, f"{ratio} {sure}", reach, str(len(row.ratio.values))]
        yield f"| {' | '.join(cells)} |"


def _make_counter_table(counters: tuple[Counter, ...]) -> Iterator[str]:
    yield "| counted | value | to reach |"
    yield "|---|---|---|"
    for one in counters:
        value = f"{one.value:,.0f}" if one.value == int(one.value) else format_number(one.value)
        reach = format_target(one.reach, one.better)
        yield f"| {one.name} | {_mark(f'{value} {one.unit}'.strip(), one.reached)} | {reach} |"


def _mark(text: str, reached: bool | None) -> str:
    """Make a value that meets its target bold, and mark one that misses it."""
    return {True: f"**{text}**", False: f"{text}, short", None: text}[reached]


def main() -> int:
    """Write the tables, or check that the page has them."""
    page = PAGE.read_text()
    made = _TABLES.sub(lambda _: make_tables(load_report(BASELINE)), page)
    if "--write" in sys.argv[1:]:
        PAGE.write_text(made)
    elif made != page:
        text = f"the tables of {PAGE.name} differ from {BASELINE.name}; run scripts/benchmarks.py --write"
        print(text, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
