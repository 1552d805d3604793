"""`island sweep`: its options, and what a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from island_fast.cli.options import common, limits, opened, seconds
from island_fast.cli.run import Run
from island_fast.cli.text import count, size

if TYPE_CHECKING:
    from island_fast.results import Swept

__all__ = ["format_swept"]


@click.command()
@click.option("--grace", metavar="TIME", callback=seconds,
              help="Keep what is younger than this, such as 24h, 90m, 3600s, 7d or 0. "
              "Less than the default is safe only if nothing else uses the repository now.  "
              "[default: 24h in Swift, 0 in a directory]")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Change nothing, and tell what would be freed.")
@limits
@common
@click.pass_obj
def sweep(run: Run, grace: float | None, dry_run: bool) -> None:
    """Remove what no snapshot needs any more, from the volumes that this host owns.

    Packs that are mostly unneeded are written anew without the rest; --dry-run lists every object, and why.
    A sweep can be interrupted and run again at any time; snapshots go on meanwhile.

    \b
    Example:
      island -r /srv/snapshots sweep --dry-run
      island -r swift://volumes/host7 sweep --grace 7d
    """  # noqa: D301
    if not dry_run:
        run.if_interrupted = lambda: "all snapshots are as they were; the next sweep goes on"
    with opened(run) as repository, run.progress() as progress:
        swept = repository.sweep(grace=grace, dry_run=dry_run, progress=progress)
        if not swept and not run.quiet and not repository.left_out:
            run.note(f"this host owns no volume in {repository.store.location}")
    run.answer([one.as_json() for one in swept], format_swept(swept, dry_run))
    run.left_out(repository.left_out)


def format_swept(answers: Sequence[Swept], dry_run: bool) -> str:
    """A sentence for each lineage; of a dry run, every object before it."""
    lines = []
    for one in answers:
        if dry_run:
            lines += [
                f"{step.action:7}  {size(step.bytes):>10}  {step.object}: {step.reason}" for step in one.steps
            ]
        lines.append(_swept(one, dry_run))
    return "\n".join(lines)


def _swept(one: Swept, dry_run: bool) -> str:
    if not one.objects_removed:
        return f"Volume {one.volume}: nothing to remove."
    remove, rewrite, free = (
        ("would remove", "rewrite", "free") if dry_run else ("removed", "rewrote", "freed")
    )
    removed = f"{remove} {count(one.objects_removed, 'object')} ({size(one.bytes_removed)})"
    if one.packs_repacked:
        removed += f" and {rewrite} {count(one.packs_repacked, 'pack')} ({size(one.bytes_rewritten)})"
    return f"Volume {one.volume}: {removed}; {free} {size(one.bytes_freed)}."
