"""`island adopt`: its options, and what a person reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from island_fast.cli.options import common, opened
from island_fast.cli.run import Run
from island_fast.cli.text import count

if TYPE_CHECKING:
    from island_fast.results import Adopted

__all__ = ["format_adopted"]


@click.command()
@click.argument("volume")
@common
@click.pass_obj
def adopt(run: Run, volume: str) -> None:
    """Make this host the owner of VOLUME, and let its next snapshot come from any image.

    One host owns a volume's snapshots: only it takes, deletes and sweeps them. Adopt a volume when its host
    is gone, when that host's local state is lost, or to go on with another image as that volume.

    \b
    Example:
      island -r swift://volumes/host7 adopt disk
    """  # noqa: D301
    run.if_interrupted = lambda: "all snapshots are as they were; run it again"
    with opened(run) as repository:
        adopted = repository.adopt(volume)
    run.answer(adopted.as_json(), format_adopted(adopted))


def format_adopted(answer: Adopted) -> str:
    """A sentence."""
    return (
        f"This host now owns volume {answer.volume} with {count(answer.snapshots, 'snapshot')} "
        f"(epoch {answer.epoch})."
    )
