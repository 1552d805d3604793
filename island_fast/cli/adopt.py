"""`island adopt`: its options, and the text of its answer."""

from __future__ import annotations

import click

from island_fast.cli.help import verb
from island_fast.cli.options import add_common_options, open_repository
from island_fast.cli.run import Run
from island_fast.cli.text import count

__all__ = ["adopt"]


@verb("Make this host the owner of a volume")
@click.argument("volume")
@add_common_options
@click.pass_obj
def adopt(run: Run, volume: str) -> None:
    """Make this host the owner of VOLUME, and let its next snapshot come from any image.

    One host owns a volume's snapshots: only the owner takes, deletes and sweeps them. Adopt a volume when its
    host is gone, when that host's local state is lost, or to continue the volume with another image.

    \b
    Example:
      island -r swift://volumes/host7 adopt disk
    """  # noqa: D301
    run.if_interrupted = lambda: "all snapshots are unchanged; run it again"
    with open_repository(run) as repository:
        adopted = repository.adopt(volume)
    run.answer(
        adopted.as_json(),
        f"This host now owns volume {adopted.volume} with {count(adopted.snapshots, 'snapshot')} "
        f"(epoch {adopted.epoch}).",
    )
