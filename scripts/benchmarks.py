"""The tables of docs/benchmarks.md, made of benchmarks/baseline.json.

`--write` puts them in; without it, they are checked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from island_fast.bench.report import Counter, Report, Row, load
from island_fast.bench.table import number, reach_text

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
BASELINE = ROOT / "benchmarks" / "baseline.json"
_TABLES = re.compile(r"(?<=<!-- tables -->\n).*?(?=<!-- end of tables -->)", re.DOTALL)


def tables(report: Report) -> str:
    """The report as the page shows it."""
    return "\n".join([*_where(report), "", *_rows(report.rows), "", *_counters(report.counters), ""])


def _where(report: Report) -> Iterator[str]:
    machine = "; ".join(f"{key} {value}" for key, value in report.machine.items())
    versions = "; ".join(
        f"{name} {version.removeprefix(f'{name} ')}" for name, version in report.versions.items()
    )
    yield f"Measured on {report.started[:10]}: {machine}.\n"
    yield f"Versions: {versions}."


def _rows(rows: tuple[Row, ...]) -> Iterator[str]:
    yield "| work | against | ours | theirs | ratio (95 %) | to reach | pairs |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        ours, theirs = (f"{number(spread.median)} {row.unit}" for spread in (row.ours, row.theirs))
        sure = f"({number(row.ratio.sure_low)} to {number(row.ratio.sure_high)})"
        ratio = _marked(f"{number(row.ratio.median)}x", row.reached)
        reach = reach_text(row.reach, row.better)
        told = [row.work, row.against, ours, theirs, f"{ratio} {sure}", reach, str(len(row.ratio.values))]
        yield f"| {' | '.join(told)} |"


def _counters(counters: tuple[Counter, ...]) -> Iterator[str]:
    yield "| counted | value | to reach |"
    yield "|---|---|---|"
    for one in counters:
        value = f"{one.value:,.0f}" if one.value == int(one.value) else number(one.value)
        reach = reach_text(one.reach, one.better)
        yield f"| {one.name} | {_marked(f'{value} {one.unit}'.strip(), one.reached)} | {reach} |"


def _marked(text: str, reached: bool | None) -> str:
    """Bold what was reached; what was not says so."""
    return {True: f"**{text}**", False: f"{text}, short", None: text}[reached]


def main() -> int:
    """Write the tables, or say whether the page has them."""
    page = PAGE.read_text()
    made = _TABLES.sub(lambda _: tables(load(BASELINE)), page)
    if "--write" in sys.argv[1:]:
        PAGE.write_text(made)
    elif made != page:
        said = f"{PAGE.name} is not what {BASELINE.name} says; run scripts/benchmarks.py --write"
        print(said, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
