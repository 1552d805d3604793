"""The verbs that weigh snapshots against each other: `island retain`, `island diff` and `island usage`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from island_fast.cli import text
from island_fast.cli.config import KEEP_RULES
from island_fast.cli.options import common, opened, snapshots_known
from island_fast.cli.run import Run

if TYPE_CHECKING:
    from island_fast.results import Difference, Retained, Usage, VolumeUsage

__all__ = ["diff", "retain", "usage"]

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
    from island_fast.operations.retention import Keep

    keep = Keep(**{name.removeprefix("keep_"): number for name, number in keeps.items()})
    if not dry_run:
        run.if_interrupted = lambda: "'island list' shows which snapshots are still there"
    with opened(run) as repository, run.progress() as progress:
        retained = repository.retain(keep, volume=volume, dry_run=dry_run, progress=progress)
        if not retained and not run.quiet and not repository.left_out:
            run.note(f"this host owns no volume in {repository.store.location}")
    run.answer([one.as_json() for one in retained], _told_retained(retained, dry_run))
    run.left_out(repository.left_out)


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
