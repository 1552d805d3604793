"""`island unpin`: its options, and the text of its answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from island_fast.cli.help import HOW, WHAT, option, verb
from island_fast.cli.options import FileName, add_common_options, open_repository
from island_fast.cli.run import Run
from island_fast.cli.text import count, printable, size

if TYPE_CHECKING:
    from island_fast.results import Unpinned

__all__ = ["unpin"]


@verb("Drop the pins that snapshots left in an image")
@click.argument("image", type=FileName())
@option(WHAT, "--orphans", is_flag=True,
        help="Drop only pins left by interrupted snapshots; needs a repository.")  # fmt: skip
@option(HOW, "--qmp", metavar="SOCKET", type=FileName(),
        help="QMP socket of the process that has IMAGE open.")  # fmt: skip
@add_common_options
@click.pass_obj
def unpin(run: Run, image: Path, orphans: bool, qmp: Path | None) -> None:
    """Drop all pins from the qcow2 file IMAGE, of whatever repository.

    Pins keep the old data of blocks that were overwritten since the last snapshot, so the image grows. After
    this the next snapshot of IMAGE scans it in full and stores what differs; stored snapshots are not
    touched.

    \b
    Example:
      island unpin disk.qcow2
      island unpin vm.qcow2 --qmp /run/vm.qmp
    """  # noqa: D301
    from island_fast.operations.unpin import unpin

    run.if_interrupted = lambda: "'island info' shows which pins are still there"
    if orphans:
        with open_repository(run) as repository:
            answer = unpin(image, qmp, orphaned_in=repository)
    else:
        answer = unpin(image, qmp)
    run.answer(answer.as_json(), _format_unpinned(answer, orphans))


def _format_unpinned(unpinned: Unpinned, orphans: bool) -> str:
    """Return a sentence on what was dropped: all pins, or only `orphans`."""
    image = printable(unpinned.image)
    if not unpinned.pins:
        if orphans:
            return f"No interrupted snapshot left a pin in {image}; other pins stay."
        return f"There is no pin in {image}."
    left = "other pins stay" if orphans else "the next snapshot scans in full"
    dropped = count(len(unpinned.pins), "pin")
    return f"Dropped {dropped} from {image}: {size(unpinned.bytes_freed)} freed; {left}."
