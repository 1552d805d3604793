"""How people read values: sizes, durations, tables, and text that a terminal cannot be misled by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

__all__ = ["duration", "printable", "size"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
SHORT_ID = 12


def size(count: int) -> str:
    """A number of bytes with a binary unit, such as 512 B or 1.5 GiB."""
    value, unit = float(count), 0
    while abs(round(value, 1)) >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{count} B"


def duration(seconds: float) -> str:
    """A time span: 0.42 s, 12.3 s, 2 min 5 s, 3 h 20 min."""
    if round(seconds, 2) < 10:
        return f"{seconds:.2f} s"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def printable(text: str) -> str:
    """`text` on one line, with what is not printable escaped as in a Python string."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def count(number: int, what: str) -> str:
    """A number of things: 1 object, 2 objects."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def sheet(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values, a line each, the values below each other; what has no value is left out."""
    rows = [(name, value) for name, value in rows if value]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns under a header; those numbered in `right` are aligned to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


# The answers of the verbs.
