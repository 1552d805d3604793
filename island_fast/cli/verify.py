"""`island verify`: its options, and the text of its answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from island_fast.cli.help import HOW, WHAT, option, verb
from island_fast.cli.options import (
    NAMING,
    FileName,
    add_common_options,
    add_limit_options,
    complete_snapshot,
    open_repository,
    parse_share,
    parse_span,
)
from island_fast.cli.run import Run
from island_fast.cli.text import count, duration, printable, sheet, size
from island_fast.errors import DamagedError, UsageError

if TYPE_CHECKING:
    from island_fast.results import Damage, Touched, Verified

__all__ = ["verify"]

_LISTED_DAMAGES = 50
_LISTED_EXTENTS = 4  # of each snapshot


@verb("Verify stored snapshots, and repair damage", epilog=NAMING)
@click.argument("snapshot", required=False, shell_complete=complete_snapshot)
@option(WHAT, "--all", "every", is_flag=True, help="Verify all snapshots of all volumes.")
@option(WHAT, "--sample", metavar="SHARE", callback=parse_share,
        help="Read a share of all bytes, such as 5% or 100%, starting with what has gone unread on this host "
        "for longest.")  # fmt: skip
@option(WHAT, "--since", metavar="TIME", callback=parse_span,
        help="Read in full what this host has not read for this long, such as 7d.")  # fmt: skip
@option(WHAT, "--against", metavar="IMAGE", type=FileName(),
        help="Compare SNAPSHOT with its pin in this qcow2 file.")  # fmt: skip
@option(HOW, "--backing", metavar="FORMAT:FILE", multiple=True,
        help="With --against: a backing file of IMAGE, as for 'island snapshot'.")  # fmt: skip
@option(HOW, "--heal", is_flag=True,
        help="Repair damaged objects wherever an intact copy of the data exists.")  # fmt: skip
@add_limit_options
@add_common_options
@click.pass_obj
def verify(
    run: Run,
    snapshot: str | None,
    every: bool,
    sample: float | None,
    since: float | None,
    against: Path | None,
    backing: tuple[str, ...],
    heal: bool,
) -> None:
    """Verify that everything SNAPSHOT needs is stored and intact, or with --all every snapshot.

    Catalogs are read; every other object must exist with the right size. With --sample or --since, objects
    are also read in full and every block is compared with its digest; with both, at most SHARE is read,
    starting with what has gone unread since TIME. Each object is read once, however many snapshots need it.
    This host remembers what it has read: a nightly run with --sample 5% has read everything after 20 nights.
    What was found damaged is read every time.

    --against compares the snapshot with the internal snapshot that it was taken from, which shows whether a
    table diff missed anything. It reads no blocks from the store.

    --heal works on the host that owns the volume. It takes lost data from the volume's image (and from that
    of --against) or from other packs, wherever the digests are equal; nothing else is changed.

    Exit code 6 means that damage is left.

    \b
    Example:
      island -r /srv/snapshots verify --all --sample 5%
      island -r swift://volumes/host7 verify disk@latest --since 7d
      island -r /srv/snapshots verify disk@latest --against disk.qcow2
      island -r /srv/snapshots verify --all --sample 100% --heal
    """  # noqa: D301
    if (snapshot is None) != every:
        raise UsageError("name a SNAPSHOT, or give --all; see 'island verify --help'")
    if backing and against is None:
        raise UsageError("--backing lists the backing files of --against IMAGE; name that image")
    if heal:
        run.if_interrupted = lambda: "each object is unchanged or repaired; run it again"
    with open_repository(run) as repository, run.progress() as progress:
        found = repository.verify(
            snapshot, sample=sample, since=since, against=against, backing=backing, heal=heal,
            progress=progress,
        )  # fmt: skip
        if not found.damages:
            run.note_if_empty(range(found.snapshots), repository, "there are no snapshots")
    left = [one.object for one in found.damages if not one.mended]
    run.answer(found.as_json(), "\n".join(_format_verified(found)), "\n".join(left))
    errors = list(repository.left_out) if every else []
    if left:
        errors.append(
            DamagedError(
                f"{count(len(left), 'damaged object')} found and not repaired; see the advice on each"
            )
        )
    run.finish_with(errors)


def _format_verified(found: Verified) -> Iterator[str]:
    """Yield the damaged objects, and what was verified."""
    for one in found.damages[:_LISTED_DAMAGES]:
        yield from _format_damage(one)
    if len(found.damages) > _LISTED_DAMAGES:
        yield f"and {len(found.damages) - _LISTED_DAMAGES} more, which --json lists"
    repaired = sum(one.mended for one in found.damages)
    unread = f"{count(found.objects_unproved, 'object')} never read in full on this host (see --sample)"
    yield sheet(
        [
            ("verified", f"{count(found.snapshots, 'snapshot')}, {count(found.objects, 'object')}"),
            ("read", f"{size(found.bytes_read)} in {count(found.objects_read, 'object')}"),
            ("compared", size(found.bytes_compared) if found.bytes_compared else ""),
            ("unread", unread if found.objects_unproved else ""),
            ("damage", count(len(found.damages), "object") if found.damages else "none"),
            ("repaired", count(repaired, "object") if repaired else ""),
            ("time", duration(found.seconds)),
        ]
    )


def _format_damage(one: Damage) -> Iterator[str]:
    """Yield an object's lines: what is wrong with it, which snapshots it affects, what can be done."""
    state = "repaired" if one.mended else "damaged"
    yield f"{state}: {one.object} ({one.kind}): {printable(one.message)}"
    for touched in one.snapshots:
        needs = "needed" if one.mended else "lacks"
        yield f"  volume {one.volume}, snapshot {touched.snapshot} {needs} {_format_extents(touched)}"
    if not one.snapshots and not one.mended:
        yield f"  volume {one.volume}: no snapshot that can be read needs what is lost"
    if one.remedy:
        yield f"  {printable(one.remedy)}"


def _format_extents(touched: Touched) -> str:
    extents = touched.extents[:_LISTED_EXTENTS]
    more = len(touched.extents) - len(extents) + touched.extents_left_out
    if len(extents) == 1 and not more:
        return f"{size(touched.bytes)} at byte {extents[0][0]}"
    listed = ", ".join(f"{size(length)} at byte {start}" for start, length in extents)
    return f"{size(touched.bytes)}: {listed}" + (f", and {more} more" if more else "")
