"""Draw the chart of a report: every ratio on a logarithmic axis, with its interval and its target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from island_fast.bench.report import Report, Row
from island_fast.bench.table import format_number
from island_fast.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "require_matplotlib"]

_DPI = 150
_WIDTH = 11.0  # inches, like everything below
_LABELS, _VALUES, _HEAD, _FOOT = 3.9, 1.35, 0.6, 0.55
_LINE = 0.42  # for each row
_ABOVE, _BELOW = 0.42, 0.38  # a panel: its title, the numbers of its axis
_REACHED, _MISSED, _PLAIN, _DARK, _GREY = "#1b7f5c", "#c0392b", "#4a6fa5", "#222222", "#777777"
_TICKS = [factor * 10.0**power for power in range(-4, 5) for factor in (1, 2, 5)]
_PANELS = (
    ("theirs / ours", "higher", "How many times less island takes than the peer", "right is better"),
    ("ours / theirs", "lower", "What island takes, in multiples of the peer", "left is better"),
    ("ours / theirs", "higher", "The rate of island, in multiples of the peer", "right is better"),
)
_LEGEND = "dot: median of the pairs   thin line: its 95 % interval   black: target"


def require_matplotlib() -> None:
    """Raise UsageError if matplotlib is not installed. Called before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--plot needs matplotlib; run 'pip install matplotlib' in the same environment"
        ) from error


def draw(report: Report, path: Path) -> None:
    """Draw the ratios of a report as a PNG. Raises UsageError if it has none."""
    from matplotlib.figure import Figure

    panels = [
        (title, side, rows)
        for kind, better, title, side in _PANELS
        if (rows := [row for row in report.rows if (row.ratio_is, row.better) == (kind, better)])
    ]
    if not panels:
        raise UsageError("no ratio was measured, so there is nothing to draw; see what was left out")
    height = _HEAD + _FOOT + sum(_ABOVE + _BELOW + _LINE * len(rows) for *_, rows in panels)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    top = height - _HEAD
    for title, side, rows in panels:
        top -= _ABOVE + _LINE * len(rows)
        width = _WIDTH - _LABELS - _VALUES
        place = (_LABELS / _WIDTH, top / height, width / _WIDTH, _LINE * len(rows) / height)
        _draw_panel(figure.add_axes(place), title, side, rows)
        top -= _BELOW
    _draw_heading_and_foot(figure, height, report)
    figure.savefig(path, format="png")


def _draw_heading_and_foot(figure: Figure, height: float, report: Report) -> None:
    version = report.versions["island"].partition(",")[0]
    where = "; ".join(report.machine[key] for key in ("processor", "file system") if key in report.machine)
    cores = f"{report.machine['cores']} cores" if "cores" in report.machine else ""
    quick = "small volumes (--quick)" if report.parameters.get("quick") else ""
    foot = ";  ".join(filter(None, [where, cores, report.started[:10], quick]))
    heading = f"island {version}, compared with {report.describe_peers() or 'other tools'}"
    figure.text(0.012, 1 - 0.12 / height, heading, fontsize=11, weight="bold", va="top", color=_DARK)
    figure.text(0.012, 0.32 / height, _LEGEND, fontsize=8.5, va="center", color=_DARK)
    figure.text(0.012, 0.14 / height, foot, fontsize=8.5, va="center", color=_GREY)


def _draw_panel(axes: Axes, title: str, side: str, rows: Sequence[Row]) -> None:
    """Draw one panel: a line for each row, the first one at the top."""
    axes.set_xscale("log")
    low, high = _find_limits(rows)
    axes.set_xlim(low, high)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.annotate(
        title, (0, 1), (-(_LABELS - 0.13) * 72, 10), xycoords="axes fraction", textcoords="offset points",
        fontsize=11, weight="bold", color=_DARK, annotation_clip=False,
    )  # fmt: skip
    axes.annotate(
        side, (1, 1), (0, 10), xycoords="axes fraction", textcoords="offset points",
        fontsize=9, ha="right", color=_GREY, annotation_clip=False,
    )  # fmt: skip
    axes.axvline(1, color=_GREY, linewidth=1.2, zorder=1)
    for place, row in enumerate(rows):
        _draw_row(axes, place, row)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    if len(ticks) > 12:
        ticks = [tick for tick in ticks if f"{tick:e}".startswith("1")]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks], fontsize=9)
    axes.set_xticks([], minor=True)
    axes.set_yticks([])
    axes.grid(axis="x", color="#e4e4e4", zorder=0)
    axes.set_axisbelow(True)
    for edge in ("top", "right", "left"):
        axes.spines[edge].set_visible(False)


def _find_limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the ends of an axis that shows 1 and everything that is drawn."""
    drawn = [1.0]
    for row in rows:
        drawn += [row.ratio.sure_low, row.ratio.sure_high, *([row.reach] if row.reach else [])]
    return min(drawn) / 1.15, max(drawn) * 1.15


def _draw_row(axes: Axes, place: int, row: Row) -> None:
    """Draw the name at the left; interval, median and target; and the ratio as text at the right."""
    colour = {True: _REACHED, False: _MISSED, None: _PLAIN}[row.reached]
    ratio = row.ratio
    axes.plot([1, ratio.median], [place, place], color=colour, alpha=0.22, linewidth=8, solid_capstyle="butt")
    axes.plot([ratio.sure_low, ratio.sure_high], [place, place], color=colour, linewidth=1.8)
    inside = "white" if row.reached is False else colour
    axes.plot([ratio.median], [place], "o", color=colour, markerfacecolor=inside, markersize=7)
    text = f"{format_number(ratio.median)}x"
    if row.reach is not None:
        axes.plot([row.reach, row.reach], [place - 0.34, place + 0.34], color=_DARK, linewidth=2.4)
        text += f"  ({'≥' if row.better == 'higher' else '≤'} {row.reach:g}x)"
    right = axes.get_yaxis_transform()
    axes.text(1.02, place, text, transform=right, fontsize=9, va="center", color=colour, weight="bold")
    axes.text(
        -0.02, place - 0.04, row.work, transform=right, fontsize=8.5, ha="right", va="bottom", color=_DARK
    )
    against = f"against {row.against}"
    axes.text(-0.02, place + 0.02, against, transform=right, fontsize=8, ha="right", va="top", color=_GREY)
