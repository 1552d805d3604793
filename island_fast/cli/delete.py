"""`island delete`: its options, and what a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from island_fast.cli.options import NAMING, common, opened, snapshots_known
from island_fast.cli.run import Run
from island_fast.cli.text import size

if TYPE_CHECKING:
    from island_fast.results import Deleted

__all__ = ["format_deleted"]


@click.command(epilog=NAMING)
@click.argument("snapshots", metavar="SNAPSHOT...", nargs=-1, required=True, shell_complete=snapshots_known)
@click.option("--dry-run", is_flag=True, help="Change nothing, and tell what would be freed.")
@common
@click.pass_obj
def delete(run: Run, snapshots: tuple[str, ...], dry_run: bool) -> None:
    """Delete snapshots; all others stay whole.

    All are looked up before the first is deleted. Their space is freed by the next 'island sweep'.

    \b
    Example:
      island -r /srv/snapshots delete --dry-run 6f0c2a91b3d4
      island -r /srv/snapshots delete 6f0c2a91b3d4 disk@81d0
    """  # noqa: D301
    if not dry_run:
        run.if_interrupted = lambda: "'island list' shows which snapshots are still there"
    with opened(run) as repository:
        deleted = repository.delete(snapshots, dry_run=dry_run)
    run.answer([one.as_json() for one in deleted], format_deleted(deleted, dry_run))


def format_deleted(answers: Sequence[Deleted], dry_run: bool) -> str:
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
