"""`island retain`: its options, and what a person reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from island_fast.cli import text
from island_fast.cli.config import KEEP_RULES
from island_fast.cli.options import common, opened
from island_fast.cli.run import Run

if TYPE_CHECKING:
    from island_fast.results import Retained

__all__ = ["retain"]

_RULES_TOLD = (
    "Keep the newest N.",
    "Keep the newest of each of the last N hours that have any.",
    "The same for days.",
    "The same for weeks, which begin on Monday.",
    "The same for months.",
    "The same for years.",
)


def _keep_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each rule of a policy."""
    for rule, told in reversed([*zip(KEEP_RULES, _RULES_TOLD, strict=True)]):
        command = click.option(
            f"--keep-{rule}", metavar="N", type=click.IntRange(min=0), default=0,
            envvar=f"ISLAND_KEEP_{rule.upper()}", show_envvar=True, help=told,
        )(command)  # fmt: skip
    return command


@click.command()
@_keep_options
@click.option("--volume", metavar="NAME", help="Only this volume.")
@click.option("--dry-run", is_flag=True, help="Change nothing, and tell what would be freed.")
@common
@click.pass_obj
def retain(run: Run, /, volume: str | None, dry_run: bool, **keeps: int) -> None:
    """Delete the snapshots that no rule keeps, from each volume that this host owns.

    Rules work as those of 'restic forget', for each volume by itself: from the newest snapshot to the oldest,
    a rule keeps the newest one of each of the first N hours, days, ... of UTC that it meets; those without a
    snapshot do not count. A rule that comes to the oldest snapshot before it has N keeps that one too, as
    "oldest daily". Newer is what was taken later, whatever the clock said. At least one rule must be given,
    so the newest snapshot of a volume always stays.

    Each rule that is not given is looked up in ISLAND_KEEP_LAST, ISLAND_KEEP_HOURLY, ..., then in the
    configuration file (keep-daily = 7 below [retain]); 0 puts one aside.

    Space is freed by the next 'island sweep'.

    \b
    Example:
      island -r /srv/snapshots retain --keep-daily 7 --keep-weekly 4 --dry-run
      island -r swift://volumes/host7 retain --keep-last 1 --keep-monthly 12 --volume disk
    """  # noqa: D301
    from island_fast.operations.retain import Keep

    keep = Keep(**{name.removeprefix("keep_"): number for name, number in keeps.items()})
    if not dry_run:
        run.if_interrupted = lambda: "'island list' shows which snapshots are still there"
    with opened(run) as repository, run.progress() as progress:
        retained = repository.retain(keep, volume=volume, dry_run=dry_run, progress=progress)
        if not retained and not run.quiet and not repository.left_out:
            run.note(f"this host owns no volume in {repository.store.location}")
    run.answer([one.as_json() for one in retained], _told_retained(retained, dry_run))
    run.left_out(repository.left_out)


def _told_retained(answers: Sequence[Retained], dry_run: bool) -> str:
    """Of each volume a line for every snapshot, and a sentence."""
    lines = []
    for one in answers:
        header = ("ACTION", "SNAPSHOT", "CREATED", "FREES", "KEPT AS", "LABEL")
        rows = [
            (
                "keep" if it.kept else "delete",
                it.snapshot[: text.SHORT_ID],
                it.created,
                "" if it.kept else text.size(it.bytes_freed),
                ", ".join(it.reasons),
                text.printable(it.label),
            )
            for it in one.snapshots
        ]
        lines += [text.table(header, rows, right=(3,)), _retained(one, dry_run)] if rows else []
    return "\n".join(lines)


def _retained(one: Retained, dry_run: bool) -> str:
    deletes, frees = ("would be deleted", "would free") if dry_run else ("deleted", "will free")
    if not one.deleted:
        return f"Volume {one.volume}: all {text.count(one.kept, 'snapshot')} kept."
    kept = f"{one.kept} of {text.count(len(one.snapshots), 'snapshot')} kept"
    return (
        f"Volume {one.volume}: {kept}, {one.deleted} {deletes}; because of it the next sweep {frees} "
        f"{text.size(one.bytes_freed)}."
    )
