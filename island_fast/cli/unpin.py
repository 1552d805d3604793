"""`island unpin`: its options, and what a person reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from island_fast.cli.options import FileName, common, opened
from island_fast.cli.run import Run
from island_fast.cli.text import count, printable, size

if TYPE_CHECKING:
    from island_fast.results import Unpinned

__all__ = ["format_unpinned"]


@click.command()
@click.argument("image", type=FileName())
@click.option("--qmp", metavar="SOCKET", type=FileName(),
              help="QMP socket of the process that has IMAGE open.")  # fmt: skip
@click.option("--orphans", is_flag=True,
              help="Only those that interrupted snapshots left, by the repository's catalog.")  # fmt: skip
@common
@click.pass_obj
def unpin(run: Run, image: Path, qmp: Path | None, orphans: bool) -> None:
    """Drop all pins from the qcow2 file IMAGE, of whatever repository.

    They hold what was written over since the last snapshot. The next snapshot of IMAGE scans in full and
    stores what differs; snapshots that are stored stay as they are. Only --orphans needs a repository.

    \b
    Example:
      island unpin disk.qcow2
      island unpin vm.qcow2 --qmp /run/vm.qmp
    """  # noqa: D301
    from island_fast.operations.unpin import unpin

    run.if_interrupted = lambda: "'island info' shows which pins are still there"
    if orphans:
        with opened(run) as repository:
            answer = unpin(image, qmp, orphaned_in=repository)
    else:
        answer = unpin(image, qmp)
    run.answer(answer.as_json(), format_unpinned(answer, orphans), "\n".join(answer.pins))


def format_unpinned(answer: Unpinned, orphans: bool) -> str:
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
