"""`island delete`: its options, and the text of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from island_fast.cli.help import verb
from island_fast.cli.options import (
    NAMING,
    add_common_options,
    complete_snapshot,
    dry_run_option,
    open_repository,
)
from island_fast.cli.run import Run
from island_fast.cli.text import after_grace, freed

if TYPE_CHECKING:
    from island_fast.results import Deleted

__all__ = ["delete"]


@verb("Delete snapshots", epilog=NAMING)
@click.argument("snapshots", metavar="SNAPSHOT...", nargs=-1, required=True, shell_complete=complete_snapshot)
@dry_run_option()
@add_common_options
@click.pass_obj
def delete(run: Run, snapshots: tuple[str, ...], dry_run: bool) -> None:
    """Delete snapshots; all others stay complete.

    If one of them is not found, none is deleted. 'island sweep' frees their space, in Swift not before it is
    24 hours old.

    \b
    Example:
      island -r /srv/snapshots delete --dry-run 6f0c2a91b3d4
      island -r /srv/snapshots delete 6f0c2a91b3d4 disk@81d0
    """  # noqa: D301
    if not dry_run:
        run.if_interrupted = lambda: "'island list' shows which snapshots still exist"
    with open_repository(run) as repository:
        deleted = repository.delete(snapshots, dry_run=dry_run)
    text = _format_deleted(deleted, dry_run, repository.store.grace)
    run.answer([one.as_json() for one in deleted], text)


def _format_deleted(deleted: Sequence[Deleted], dry_run: bool, grace: float) -> str:
    """Return a sentence for each snapshot."""
    did, frees = ("Would delete", "would then free") if dry_run else ("Deleted", "will free")
    return "\n".join(
        f"{did} snapshot {one.snapshot} of volume {one.volume}: 'island sweep' {frees} "
        f"{freed(one.bytes_freed, one.bytes_unreferenced)}{after_grace(grace)}."
        for one in deleted
    )
