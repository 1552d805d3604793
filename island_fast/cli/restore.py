"""`island restore`: its options, and what a person reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from island_fast.cli.options import (
    NAMING,
    FileName,
    common,
    image_format_option,
    limits,
    opened,
    snapshots_known,
)
from island_fast.cli.run import Run
from island_fast.cli.text import count, duration, printable, sheet, size
from island_fast.errors import UsageError

if TYPE_CHECKING:
    from island_fast.results import Restored, RestoredOnto

__all__ = ["format_restored", "format_restored_onto", "restore"]


@click.command(epilog=NAMING)
@click.argument("snapshot", shell_complete=snapshots_known)
@click.argument("target", type=FileName(), required=False)
@image_format_option("Format of TARGET or IMAGE.")
@click.option("--no-pin", is_flag=True, help="Leave no pin in TARGET, which is to be another volume.")
@click.option("--onto", metavar="IMAGE", type=FileName(),
              help="Write to this file or block device, which is there, the blocks that differ.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="With --onto: write nothing, and tell what would be written.")
@limits
@common
@click.pass_obj
def restore(
    run: Run,
    snapshot: str,
    target: Path | None,
    image_format: str,
    no_pin: bool,
    onto: Path | None,
    dry_run: bool,
) -> None:
    """Write the volume as of SNAPSHOT to the new file TARGET, or onto IMAGE.

    TARGET must not exist; it gets its name when it is whole and on disk. A qcow2 holds a pin, so its next
    snapshot is incremental; a raw file is sparse.

    IMAGE is there, and nobody may have it open. All of it is read and compared by digests first; then only
    blocks that differ are fetched and written. What it has behind the volume's end becomes zero; a smaller
    one is refused. Internal snapshots and pins in it stay as they are. After an interruption IMAGE is partly
    what it was: the same command goes on, given the id of the same SNAPSHOT (which is told), not "latest".

    \b
    Example:
      island -r /srv/snapshots restore disk@latest restored.qcow2
      island -r swift://volumes/host7 restore 6f0c2a91b3d4 disk.raw --format raw
      island -r /srv/snapshots restore disk@81d0 --onto disk.qcow2 --dry-run
      island -r /srv/snapshots restore disk@81d0 --onto /dev/vg0/disk --format raw
    """  # noqa: D301
    if (target is None) == (onto is None):
        raise UsageError("name a TARGET to be made, or an image that is there with --onto")
    if onto is not None:
        _restore_onto(run, snapshot, onto, image_format, no_pin, dry_run)
    elif target is not None:
        if dry_run:
            raise UsageError("--dry-run goes with --onto; a new TARGET is written in full")
        _restore(run, snapshot, target, image_format, no_pin)


def _restore(run: Run, snapshot: str, target: Path, image_format: str, no_pin: bool) -> None:
    def if_interrupted() -> str:
        if os.path.lexists(target):
            return f"{target} is whole, if this command made it"
        return f"{target} was not made"

    run.if_interrupted = if_interrupted
    with opened(run) as repository, run.progress() as progress:
        restored = repository.restore(
            snapshot, target, image_format=image_format, pin=not no_pin, progress=progress
        )
    run.answer(restored.as_json(), format_restored(restored))


def _restore_onto(
    run: Run, snapshot: str, target: Path, image_format: str, no_pin: bool, dry_run: bool
) -> None:
    if no_pin:
        raise UsageError("--onto leaves the pins of IMAGE as they are; leave out --no-pin")

    from island_fast.results import again  # here: other verbs start without it

    found = snapshot

    def if_interrupted() -> str:
        if run.phase in ("zero", "restore"):
            command = again(found, target, image_format)
            return f"{target} is partly what it was and partly the snapshot; run '{command}'"
        return "nothing was changed"

    run.if_interrupted = if_interrupted
    with opened(run) as repository, run.progress() as progress:
        found = repository.find(snapshot).row.id
        volume, at, _ = snapshot.rpartition("@")
        restored = repository.restore_onto(
            f"{volume}{at}{found}", target, image_format=image_format, dry_run=dry_run, progress=progress
        )
    run.answer(restored.as_json(), format_restored_onto(restored, dry_run))


def format_restored(answer: Restored) -> str:
    """A volume just written."""
    return sheet(
        [
            ("target", f"{printable(answer.target)}, {answer.format}"),
            ("snapshot", answer.snapshot),
            ("volume", size(answer.volume_size)),
            ("read", f"{size(answer.bytes_read)} in {count(answer.objects_read, 'object')}"),
            ("written", size(answer.bytes_written)),
            ("time", duration(answer.seconds)),
        ]
    )


def format_restored_onto(answer: RestoredOnto, dry_run: bool) -> str:
    """An image just written onto, or what that would write."""
    written = size(answer.bytes_written)
    if answer.bytes_zeroed:
        written += f", and {size(answer.bytes_zeroed)} of zeros"
    return sheet(
        [
            ("target", f"{printable(answer.target)}, {answer.format}, {size(answer.target_size)}"),
            ("snapshot", answer.snapshot),
            ("volume", size(answer.volume_size)),
            ("compared", size(answer.bytes_compared)),
            ("read", f"{size(answer.bytes_read)} in {count(answer.objects_read, 'object')}"),
            ("differs" if dry_run else "written", written),
            ("time", duration(answer.seconds)),
        ]
    )
