"""What people read: sizes and times with their units, sheets, tables, and progress bars on a terminal.

Everything here is text for a person; programs get `as_json`. Text that came from a repository, an image or
a file name is shown with its control characters escaped, so that none of it can steer a terminal. The same
lines go to terminals and pipes: no colour, no wrapping, columns two spaces apart.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from island_fast.results import (
        Adopted,
        Deleted,
        DomainTaken,
        Restored,
        RestoredOnto,
        Snapshot,
        SnapshotShown,
        SnapshotTaken,
        Swept,
        Unpinned,
    )

__all__ = [
    "Bars",
    "Lines",
    "adopted",
    "deleted",
    "domain_taken",
    "duration",
    "listed",
    "pace",
    "printable",
    "restored",
    "restored_onto",
    "shown",
    "size",
    "swept",
    "taken",
    "unpinned",
]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
SHORT_ID = 12
_REDRAW = 0.1  # seconds between two changes of a bar
_LINE_EVERY = 1.0  # seconds between two lines of progress
_PHASES = {
    "scan": "Scanning",
    "send": "Sending",
    "commit": "Committing",
    "zero": "Zeroing",
    "restore": "Restoring",
    "sweep": "Sweeping",
    "copy": "Copying",
    "look": "Looking",
    "verify": "Verifying",
    "compare": "Comparing",
    "mend": "Mending",
    "retain": "Deleting",
    "usage": "Reading manifests",
}


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


def pace(done: int, total: int, elapsed: float) -> str:
    """How far work is: bytes done and in all, the rate since it began, and the time left at that rate."""
    far = f"{size(done)} of {size(total)}"
    if elapsed <= 0 or done <= 0:
        return far
    rate = done / elapsed
    left = max(0, round((total - done) / rate))
    return f"{far}, {size(int(rate))}/s, {duration(left) if left >= 60 else f'{left} s'} left"


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


def taken(answer: SnapshotTaken) -> str:
    """A snapshot just made: how its change was found, and what it took."""
    return sheet(
        [
            ("snapshot", answer.snapshot),
            ("volume", f"{answer.volume}, {size(answer.volume_size)}"),
            ("parent", answer.parent or "none"),
            ("label", printable(answer.label)),
            ("rule", f"{answer.rule}: {printable(answer.reason)}"),
            (
                "blocks",
                f"{answer.blocks_candidate} may have changed, {answer.blocks_changed} did; 64 KiB each",
            ),
            ("kept", _kept(answer)),
            ("read", size(answer.bytes_read)),
            ("stored", f"{size(answer.bytes_stored)}; {count(answer.objects_written, 'object')} written"),
            ("time", duration(answer.seconds)),
        ]
    )


def domain_taken(answer: DomainTaken) -> str:
    """Snapshots just made of a guest's disks, and how the guest was."""
    guest = [
        ("domain", printable(answer.domain)),
        ("group", answer.group or ""),
        ("consistency", f"{answer.consistency}: {printable(answer.reason)}"),
    ]
    disks = [f"disk      {one.disk}, {printable(one.image)}\n{taken(one)}" for one in answer.snapshots]
    return "\n\n".join([sheet(guest), *disks])


def _kept(answer: SnapshotTaken) -> str:
    if not answer.attempt:
        return ""
    return f"{answer.blocks_kept} of these blocks were sent by an attempt that was interrupted"


def listed(answers: Sequence[Snapshot]) -> str:
    """A table of snapshots, ids cut to their first 12 digits."""
    rows = [
        (
            one.snapshot[:SHORT_ID],
            one.volume,
            one.created,
            size(one.volume_size),
            size(one.bytes_stored),
            (one.parent or "none")[:SHORT_ID],
            printable(one.label),
        )
        for one in answers
    ]
    return table(("SNAPSHOT", "VOLUME", "CREATED", "SIZE", "STORED", "PARENT", "LABEL"), rows, right=(3, 4))


def shown(answer: SnapshotShown) -> str:
    """One snapshot, ids in full."""
    return sheet(
        [
            ("snapshot", answer.snapshot),
            ("volume", f"{answer.volume}, {size(answer.volume_size)}"),
            ("lineage", answer.lineage),
            ("parent", answer.parent or "none"),
            ("label", printable(answer.label)),
            ("created", answer.created),
            ("guest", _guest(answer)),
            ("group", printable(answer.group or "")),
            ("stored", size(answer.bytes_stored)),
            ("deleting", _would_free(answer)),
        ]
    )


def _guest(answer: SnapshotShown) -> str:
    if answer.domain is None:
        return ""
    return printable(f"domain {answer.domain}, disk {answer.disk}; consistency: {answer.consistency}")


def _would_free(answer: SnapshotShown) -> str:
    if answer.bytes_unreferenced is None or answer.bytes_freed is None:
        return ""
    unneeded, freed = size(answer.bytes_unreferenced), size(answer.bytes_freed)
    return f"{unneeded} would be needed no more; the next sweep would free {freed}"


def restored(answer: Restored) -> str:
    """A volume just written."""
    return sheet(
        [
            ("target", f"{printable(answer.target)}, {answer.format}"),
            ("snapshot", answer.snapshot),
            ("volume", size(answer.volume_size)),
            ("read", f"{size(answer.bytes_read)} in {count(answer.objects_read, 'object')}"),
            ("written", size(answer.bytes_written)),
            ("time", duration(answer.seconds)),
        ]
    )


