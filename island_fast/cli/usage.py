"""`island usage`: its options, and the text of its answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from island_fast.cli.help import verb
from island_fast.cli.options import add_common_options, open_repository, volume_option
from island_fast.cli.run import Run
from island_fast.cli.text import age, size, table

if TYPE_CHECKING:
    from island_fast.results import Usage, VolumeUsage

__all__ = ["usage"]


@verb("Show how much data and space snapshots use")
@volume_option("Show only this volume; saves listing the whole store.")
@add_common_options
@click.pass_obj
def usage(run: Run, volume: str | None) -> None:
    """Show how much data each volume's snapshots hold and how much space they use, with a total.

    \b
    Data before compression, in blocks of 64 KiB, without zeros:
      LOGICAL      sum of what each snapshot holds
      DISTINCT     the same, counting once what several snapshots share
      SHARED       the part of DISTINCT that more than one snapshot holds
    Bytes in the store:
      STORED       all packs and manifests that the catalog names
      DEAD         the part of STORED that no snapshot needs, not swept yet
      SWEEP FREES  what a sweep with --grace 0 would free now; packs of which
                   most is needed stay
    RATIO is DISTINCT / (STORED - DEAD).

    The figures come from catalogs and manifests: one request for each manifest that is not in the local
    cache. Catalogs themselves, and what interrupted snapshots left, are not counted; 'island sweep --dry-run'
    lists the latter.

    \b
    Example:
      island -r /srv/snapshots usage
      island -r swift://volumes/host7 usage --volume disk --json
    """  # noqa: D301
    with open_repository(run) as repository, run.progress() as progress:
        used = repository.usage(volume, progress=progress)
        run.note_if_empty(used.volumes, repository, "there are no volumes")
    run.answer(used.as_json(), _format_usage(used, repository.store.grace))
    run.finish_with(repository.left_out)


def _format_usage(used: Usage, grace: float) -> str:
    """Return a table of volumes, with a row for all of them if there are several.

    A line below it says what waits in a store with a grace.
    """
    header = (
        "VOLUME",
        "SNAPSHOTS",
        "LOGICAL",
        "DISTINCT",
        "SHARED",
        "STORED",
        "DEAD",
        "SWEEP FREES",
        "RATIO",
    )
    rows = [_row(one) for one in used.volumes]
    if len(rows) > 1:
        rows.append(_row(used.total))
    lines = [table(header, rows, right=range(1, len(header)))] if rows else []
    if grace and used.total.bytes_freed:
        lines.append(
            f"'island sweep' frees {size(used.total.bytes_freed)}, each object once it is {age(grace)} old "
            "(--grace)."
        )
    return "\n".join(lines)


def _row(one: VolumeUsage) -> tuple[str, ...]:
    sizes = (
        *(one.bytes_logical, one.bytes_distinct, one.bytes_shared),
        *(one.bytes_stored, one.bytes_dead, one.bytes_freed),
    )
    ratio = "" if one.compression is None else f"{one.compression:.2f}"
    return one.volume or "(all)", str(one.snapshots), *map(size, sizes), ratio
