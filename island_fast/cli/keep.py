"""`island keep`: its options, and the text of its answer."""

from __future__ import annotations

import click

from island_fast.cli.help import WHAT, option, verb
from island_fast.cli.options import NAMING, add_common_options, complete_snapshot, open_repository
from island_fast.cli.run import Run

__all__ = ["keep"]


@verb("Mark snapshots that must not be deleted", epilog=NAMING)
@click.argument("snapshots", metavar="SNAPSHOT...", nargs=-1, required=True, shell_complete=complete_snapshot)
@option(WHAT, "--release", is_flag=True, help="Remove the marks instead.")
@add_common_options
@click.pass_obj
def keep(run: Run, snapshots: tuple[str, ...], release: bool) -> None:
    """Mark snapshots that must not be deleted: delete refuses them, and retain keeps them.

    If one of them is not found, none is marked. A marked snapshot still counts for the rules of retain. A
    copy of it in another repository is not marked.

    \b
    Example:
      island -r /srv/snapshots keep disk@latest
      island -r /srv/snapshots keep --release 6f0c2a91b3d4
    """  # noqa: D301
    run.if_interrupted = lambda: "'island list' shows which snapshots are marked"
    with open_repository(run) as repository:
        marked = repository.keep(snapshots, release=release)
    lines = []
    for one in marked:
        undo = f"'island keep --release {one.volume}@{one.snapshot}'"
        did = "may be deleted again" if release else f"is kept until you run {undo}"
        lines.append(f"Snapshot {one.snapshot} of volume {one.volume} {did}.")
    run.answer([one.as_json() for one in marked], "\n".join(lines))