def restored_onto(answer: RestoredOnto, dry_run: bool) -> str:
    """An image just written onto, or what that would write."""
    written = size(answer.bytes_written)
    if answer.bytes_zeroed:
        written += f", and {size(answer.bytes_zeroed)} of zeros"
    return sheet(
        [
            ("target", f"{printable(answer.target)}, {answer.format}, {size(answer.target_size)}"),
            ("snapshot", answer.snapshot),
            ("volume", size(answer.volume_size)),
            ("compared", size(answer.bytes_compared)),
            ("read", f"{size(answer.bytes_read)} in {count(answer.objects_read, 'object')}"),
            ("differs" if dry_run else "written", written),
            ("time", duration(answer.seconds)),
        ]
    )


def deleted(answers: Sequence[Deleted], dry_run: bool) -> str:
    """A sentence for each snapshot."""
    did, unneeded, frees = (
        ("Would delete", "would be needed no more", "would free")
        if dry_run
        else ("Deleted", "are needed no more", "will free")
    )
    return "\n".join(
        f"{did} snapshot {one.snapshot} of volume {one.volume}: {size(one.bytes_unreferenced)} {unneeded}; "
        f"because of it the next sweep {frees} {size(one.bytes_freed)}."
        for one in answers
    )


def swept(answers: Sequence[Swept], dry_run: bool) -> str:
    """A sentence for each lineage; of a dry run, every object before it."""
    lines = []
    for one in answers:
        if dry_run:
            lines += [
                f"{step.action:7}  {size(step.bytes):>10}  {step.object}: {step.reason}" for step in one.steps
            ]
        lines.append(_swept(one, dry_run))
    return "\n".join(lines)


def _swept(one: Swept, dry_run: bool) -> str:
    if not one.objects_removed:
        return f"Volume {one.volume}: nothing to remove."
    remove, rewrite, free = (
        ("would remove", "rewrite", "free") if dry_run else ("removed", "rewrote", "freed")
    )
    removed = f"{remove} {count(one.objects_removed, 'object')} ({size(one.bytes_removed)})"
    if one.packs_repacked:
        removed += f" and {rewrite} {count(one.packs_repacked, 'pack')} ({size(one.bytes_rewritten)})"
    return f"Volume {one.volume}: {removed}; {free} {size(one.bytes_freed)}."


def adopted(answer: Adopted) -> str:
    """A sentence."""
    return (
        f"This host now owns volume {answer.volume} with {count(answer.snapshots, 'snapshot')} "
        f"(epoch {answer.epoch})."
    )


def unpinned(answer: Unpinned, orphans: bool) -> str:
    """A sentence on what was dropped: all pins, or only `orphans`."""
    if not answer.pins:
        if orphans:
            return f"No interrupted snapshot left a pin in {printable(answer.image)}; any other stays."
        return f"There is no pin in {printable(answer.image)}."
    left = "every other pin stays" if orphans else "the next snapshot scans in full"
    return (
        f"Dropped {count(len(answer.pins), 'pin')} from {printable(answer.image)}: "
        f"{size(answer.bytes_freed)} freed; {left}."
    )


class Bars:
    """Progress on standard error, one bar at a time; a context manager, and called as a `Progress`.

    Shows nothing unless `wanted` and standard error is a terminal; rich is imported only when a bar is
    shown. Bars are gone when it is left, whichever way. May be called from several threads.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted and sys.stderr is not None and sys.stderr.isatty()
        self._lock = threading.Lock()
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._phase = ""
        self._began = self._drawn = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._wanted = False
            if self._bars is not None:
                with contextlib.suppress(OSError):  # the terminal went away
                    self._bars.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of `phase` are done."""
        if not self._wanted:
            return
        with self._lock:
            now = time.monotonic()
            if not self._wanted:  # left meanwhile
                return
            if phase != self._phase:
                self._start(phase, now)
            elif now - self._drawn < _REDRAW and done < total:
                return
            self._drawn = now
            if self._bars is not None and self._task is not None:
                text = pace(done, total, now - self._began) if total else ""
                self._bars.update(self._task, completed=done, total=total or None, pace=text, refresh=True)

    def _start(self, phase: str, now: float) -> None:
        """Put a bar for `phase` in the place of the one before."""
        if self._bars is None:
            self._bars = _rich_progress()
            self._bars.start()
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(_PHASES.get(phase, phase), total=None, pace="")
        self._phase, self._began = phase, now


class Lines:
    """Progress as lines of JSON on standard error, for programs; a context manager, and a `Progress`.

    A line such as {"phase": "send", "done": 1048576, "total": 4194304}, in bytes: when a phase begins, once
    a second, and when it is done. May be called from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase = ""
        self._written = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Tell that `done` of `total` bytes of `phase` are done."""
        with self._lock:
            now = time.monotonic()
            if phase == self._phase and done < total and now - self._written < _LINE_EVERY:
                return
            self._phase, self._written = phase, now
            line = json.dumps({"phase": phase, "done": done, "total": total})
            if sys.stderr is not None:
                with contextlib.suppress(OSError, ValueError):
                    sys.stderr.write(line + "\n")
                    sys.stderr.flush()


def _rich_progress() -> Progress:
    """A rich display on standard error that removes itself when it is stopped."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[pace]}"),
        console=Console(stderr=True),
        auto_refresh=False,  # every change is drawn, and `_REDRAW` bounds how often one is
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
