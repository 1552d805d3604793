"""`island verify`: its options, and what a person reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from island_fast.cli import text
from island_fast.cli.options import FileName, common, fraction, limits, opened, seconds, snapshots_known
from island_fast.cli.run import Run
from island_fast.errors import DamagedError, UsageError

if TYPE_CHECKING:
    from island_fast.results import Damage, Touched, Verified

__all__ = ["verify"]

_TOLD = 50  # damaged objects that are told one by one
_EXTENTS = 4  # of each snapshot


@click.command()
@click.argument("snapshot", required=False, shell_complete=snapshots_known)
@click.option("--all", "every", is_flag=True, help="All snapshots of all volumes.")
@click.option("--sample", metavar="SHARE", callback=fraction,
              help="Read a share of all bytes, such as 5% or 100%; first what this host has not read for "
              "longest.")  # fmt: skip
@click.option("--since", metavar="TIME", callback=seconds,
              help="Read whole what this host has not read for this long, such as 7d.")  # fmt: skip
@click.option("--against", metavar="IMAGE", type=FileName(),
              help="Compare SNAPSHOT with its pin in this qcow2 file.")  # fmt: skip
@click.option("--backing", metavar="FORMAT:FILE", multiple=True,
              help="A backing file of IMAGE, as for 'island snapshot'.")  # fmt: skip
@click.option("--heal", is_flag=True, help="Mend what is damaged, where the same bytes are still to be had.")
@limits
@common
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
    """Verify that what SNAPSHOT, or with --all every one, needs is there and as it was written.

    Every object is looked for by its name and size; catalogs are read. With --sample or --since, objects
    are read whole and every block is compared with its digest; with both, what was not read since then, up
    to the share. Each object is read once, however many snapshots need it. This host remembers what it has
    read: a nightly run with --sample 5% has read everything after 20 nights. What was found damaged is read
    every time.

    --against compares the snapshot with the internal snapshot that it was taken from: it shows whether a
    table diff has missed anything, and reads no blocks from the store.

    --heal works on the host that owns the volume. It takes what is lost from the volume's image (and that of
    --against) or from other packs, wherever the digests are equal; nothing else is changed.

    Exit code 6 tells of damage that is left.

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
        run.if_interrupted = lambda: "all is as it was, or mended; run it again"
    with opened(run) as repository, run.progress() as progress:
        found = repository.verify(
            snapshot, sample=sample, since=since, against=against, backing=backing, heal=heal,
            progress=progress,
        )  # fmt: skip
    run.answer(
        found.as_json(), _told(found), "\n".join(one.object for one in found.damages if not one.mended)
    )
    left = sum(not damage.mended for damage in found.damages)
    errors = list(repository.left_out) if every else []
    if left:
        told = (
            f"{text.count(left, 'damaged object')} found and not mended; what can be done is told with each"
        )
        errors.append(DamagedError(told))
    run.left_out(errors)


def _told(found: Verified) -> str:
    lines = [line for one in found.damages[:_TOLD] for line in _damage(one)]
    if len(found.damages) > _TOLD:
        lines.append(f"and {len(found.damages) - _TOLD} more, which --json lists")
    mended = sum(one.mended for one in found.damages)
    rows = [
        ("verified", f"{text.count(found.snapshots, 'snapshot')}, {text.count(found.objects, 'object')}"),
        ("read", f"{text.size(found.bytes_read)} in {text.count(found.objects_read, 'object')}"),
        ("compared", text.size(found.bytes_compared) if found.bytes_compared else ""),
        ("unproved", text.count(found.objects_unproved, "object") if found.objects_unproved else ""),
        ("damaged", text.count(len(found.damages), "object") if found.damages else "nothing was found"),
        ("mended", text.count(mended, "object") if mended else ""),
        ("time", text.duration(found.seconds)),
    ]
    return "\n".join([*lines, text.sheet(rows)])


def _damage(one: Damage) -> Iterator[str]:
    """An object's lines: what it is, whom it touches, what can be done."""
    state = "mended" if one.mended else "damaged"
    yield f"{state}: {one.object} ({one.kind}): {text.printable(one.message)}"
    for touched in one.snapshots:
        verb = "needed" if one.mended else "lacks"
        yield f"  volume {one.volume}, snapshot {touched.snapshot} {verb} {_extents(touched)}"
    if not one.snapshots:
        yield f"  volume {one.volume}: no snapshot that can be read needs what is lost"
    if one.remedy:
        yield f"  {text.printable(one.remedy)}"


def _extents(touched: Touched) -> str:
    spans = [f"{start}+{length}" for start, length in touched.extents[:_EXTENTS]]
    more = len(touched.extents) - len(spans) + touched.extents_left_out
    listed = ", ".join(spans) + (f" and {more} more" if more else "")
    return f"{text.size(touched.bytes)} at byte {listed}"
