"""`island list`: its options, and the text of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from island_fast.cli.help import verb
from island_fast.cli.options import add_common_options, open_repository, volume_option
from island_fast.cli.run import Run
from island_fast.cli.text import SHORT_ID, printable, size, table, terminal_width

if TYPE_CHECKING:
    from island_fast.results import Snapshot

__all__ = ["list_"]

_MARK = "[kept]"  # before the label of a snapshot that is marked
_WIDE = 100  # columns of a terminal that have room for PARENT


@verb("List snapshots", name="list")
@volume_option("List only this volume; saves listing the whole store.")
@add_common_options
@click.pass_obj
def list_(run: Run, volume: str | None) -> None:
    """List snapshots, oldest first within each volume.

    Ids are cut to 12 digits, which name a snapshot as well as all 32 do; --json and --quiet print them in
    full. A terminal of fewer than 100 columns gets no column PARENT. [kept] before a label says that the
    snapshot was marked by 'island keep'.

    \b
    Example:
      island -r /srv/snapshots list --volume disk
      island -r /srv/snapshots list --json | jq -r '.[].snapshot'
    """  # noqa: D301
    with open_repository(run) as repository:
        found = repository.snapshots(volume)
        run.note_if_empty(found, repository, "there are no snapshots")
    text = _format_list(found, parents=(terminal_width() or _WIDE) >= _WIDE) if found else ""
    run.answer((one.as_json() for one in found), text, "\n".join(one.snapshot for one in found))
    run.finish_with(repository.left_out)


def _format_list(found: Sequence[Snapshot], *, parents: bool) -> str:
    """Return a table of snapshots, with a column of their parents or without."""
    header = ("SNAPSHOT", "VOLUME", "CREATED", "SIZE", "STORED", *(["PARENT"] if parents else []), "LABEL")
    rows = [
        (
            one.snapshot[:SHORT_ID],
            one.volume,
            one.created,
            size(one.volume_size),
            size(one.bytes_stored),
            *([(one.parent or "none")[:SHORT_ID]] if parents else []),
            f"{_MARK} {printable(one.label)}".rstrip() if one.keep else printable(one.label),
        )
        for one in found
    ]
    return table(header, rows, right=(3, 4))
