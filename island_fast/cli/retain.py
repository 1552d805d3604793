"""`island retain`: its options, and the text of its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from island_fast.cli.config import KEEP_RULES
from island_fast.cli.help import WHAT, option, verb
from island_fast.cli.options import add_common_options, dry_run_option, open_repository, volume_option
from island_fast.cli.run import Run
from island_fast.cli.text import SHORT_ID, after_grace, count, printable, size, table

if TYPE_CHECKING:
    from island_fast.results import Retained

__all__ = ["retain"]


def _add_keep_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each rule of a policy."""
    for rule, text in reversed(KEEP_RULES.items()):
        command = option(
            WHAT, f"--keep-{rule}", metavar="N", type=click.IntRange(min=0), default=0,
            envvar=f"ISLAND_KEEP_{rule.upper()}", show_envvar=True, help=text,
        )(command)  # fmt: skip
    return command


@verb("Delete the snapshots that no rule keeps")
@_add_keep_options
@volume_option("Apply the rules only to this volume.")
@dry_run_option()
@add_common_options
@click.pass_context
def retain(context: click.Context, /, volume: str | None, dry_run: bool, **keeps: int) -> None:
    """Delete the snapshots that no rule keeps, from each volume that this host owns.

    Rules work as those of 'restic forget', for each volume separately: a rule keeps the newest snapshot of
    each of the N most recent hours, days, ... (UTC) that contain one. If a rule runs out of snapshots before
    it has kept N, it also keeps the oldest, as "oldest daily". Order is the order in which snapshots were
    taken, not their timestamps. At least one rule must be given, so the newest snapshot of a volume always
    stays.

    Rules add up. A rule that is not given is taken from ISLAND_KEEP_LAST, ISLAND_KEEP_HOURLY, ..., then from
    the configuration file (keep-daily = 7 below [retain]); 0 turns a rule off. The answer shows which rules
    applied, and where each is from.

    'island sweep' frees the space.

    \b
    Example:
      island -r /srv/snapshots retain --keep-daily 7 --keep-weekly 4 --dry-run
      island -r swift://volumes/host7 retain --keep-last 1 --keep-monthly 12
    """  # noqa: D301
    from island_fast.operations.retain import Keep

    run = context.ensure_object(Run)
    keep = Keep(**{name.removeprefix("keep_"): number for name, number in keeps.items()})
    if not dry_run:
        run.if_interrupted = lambda: "'island list' shows which snapshots still exist"
    with open_repository(run) as repository, run.progress() as progress:
        retained = repository.retain(keep, volume=volume, dry_run=dry_run, progress=progress)
        run.note_if_empty(retained, repository, "this host owns no volume")
    lines = [_format_rules(context, keeps)] if retained else []
    lines += _format_retained(retained, dry_run, repository.store.grace)
    run.answer([one.as_json() for one in retained], "\n".join(lines))
    run.finish_with(repository.left_out)


def _format_rules(context: click.Context, keeps: dict[str, int]) -> str:
    """Return the rules that applied, and where each is from."""
    rules = []
    for name in (f"keep_{rule}" for rule in KEEP_RULES):
        match context.get_parameter_source(name):
            case ParameterSource.COMMANDLINE:
                source = "command line"
            case ParameterSource.DEFAULT_MAP:
                source = "configuration file"
            case _:
                source = f"ISLAND_{name.upper()}"
        if keeps[name]:
            rules.append(f"{name.replace('_', '-')} {keeps[name]} ({source})")
    return f"Rules: {', '.join(rules)}."


def _format_retained(retained: Sequence[Retained], dry_run: bool, grace: float) -> Iterator[str]:
    """Yield a table of each volume's snapshots, and a sentence."""
    deletes, frees = ("would be deleted", "would then free") if dry_run else ("deleted", "will free")
    for one in retained:
        if one.snapshots:
            header = ("ACTION", "SNAPSHOT", "CREATED", "FREES", "KEPT AS", "LABEL")
            rows = [
                (
                    "keep" if it.kept else "delete",
                    it.snapshot[:SHORT_ID],
                    it.created,
                    "" if it.kept else size(it.bytes_freed),
                    ", ".join(it.reasons),
                    printable(it.label),
                )
                for it in one.snapshots
            ]
            yield table(header, rows, right=(3,))
            if one.deleted:
                yield (
                    f"Volume {one.volume}: {one.kept} of {count(len(one.snapshots), 'snapshot')} kept, "
                    f"{one.deleted} {deletes}; 'island sweep' {frees} {size(one.bytes_freed)}"
                    f"{after_grace(grace)}."
                )
            else:
                yield f"Volume {one.volume}: all {count(one.kept, 'snapshot')} kept."
