"""`island show`: its options, and the text of its answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from island_fast.cli.help import verb
from island_fast.cli.options import NAMING, add_common_options, complete_snapshot, open_repository
from island_fast.cli.run import Run
from island_fast.cli.text import after_grace, freed, printable, sheet, size

if TYPE_CHECKING:
    from island_fast.results import SnapshotShown

__all__ = ["show_"]

_STATES = {
    "offline": "offline: no process had the image open for writing",
    "filesystem": "filesystem: the guest's file systems were frozen",
    "crash": "crash: as after a power cut",
}
"""What each `consistency` of a snapshot means."""


@verb("Show one snapshot, and what deleting it would free", name="show", epilog=NAMING)
@click.argument("snapshot", shell_complete=complete_snapshot)
@add_common_options
@click.pass_obj
def show_(run: Run, snapshot: str) -> None:
    """Show one snapshot, and what deleting it would free.

    \b
    Example:
      island -r /srv/snapshots show disk@latest
    """  # noqa: D301
    with open_repository(run) as repository:
        found = repository.show(snapshot)
    run.answer(found.as_json(), _format_shown(found, repository.store.grace), found.snapshot)


def _format_shown(shown: SnapshotShown, grace: float) -> str:
    """Return all that is known of a snapshot."""
    guest = deleting = marked = ""
    if shown.keep:
        marked = f"kept until 'island keep --release {shown.volume}@{shown.snapshot}'"
    if shown.domain is not None:
        guest = f"domain {shown.domain}, disk {shown.disk}"
    if shown.bytes_unreferenced is not None and shown.bytes_freed is not None:
        figures = freed(shown.bytes_freed, shown.bytes_unreferenced)
        deleting = f"lets 'island sweep' free {figures}{after_grace(grace)}"
    return sheet(
        [
            ("snapshot", shown.snapshot),
            ("volume", f"{shown.volume}, {size(shown.volume_size)}"),
            ("lineage", shown.lineage),
            ("parent", shown.parent or "none"),
            ("label", printable(shown.label)),
            ("marked", marked),
            ("created", shown.created),
            ("state", _STATES.get(shown.consistency or "", "")),
            ("guest", printable(guest)),
            ("group", printable(shown.group or "")),
            ("stored", size(shown.bytes_stored)),
            ("deleting", deleting),
        ]
    )
