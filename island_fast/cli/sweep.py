"""`island sweep`: its options, and the text of its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from island_fast.cli.help import HOW, option, verb
from island_fast.cli.options import (
    add_common_options,
    add_limit_options,
    dry_run_option,
    open_repository,
    parse_span,
)
from island_fast.cli.run import Run
from island_fast.cli.text import age, count, size

if TYPE_CHECKING:
    from island_fast.results import Swept

__all__ = ["sweep"]


@verb("Free the space of deleted snapshots")
@option(HOW, "--grace", metavar="TIME", callback=parse_span, show_default="24h in Swift, 0 in a directory",
        help="Keep objects younger than this, such as 24h, 90m, 3600s, 7d or 0. Less than the default is "
        "safe only while nothing else uses the repository.")  # fmt: skip
@option(HOW, "--unknown", is_flag=True,
        help="Also remove what no record names and this host did not store, such as what a former owner left "
        "unfinished. See what it is with --dry-run first.")  # fmt: skip
@dry_run_option()
@add_limit_options
@add_common_options
@click.pass_obj
def sweep(run: Run, grace: float | None, unknown: bool, dry_run: bool) -> None:
    """Remove what no snapshot needs any more, from the volumes that this host owns.

    A pack of which most is not needed is rewritten without the rest. --dry-run lists every object, and why it
    would be removed, rewritten or kept. What no record names, and this host did not store, is reported and
    stays. A sweep can be interrupted and run again at any time; snapshots can be taken while it runs.

    \b
    Example:
      island -r /srv/snapshots sweep --dry-run
      island -r swift://volumes/host7 sweep --grace 7d
    """  # noqa: D301
    if not dry_run:
        run.if_interrupted = lambda: "all snapshots are unchanged; the next sweep continues"
    with open_repository(run) as repository, run.progress() as progress:
        swept = repository.sweep(grace=grace, unknown=unknown, dry_run=dry_run, progress=progress)
        run.note_if_empty(swept, repository, "this host owns no volume")
    grace = repository.store.grace if grace is None else grace
    run.answer([one.as_json() for one in swept], "\n".join(_format_swept(swept, dry_run, grace)))
    run.finish_with(repository.left_out)


def _format_swept(swept: Sequence[Swept], dry_run: bool, grace: float) -> Iterator[str]:
    """Yield a sentence for each volume, in a dry run after a line for every object."""
    remove, rewrite, free = "removed", "rewrote", "freed"
    if dry_run:
        remove, rewrite, free = "would remove", "rewrite", "free"
    for one in swept:
        for step in one.steps if dry_run else ():
            yield f"{step.action:7}  {size(step.bytes):>10}  {step.object}: {step.reason}"
        text = f"{remove} {count(one.objects_removed, 'object')} ({size(one.bytes_removed)})"
        if one.packs_repacked:
            text += f" and {rewrite} {count(one.packs_repacked, 'pack')} ({size(one.bytes_rewritten)})"
        if not one.objects_removed:
            text = "nothing to remove" + (" yet" if one.objects_waiting else "")
        else:
            text += f"; {free} {size(one.bytes_freed)}"
        if one.objects_waiting:
            wait = "waits until it is" if one.objects_waiting == 1 else "wait until they are"
            waiting = f"{count(one.objects_waiting, 'object')} ({size(one.bytes_waiting)})"
            text += f"; {waiting} {wait} {age(grace)} old (--grace)"
        yield f"Volume {one.volume}: {text}."
        if one.bytes_kept:
            yield (
                f"Volume {one.volume}: the store still holds these {size(one.bytes_kept)}, because it keeps "
                "what is deleted as versions or under a lock, unless others stored as much meanwhile."
            )
        if one.objects_unknown:
            yield (
                f"Volume {one.volume}: kept {count(one.objects_unknown, 'object')} "
                f"({size(one.bytes_unknown)}) that no record names and this host did not store; see them "
                "with --dry-run, remove them with --unknown."
            )
