"""`island copy`: its options, and what a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from island_fast.cli import text
from island_fast.cli.options import (
    NAMING,
    common,
    directories,
    limits,
    opened,
    other_opened,
    snapshots_known,
)
from island_fast.cli.run import Run
from island_fast.errors import UsageError

if TYPE_CHECKING:
    from island_fast.results import Copied

__all__ = ["copy"]


@click.command(epilog=NAMING)
@click.argument("snapshots", metavar="[SNAPSHOT]...", nargs=-1, shell_complete=snapshots_known)
@click.option("--volume", metavar="NAME", help="Copy all snapshots of this volume.")
@click.option("--all", "every", is_flag=True, help="Copy all snapshots of all volumes.")
@click.option("--to", metavar="WHERE", required=True, shell_complete=directories,
              help="The repository to copy to: a directory's path, or swift://CONTAINER/PREFIX.")  # fmt: skip
@limits
@common
@click.pass_obj
def copy(run: Run, snapshots: tuple[str, ...], volume: str | None, every: bool, to: str) -> None:
    """Copy snapshots to another repository, such as one in another region.

    A copy keeps the id, label and time of its snapshot, and every one is whole by itself there, too. Only
    blocks that no copy next to it has are sent, each checked on the way; what is there already is not sent
    again, nor what an interrupted copy had sent. Copied volumes belong to this host in that repository, which
    is made if WHERE is an empty or new directory, or an empty place in a container.

    Where both are in Swift and need different credentials, those for --to are in the same variables with
    ISLAND_TO_ before their names, such as ISLAND_TO_OS_CLOUD or ISLAND_TO_ST_AUTH.

    \b
    Example:
      island -r /srv/snapshots copy --to swift://volumes/host7 --all
      island -r swift://volumes/host7 copy --to /mnt/disk disk@latest
    """  # noqa: D301
    if bool(snapshots) + bool(volume) + every != 1:
        raise UsageError("name snapshots, or give --volume NAME, or --all")
    if not to:
        raise UsageError("--to names no repository; give a directory's path, or swift://CONTAINER/PREFIX")
    run.if_interrupted = lambda: "what was copied is whole there; the next copy goes on"
    with opened(run) as repository, other_opened(run, to) as other, run.progress() as progress:
        copied = repository.copy(other, snapshots or None, volume=volume, progress=progress)
        if not copied and not run.quiet and not repository.left_out:
            run.note(f"there are no snapshots in {repository.store.location}")
    if copied or not repository.left_out:
        ids = "\n".join(one.snapshot for one in copied if one.copied)
        run.answer([one.as_json() for one in copied], _told(copied), ids)
    run.left_out(repository.left_out)


def _told(answers: Sequence[Copied]) -> str:
    """A sentence for each snapshot that was copied, and one for all that were there."""
    lines = [
        f"Copied snapshot {one.snapshot} of volume {one.volume}: {text.size(one.bytes_read)} read, "
        f"{text.size(one.bytes_stored)} stored in {text.count(one.objects_written, 'object')}; "
        f"{text.duration(one.seconds)}."
        for one in answers
        if one.copied
    ]
    if there := sum(not one.copied for one in answers):
        lines.append(f"{text.count(there, 'snapshot')} {'was' if there == 1 else 'were'} there already.")
    return "\n".join(lines)
