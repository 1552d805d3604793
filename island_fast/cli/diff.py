"""`island diff`: its options, and what a person reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from island_fast.cli import text
from island_fast.cli.options import common, opened, snapshots_known
from island_fast.cli.run import Run

if TYPE_CHECKING:
    from island_fast.results import Difference

__all__ = ["diff"]


@click.command()
@click.argument("a", shell_complete=snapshots_known)
@click.argument("b", shell_complete=snapshots_known)
@common
@click.pass_obj
def diff(run: Run, a: str, b: str) -> None:
    """Show what may have changed from snapshot A to snapshot B of the same volume; either may be the older.

    An extent holds data in B, or is zero there; starts and lengths are in bytes. Nothing else of B differs
    from A, resized to B's size. It is told from the two manifests alone: a block that was sent again may hold
    what it held before, such as one that was changed and changed back.

    \b
    Example:
      island -r /srv/snapshots diff disk@81d0 disk@latest
      island -r /srv/snapshots diff 6f0c2a91b3d4 81d05be7c2f9 --json
    """  # noqa: D301
    with opened(run) as repository:
        found = repository.diff(a, b)
    if run.json:
        run.answer(found.as_json(), "")
    else:
        run.answer(None, "\n".join(_told_diff(found)))


def _told_diff(answer: Difference) -> Iterator[str]:
    """A line for each extent, in columns of fixed width, and a sentence."""
    rows = [f"{start:>16}  {length:>16}  {kind}" for start, length, kind in answer.extents()]
    if rows:
        yield f"{'START B':>16}  {'LENGTH B':>16}  KIND"
        yield from rows
    changed, data, zero = map(text.size, (answer.bytes_changed, answer.bytes_data, answer.bytes_zero))
    resized = ""
    if answer.since_size != answer.volume_size:
        resized = f"; its size went from {text.size(answer.since_size)} to {text.size(answer.volume_size)}"
    yield (
        f"Volume {answer.volume}: {changed} may differ in {text.count(len(rows), 'extent')}, {data} of data "
        f"and {zero} of zeros{resized}."
    )
