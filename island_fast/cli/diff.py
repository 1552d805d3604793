"""`island diff`: its options, and the text of its answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from island_fast.cli.help import verb
from island_fast.cli.options import NAMING, add_common_options, complete_snapshot, open_repository
from island_fast.cli.run import Run, enclose
from island_fast.cli.text import count, size

if TYPE_CHECKING:
    from island_fast.results import Difference

__all__ = ["diff"]


@verb("Show what changed between two snapshots", epilog=NAMING)
@click.argument("a", shell_complete=complete_snapshot)
@click.argument("b", shell_complete=complete_snapshot)
@add_common_options
@click.pass_obj
def diff(run: Run, a: str, b: str) -> None:
    """Show what can have changed from snapshot A to snapshot B of the same volume; either can be the older.

    Each extent is listed with its start and length in bytes, and with what it is in B: data, or zero.
    Everything else is the same in B as in A, resized to B's size. Only the two manifests are read, so a block
    that was sent again is listed even if its data is the same, such as one that was changed and changed back.

    \b
    Example:
      island -r /srv/snapshots diff disk@81d0 disk@latest
      island -r /srv/snapshots diff 6f0c2a91b3d4 81d05be7c2f9 --json
    """  # noqa: D301
    with open_repository(run) as repository:
        found = repository.diff(a, b)
    if run.json:
        run.answer_parts(_encode_difference(found))
    elif not run.quiet:
        run.answer_parts(enclose("", "\n", "", _format_difference(found)))


def _encode_difference(found: Difference) -> Iterator[str]:
    """Yield the answer as JSON, an extent at a time: there can be as many as the volume has blocks."""
    rest = replace(found, start=found.start[:0], length=found.length[:0], data=found.data[:0])
    begin = json.dumps(rest.as_json()).removesuffix("]}")
    rows = (json.dumps({"start": s, "length": n, "kind": k}) for s, n, k in found.extents())
    return enclose(begin, ", ", "]}", rows)


def _format_difference(found: Difference) -> Iterator[str]:
    """Yield a line for each extent, in columns of fixed width, and a sentence."""
    if len(found.start):
        yield f"{'START B':>16}  {'LENGTH B':>16}  KIND"
        yield from (f"{start:>16}  {length:>16}  {kind}" for start, length, kind in found.extents())
    changed, data, zero = map(size, (found.bytes_changed, found.bytes_data, found.bytes_zero))
    resized = ""
    if found.since_size != found.volume_size:
        resized = f"; its size went from {size(found.since_size)} to {size(found.volume_size)}"
    yield (
        f"Volume {found.volume}: {changed} can differ in {count(len(found.start), 'extent')}, {data} of data "
        f"and {zero} of zeros{resized}."
    )
