"""The picture of a report."""

from __future__ import annotations

from pathlib import Path

from island_fast.bench.results import Report
from island_fast.errors import UsageError

__all__ = ["check", "draw"]


def check() -> None:
    """Raise UsageError if nothing can be drawn: before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("--plot needs matplotlib; pip install 'island-fast[bench]'") from error


def draw(report: Report, path: Path) -> None:
    """Write the report's ratios as a PNG."""
