"""`island show`: its options, and what a person reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from island_fast.cli.options import NAMING, common, opened, snapshots_known
from island_fast.cli.run import Run
from island_fast.cli.text import printable, sheet, size

if TYPE_CHECKING:
    from island_fast.results import SnapshotShown

__all__ = ["format_snapshot"]


@click.command("show", epilog=NAMING)
@click.argument("snapshot", shell_complete=snapshots_known)
@common
@click.pass_obj
def show_(run: Run, snapshot: str) -> None:
    """Show one snapshot, and what deleting it would free.

    \b
    Example:
      island -r /srv/snapshots show disk@latest
    """  # noqa: D301
    with opened(run) as repository:
        found = repository.show(snapshot)
    run.answer(found.as_json(), format_snapshot(found), found.snapshot)


def format_snapshot(answer: SnapshotShown) -> str:
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
