"""`island copy`: its options, and the text of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from island_fast.cli.help import REPOSITORY, WHAT, option, verb
from island_fast.cli.options import (
    NAMING,
    add_common_options,
    add_limit_options,
    complete_directory,
    complete_snapshot,
    create_option,
    open_repository,
    open_second_repository,
    volume_option,
)
from island_fast.cli.run import Run
from island_fast.cli.text import count, duration, size
from island_fast.errors import UsageError

if TYPE_CHECKING:
    from island_fast.results import Copied

__all__ = ["copy"]


@verb("Copy snapshots to another repository", epilog=NAMING)
@click.argument("snapshots", metavar="[SNAPSHOT]...", nargs=-1, shell_complete=complete_snapshot)
@volume_option("Copy all snapshots of this volume.")
@option(WHAT, "--all", "every", is_flag=True, help="Copy all snapshots of all volumes.")
@option(REPOSITORY, "--to", metavar="WHERE", required=True, shell_complete=complete_directory,
        help="The repository to copy to: a directory, or swift://CONTAINER/PREFIX.")  # fmt: skip
@create_option()
@add_limit_options
@add_common_options
@click.pass_obj
def copy(
    run: Run, snapshots: tuple[str, ...], volume: str | None, every: bool, to: str, create_anew: bool
) -> None:
    """Copy snapshots to another repository, such as one in another region.

    A copy keeps the id, label and time of its snapshot, and needs nothing from the first repository. Only
    blocks missing from the neighbouring copies are sent, each verified on the way; what an interrupted copy
    had sent is not sent again. This host owns the copied volumes in that repository, which is created if
    WHERE is an empty or new directory, or an empty place in a container.

    With --all or --volume, snapshots stay away that were deleted in the other repository, for example by
    'island retain' there. Those that you name are copied again.

    If both are in Swift and need different credentials, set those for --to in the same variables with
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
    run.second = to
    run.if_interrupted = lambda: "snapshots that were copied are complete there; run it again to resume"
    with (
        open_repository(run) as repository,
        open_second_repository(run, to, create_anew=create_anew) as other,
        run.progress() as progress,
    ):
        copied = repository.copy(other, snapshots or None, volume=volume, progress=progress)
        run.note_if_empty(copied, repository, "there are no snapshots")
    if copied or not repository.left_out:
        run.answer([one.as_json() for one in copied], _format_copied(copied))
    run.finish_with(repository.left_out)


def _format_copied(copied: Sequence[Copied]) -> str:
    """Return a sentence for each snapshot that was copied, and one for all that existed there."""
    lines = [
        f"Copied snapshot {one.snapshot} of volume {one.volume}: {size(one.bytes_read)} read, "
        f"{size(one.bytes_stored)} stored in {count(one.objects_written, 'object')}; {duration(one.seconds)}."
        for one in copied
        if one.copied
    ]
    if there := sum(not one.copied and not one.deleted for one in copied):
        lines.append(f"{count(there, 'snapshot')} {'was' if there == 1 else 'were'} there already.")
    if gone := sum(one.deleted for one in copied):
        was = "was" if gone == 1 else "were"
        lines.append(
            f"{count(gone, 'snapshot')} {was} deleted there, and not copied again; name one to copy it again."
        )
    return "\n".join(lines)
