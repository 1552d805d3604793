"""`island list`: its options, and what a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from island_fast.cli.options import common, opened
from island_fast.cli.run import Run
from island_fast.cli.text import SHORT_ID, printable, size, table

if TYPE_CHECKING:
    from island_fast.results import Snapshot

__all__ = ["format_list"]


@click.command("list")
@click.option(
    "--volume", metavar="NAME", help="Only snapshots of this volume; needs no listing of the store."
)
@common
@click.pass_obj
def list_(run: Run, volume: str | None) -> None:
    """List snapshots, oldest first within each volume.

    Ids are cut to 12 digits, which name a snapshot as well as all 32 do; --json and --quiet give them whole.

    \b
    Example:
      island -r /srv/snapshots list --volume disk
      island -r /srv/snapshots list --json | jq -r '.[].snapshot'
    """  # noqa: D301
    with opened(run) as repository:
        found = repository.snapshots(volume)
        if not found and not run.quiet and not repository.left_out:
            run.note(f"there are no snapshots in {repository.store.location}")
    text = format_list(found) if found else ""
    run.answer([one.as_json() for one in found], text, "\n".join(one.snapshot for one in found))
    run.left_out(repository.left_out)


def format_list(answers: Sequence[Snapshot]) -> str:
    """A table of snapshots, ids cut to their first 12 digits."""
    rows = [
        (
            one.snapshot[:SHORT_ID],
            one.volume,
            one.created,
            size(one.volume_size),
            size(one.bytes_stored),
            (one.parent or "none")[:SHORT_ID],
            printable(one.label),
        )
        for one in answers
    ]
    return table(("SNAPSHOT", "VOLUME", "CREATED", "SIZE", "STORED", "PARENT", "LABEL"), rows, right=(3, 4))
