"""Values as people read them: sizes, durations, tables, and text that cannot mislead a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import zip_longest

__all__ = [
    "SHORT_ID",
    "after_grace",
    "age",
    "count",
    "duration",
    "freed",
    "printable",
    "sheet",
    "size",
    "table",
    "terminal_width",
]

SHORT_ID = 12
"""Digits of an id in tables: they name a snapshot as well as all 32 do."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def size(count: int) -> str:
    """Return a number of bytes with a binary unit, such as 512 B or 1.5 GiB."""
    value, unit = float(count), 0
    while abs(round(value, 1)) >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{count} B"


def duration(seconds: float) -> str:
    """Return a time span as 0.42 s, 12.3 s, 2 min 5 s or 3 h 20 min."""
    if round(seconds, 2) < 10:
        return f"{seconds:.2f} s"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def age(seconds: float) -> str:
    """Return an age that was set, such as 24 h, 7 d, 90 min or 1.5 s: in the largest unit that is whole."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        number, rest = divmod(seconds, unit)
        if number > 1 and not rest:
            return f"{number:.0f} {name}"
    return f"{seconds:g} s"


def after_grace(grace: float) -> str:
    """Return when a sweep will free what is young, to follow a size; "" for a store without a grace."""
    return f" once it is {age(grace)} old (--grace)" if grace else ""


def count(number: int, what: str) -> str:
    """Return a number of things: 1 object, 2 objects."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def freed(by_sweep: int, unneeded: int) -> str:
    """Return what deleting a snapshot lets a sweep free, and what only that snapshot needs if it differs.

    A sweep frees more if it then rewrites a pack that held older garbage, less if a pack stays mostly needed.
    """
    if by_sweep == unneeded:
        return size(by_sweep)
    if by_sweep > unneeded:
        return f"{size(by_sweep)} ({size(unneeded)} of it this snapshot's)"
    return f"{size(by_sweep)} (of {size(unneeded)} that only this snapshot needs)"


def printable(text: str) -> str:
    """Return `text` on one line; what cannot be printed is escaped as in a Python string."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def sheet(rows: Iterable[tuple[str, str]]) -> str:
    """Return names and values, the values in one column; rows without a value are left out.

    On a terminal that is too narrow a value is wrapped, at spaces only.
    """
    rows = [(name, value) for name, value in rows if value]
    width = max(len(name) for name, _ in rows)
    room = (terminal_width() or sys.maxsize) - width - 2
    lines = []
    for name, value in rows:
        parts = [value]
        if len(value) > room:
            from textwrap import wrap  # here: only a narrow terminal needs it

            parts = wrap(value, max(room, 1), break_long_words=False, break_on_hyphens=False)
        lines += [f"{title:<{width}}  {part}" for title, part in zip_longest([name], parts, fillvalue="")]
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return columns under a header; those whose numbers are in `right` are aligned to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def terminal_width() -> int | None:
    """Return the columns of the terminal on standard output, None if it is not a terminal."""
    try:
        if not sys.stdout.isatty():
            return None
    except (AttributeError, ValueError):  # there is no standard output, or it is closed
        return None
    from shutil import get_terminal_size  # here: it imports much that a run in a pipe does without

    return get_terminal_size().columns
