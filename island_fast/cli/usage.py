"""`island usage`: its options, and what a person reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from island_fast.cli import text
from island_fast.cli.options import common, opened
from island_fast.cli.run import Run

if TYPE_CHECKING:
    from island_fast.results import Usage, VolumeUsage

__all__ = ["usage"]


@click.command()
@click.option("--volume", metavar="NAME", help="Only this volume; needs no listing of the store.")
@common
@click.pass_obj
def usage(run: Run, volume: str | None) -> None:
    """Tell what the snapshots of each volume hold and take, and those of all.

    \b
    Data before compression, in blocks of 64 KiB; zeros are none:
      LOGICAL      what each snapshot holds, summed
      DISTINCT     the same, but what several snapshots share is counted once
      SHARED       the part of that which more than one snapshot holds
    Bytes in the store:
      STORED       all packs and manifests that the catalog names
      DEAD         the part of them that no snapshot needs and no sweep has removed
      SWEEP FREES  what a sweep would free now, its grace aside: packs that are mostly needed stay
    RATIO is DISTINCT / (STORED - DEAD).

    Catalogs and manifests tell all of it: one request for each manifest that is not in the local cache. Not
    counted are catalogs, and what interrupted snapshots left ('island sweep --dry-run' lists it).

    \b
    Example:
      island -r /srv/snapshots usage
      island -r swift://volumes/host7 usage --volume disk --json
    """  # noqa: D301
    with opened(run) as repository, run.progress() as progress:
        used = repository.usage(volume, progress=progress)
        if not used.volumes and not run.quiet and not repository.left_out:
            run.note(f"there are no volumes in {repository.store.location}")
    run.answer(used.as_json(), _told_usage(used))
    run.left_out(repository.left_out)


def _told_usage(answer: Usage) -> str:
    """A table of volumes, and of all of them if there are several."""
    figures = ("SNAPSHOTS", "LOGICAL", "DISTINCT", "SHARED", "STORED", "DEAD", "SWEEP FREES", "RATIO")
    rows = [_used(one) for one in answer.volumes]
    if len(rows) > 1:
        rows.append(_used(answer.total))
    return text.table(("VOLUME", *figures), rows, right=range(1, 9)) if rows else ""


def _used(one: VolumeUsage) -> tuple[str, ...]:
    sizes = (
        *(one.bytes_logical, one.bytes_distinct, one.bytes_shared),
        *(one.bytes_stored, one.bytes_dead, one.bytes_freed),
    )
    ratio = "" if one.compression is None else f"{one.compression:.2f}"
    return one.volume or "(all)", str(one.snapshots), *map(text.size, sizes), ratio
