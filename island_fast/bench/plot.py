"""The picture of a report: every ratio on a logarithmic axis, its interval, and what it was to reach."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from island_fast.bench.results import Report, Row
from island_fast.bench.table import number
from island_fast.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check", "draw"]

_WIDTH = 11.0  # inches
_LINE = 0.36  # inches for each row
_DPI = 150
_GOOD, _BAD, _PLAIN, _MARK, _FAINT = "#1b7f5c", "#c0392b", "#4a6fa5", "#222222", "#8a8a8a"
_FASTER = "Times faster than …   (right is better)"
_COST = "Times what … takes   (left is better)"


def check() -> None:
    """Raise UsageError if nothing can be drawn: before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("--plot needs matplotlib; pip install 'island-fast[bench]'") from error


def draw(report: Report, path: Path) -> None:
    """Write the report's ratios as a PNG. Raises UsageError if it has none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [
        (title, [row for row in report.rows if row.better == better])
        for title, better in ((_FASTER, "higher"), (_COST, "lower"))
    ]
    groups = [(title, rows) for title, rows in groups if rows]
    if not groups:
        raise UsageError("nothing was measured that could be drawn; see what was left out")
    sizes = [len(rows) + 1.2 for _, rows in groups]
    figure = Figure(figsize=(_WIDTH, 1.4 + _LINE * sum(sizes) + 0.5 * len(groups)), dpi=_DPI)
    FigureCanvasAgg(figure)
    for axes, (title, rows) in zip(
        figure.subplots(len(groups), 1, squeeze=False, height_ratios=sizes)[:, 0], groups, strict=True
    ):
        _draw_group(axes, title, rows)
    figure.suptitle(_title(report), x=0.01, y=0.995, ha="left", va="top", fontsize=13, weight="bold")
    figure.text(0.01, 0.005, _foot(report), fontsize=8, color=_FAINT, va="bottom")
    margin = 0.45 / figure.get_figheight()
    figure.tight_layout(rect=(0, margin, 1, 1 - margin))
    figure.savefig(path, format="png")


def _title(report: Report) -> str:
    return f"island {report.versions['island'].partition(',')[0]}, measured against what people use instead"


def _foot(report: Report) -> str:
    machine = report.machine
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['file system']}"
    marks = "dot: median of alternating pairs, line: its 95 % interval, bar: what is to be reached"
    return f"{marks}.   {where}; {report.started[:10]}{'; --quick' if report.parameters.get('quick') else ''}"


def _draw_group(axes: Axes, title: str, rows: Sequence[Row]) -> None:
    """One panel: a line for each row, the first one on top."""
    axes.set_xscale("log")
    axes.set_title(title, loc="left", fontsize=10, color=_MARK)
    low, high = _span(rows)
    axes.set_xlim(low, high)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(1, color=_FAINT, linewidth=1, zorder=1)
    for place, row in enumerate(rows):
        _draw_row(axes, place, row, high)
    axes.set_yticks(range(len(rows)), [f"{row.work}\nagainst {row.against}" for row in rows], fontsize=8)
    ticks = [
        tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= tick <= high
    ]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks], fontsize=9)
    axes.set_xticks([], minor=True)
    axes.grid(axis="x", color="#e6e6e6", zorder=0)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _span(rows: Sequence[Row]) -> tuple[float, float]:
    """Ends of the axis: all that is drawn, 1, and room for the numbers."""
    drawn = [1.0]
    for row in rows:
        drawn += [row.ratio.sure_low, row.ratio.sure_high, *([row.reach] if row.reach else [])]
    return min(drawn) / 1.25, max(drawn) * 2


def _draw_row(axes: Axes, place: int, row: Row, right: float) -> None:
    """The interval, the median, the target, and the number in words at the right."""
    colour = {True: _GOOD, False: _BAD, None: _PLAIN}[row.reached]
    ratio = row.ratio
    axes.plot([1, ratio.median], [place, place], color=colour, alpha=0.25, linewidth=7, solid_capstyle="butt")
    axes.plot([ratio.sure_low, ratio.sure_high], [place, place], color=colour, linewidth=2)
    axes.plot([ratio.median], [place], "o", color=colour, markersize=7)
    told = f"{number(ratio.median)}x"
    if row.reach is not None:
        axes.plot([row.reach, row.reach], [place - 0.36, place + 0.36], color=_MARK, linewidth=2.2)
        told += f"  ({'≥' if row.better == 'higher' else '≤'} {row.reach:g})"
    axes.text(right, place, told, ha="right", va="center", fontsize=9, color=colour, weight="bold")
