"""`island restore`: its options, and the text of its answer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
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
    dry_run_option,
    image_format_option,
    open_repository,
)
from island_fast.cli.run import Run
from island_fast.cli.text import count, duration, printable, sheet, size
from island_fast.errors import DamagedError, UsageError

if TYPE_CHECKING:
    from island_fast.results import Restored, RestoredOnto

__all__ = ["restore"]

_LISTED_EXTENTS = 1000


@verb("Write a snapshot to a new file, or onto an image", epilog=NAMING)
@click.argument("snapshot", shell_complete=complete_snapshot)
@click.argument("target", type=FileName(), required=False)
@option(WHAT, "--onto", metavar="IMAGE", type=FileName(),
        help="Write only the blocks that differ, to this existing file or block device.")  # fmt: skip
@image_format_option("Format of TARGET or IMAGE.")
@option(HOW, "--no-pin", is_flag=True, help="Leave no pin in TARGET, which is to become another volume.")
@option(HOW, "--salvage", is_flag=True,
        help="Write what is intact of a damaged snapshot; the rest is zero, and listed.")  # fmt: skip
@dry_run_option("With --onto: write nothing; show what would be written.")
@add_limit_options
@add_common_options
@click.pass_obj
def restore(
    run: Run,
    snapshot: str,
    target: Path | None,
    onto: Path | None,
    image_format: str,
    no_pin: bool,
    salvage: bool,
    dry_run: bool,
) -> None:
    """Write the volume as of SNAPSHOT to the new file TARGET, or onto IMAGE.

    TARGET must not exist; it gets its name when it is complete and on disk. A qcow2 TARGET contains a pin, so
    that its next snapshot is incremental; a raw TARGET is sparse.

    IMAGE must exist, and no process may have it open. All of it is read and compared by digests; then only
    the blocks that differ are fetched and written. Anything past the end of the volume is zeroed. An IMAGE
    smaller than the volume is refused. Internal snapshots and pins in IMAGE stay. If interrupted, IMAGE is a
    mix of old and new: run the same command again with the snapshot's id (which is printed), not "latest".

    --salvage is for a damaged SNAPSHOT that 'island verify --heal' cannot repair. Every block that can be
    proved intact is written. What is lost is zero in TARGET and listed, and the exit code is 6: TARGET is not
    the volume then, so it gets no pin.

    \b
    Example:
      island -r /srv/snapshots restore disk@latest restored.qcow2
      island -r swift://volumes/host7 restore 6f0c2a91b3d4 disk.raw --format raw
      island -r /srv/snapshots restore disk@81d0 --onto disk.qcow2 --dry-run
      island -r /srv/snapshots restore disk@81d0 --onto /dev/vg0/disk --format raw
    """  # noqa: D301
    if (target is None) == (onto is None):
        raise UsageError("name either a new file TARGET, or an existing image with --onto")
    if onto is not None:
        if salvage:
            raise UsageError("--salvage writes a new TARGET only; zeros in IMAGE could replace what it holds")
        _restore_onto(run, snapshot, onto, image_format, no_pin, dry_run)
    elif target is not None:
        if dry_run:
            raise UsageError("--dry-run goes with --onto; a new TARGET is written in full")
        _restore(run, snapshot, target, image_format, no_pin, salvage)


def _restore(run: Run, snapshot: str, target: Path, image_format: str, no_pin: bool, salvage: bool) -> None:
    """Write a new file, and print the answer."""

    def if_interrupted() -> str:
        if os.path.lexists(target):
            return f"{target} is complete, if this command made it"
        return f"{target} was not made"

    run.if_interrupted = if_interrupted
    with open_repository(run) as repository, run.progress() as progress:
        restored = repository.restore(
            snapshot, target, image_format=image_format, pin=not no_pin, salvage=salvage, progress=progress
        )
    text = _format_restored(restored)
    lost: Sequence[tuple[int, int]] = getattr(restored, "extents_lost", ())
    run.answer(restored.as_json(), "\n".join([*_format_lost(lost), text]))
    if lost:
        raise DamagedError(
            f"{target} is not the volume: {sum(length for _, length in lost)} bytes of it are lost and zero; "
            f"see 'island verify {restored.snapshot} --sample 100%' for the damaged objects"
        )


def _format_lost(lost: Sequence[tuple[int, int]]) -> Iterator[str]:
    """Yield a line for each extent that is lost."""
    for start, length in lost[:_LISTED_EXTENTS]:
        yield f"lost: {length} bytes at byte {start}"
    if len(lost) > _LISTED_EXTENTS:
        yield f"and {len(lost) - _LISTED_EXTENTS} more, which --json lists"


def _restore_onto(
    run: Run, snapshot: str, target: Path, image_format: str, no_pin: bool, dry_run: bool
) -> None:
    """Write onto an existing image, and print the answer."""
    if no_pin:
        raise UsageError("--onto leaves the pins of IMAGE as they are; leave out --no-pin")

    from island_fast.results import command_to_resume  # here: other verbs start without it

    found = snapshot

    def if_interrupted() -> str:
        if run.phase in ("zero", "restore"):
            command = command_to_resume(found, target, image_format)
            return f"{target} is a mix of what it was and the snapshot; run '{command}'"
        return "nothing was changed"

    run.if_interrupted = if_interrupted
    with open_repository(run) as repository, run.progress() as progress:
        found = repository.find(snapshot).row.id
        volume, at, _ = snapshot.rpartition("@")
        restored = repository.restore_onto(
            f"{volume}{at}{found}", target, image_format=image_format, dry_run=dry_run, progress=progress
        )
    run.answer(restored.as_json(), _format_restored_onto(restored, dry_run))


def _format_restored(restored: Restored) -> str:
    """Return what was written to a new file."""
    return sheet(
        [
            ("target", f"{printable(restored.target)}, {restored.format}"),
            ("snapshot", restored.snapshot),
            ("volume", size(restored.volume_size)),
            ("read", f"{size(restored.bytes_read)} in {count(restored.objects_read, 'object')}"),
            ("written", size(restored.bytes_written)),
            ("time", duration(restored.seconds)),
        ]
    )


def _format_restored_onto(restored: RestoredOnto, dry_run: bool) -> str:
    """Return what was written onto an image, or would be."""
    written = size(restored.bytes_written)
    if restored.bytes_zeroed:
        written += f", and {size(restored.bytes_zeroed)} of zeros"
    return sheet(
        [
            ("target", f"{printable(restored.target)}, {restored.format}, {size(restored.target_size)}"),
            ("snapshot", restored.snapshot),
            ("volume", size(restored.volume_size)),
            ("compared", size(restored.bytes_compared)),
            ("read", f"{size(restored.bytes_read)} in {count(restored.objects_read, 'object')}"),
            ("differs" if dry_run else "written", written),
            ("time", duration(restored.seconds)),
        ]
    )
