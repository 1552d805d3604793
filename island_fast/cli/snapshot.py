"""`island snapshot`: its options, also those for running guests, and the text of its answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from island_fast.cli.config import COMPRESSIONS
from island_fast.cli.help import HOW, REPOSITORY, WHAT, option, verb
from island_fast.cli.options import (
    FileName,
    add_common_options,
    add_limit_options,
    create_option,
    image_format_option,
    open_repository,
    require_utf8,
)
from island_fast.cli.run import Run
from island_fast.cli.text import count, duration, printable, sheet, size
from island_fast.errors import UsageError

if TYPE_CHECKING:
    from island_fast.results import DomainTaken, SnapshotTaken

__all__ = ["snapshot"]


@verb("Snapshot a qcow2 file, a raw device or a running guest")
@click.argument("image", type=FileName(), required=False)
@option(WHAT, "--domain", metavar="NAME", help="Snapshot this running libvirt guest, instead of IMAGE.")
@option(WHAT, "--disk", "disks", metavar="NAME", multiple=True, show_default="every writable disk",
        help="With --domain: snapshot only this disk (vda, ...); repeatable.")  # fmt: skip
@option(WHAT, "--at", metavar="NAME",
        help="Store this internal snapshot of IMAGE, not its present state.")  # fmt: skip
@option(WHAT, "--volume", metavar="NAME",
        show_default="the one known for IMAGE, else its file name without the last suffix",
        help="The volume's name, at most 128 of the characters A-Z a-z 0-9 . _ -")  # fmt: skip
@option(WHAT, "--label", metavar="TEXT", default="", callback=require_utf8,
        help="A text to keep with the snapshot.")  # fmt: skip
@option(HOW, "--qmp", metavar="SOCKET", type=FileName(),
        help="QMP socket of the process that has IMAGE open.")  # fmt: skip
@option(HOW, "--freeze", type=click.Choice(("auto", "require", "never")), show_default="auto",
        help="With --domain: freeze the guest's file systems for the moment of the snapshot; if its agent "
        "does not answer, continue without (auto) or fail (require). never does not ask it.")  # fmt: skip
@option(HOW, "--connect", metavar="URI", show_default="libvirt's own choice",
        help="With --domain: the libvirt to connect to.")  # fmt: skip
@option(HOW, "--no-pin", is_flag=True, help="Leave IMAGE untouched, and scan it in full.")
@option(HOW, "--full", is_flag=True,
        help="Read everything that is allocated, even where a table diff would do.")  # fmt: skip
@image_format_option("Format of IMAGE; raw is scanned in full.")
@option(HOW, "--backing", metavar="FORMAT:FILE", multiple=True,
        help="A backing file of IMAGE, such as qcow2:base.qcow2; repeatable, the nearest first.")  # fmt: skip
@option(HOW, "--compression", type=click.Choice(COMPRESSIONS), default=COMPRESSIONS[0], show_default=True,
        envvar="ISLAND_COMPRESSION", show_envvar=True, help="Compression of what is sent.")  # fmt: skip
@create_option()
@option(REPOSITORY, "--shared", is_flag=True,
        help="If this creates the repository, in a directory, let its group restore from it.")  # fmt: skip
@add_limit_options
@add_common_options
@click.pass_obj
def snapshot(
    run: Run,
    image: Path | None,
    domain: str | None,
    disks: tuple[str, ...],
    at: str | None,
    volume: str | None,
    label: str,
    qmp: Path | None,
    freeze: str | None,
    connect: str | None,
    no_pin: bool,
    full: bool,
    image_format: str,
    backing: tuple[str, ...],
    compression: str,
    create_anew: bool,
    shared: bool,
) -> None:
    """Take a snapshot of the qcow2 file IMAGE, or with --format raw of a raw file or block device.

    An internal snapshot, the pin, stays in IMAGE: the next run compares tables with it and reads only what
    changed. The first snapshot of a volume, and every one with --no-pin or --full, reads all allocated blocks
    and stores those that differ.

    If another process has IMAGE open for writing, give --qmp; if that is a libvirt guest, give --domain
    instead of IMAGE: the guest's disks are snapshotted at one moment, each as a volume.

    The repository is created if WHERE is an empty or new directory, or an empty place in a container.

    \b
    Example:
      island -r /srv/snapshots snapshot disk.qcow2 --label "before upgrade"
      island -r /srv/snapshots snapshot vm.qcow2 --qmp /run/vm.qmp
      island -r /srv/snapshots snapshot --domain web1
    """  # noqa: D301
    if domain is not None:
        single = {"--qmp": qmp, "--no-pin": no_pin, "--at": at, "--format": image_format != "qcow2"}
        given = [name for name, value in {**single, "--backing": backing}.items() if value]
        if image is not None or given:
            raise UsageError(f"--domain finds the images itself; leave out {', '.join(given) or 'IMAGE'}")
        _snapshot_domain(
            run,
            domain,
            disks,
            freeze or "auto",
            connect,
            volume,
            label,
            full,
            compression,
            create_anew,
            shared,
        )
        return
    if disks or freeze or connect:
        raise click.UsageError("--disk, --freeze and --connect belong to --domain")
    if image is None:
        raise click.UsageError("missing argument 'IMAGE', or --domain for a running libvirt guest")
    run.if_interrupted = lambda: _left_by_interruption(run.phase)
    opened = open_repository(run, create=True, create_anew=create_anew, shared=shared)
    with opened as repository, run.progress() as progress:
        taken = repository.snapshot(
            image,
            volume=volume,
            label=label,
            qmp=qmp,
            pin=not no_pin,
            at=at,
            full=full,
            image_format=image_format,
            backing=backing,
            compression=compression,
            progress=progress,
        )
    for note in taken.notes:
        run.note(note)
    run.answer(taken.as_json(), _format_taken(taken))


def _snapshot_domain(
    run: Run,
    domain: str,
    disks: tuple[str, ...],
    freeze: str,
    connect: str | None,
    volume: str | None,
    label: str,
    full: bool,
    compression: str,
    create_anew: bool,
    shared: bool,
) -> None:
    """Take snapshots of a running guest's disks, and print the answer."""
    run.if_interrupted = lambda: (
        "disks that are not stored keep their earlier snapshots; 'island list' shows which are stored"
    )
    opened = open_repository(run, create=True, create_anew=create_anew, shared=shared)
    with opened as repository, run.progress() as progress:
        taken = repository.snapshot_domain(
            domain,
            disks=disks,
            freeze=freeze,
            connect=connect,
            volume=volume,
            label=label,
            full=full,
            compression=compression,
            progress=progress,
        )
    for one in taken.snapshots:
        for note in one.notes:
            run.note(f"disk {one.disk}: {note}")
    run.answer(taken.as_json(), _format_domain_taken(taken))
    run.finish_with(repository.left_out)


def _left_by_interruption(phase: str) -> str:
    """Return what an interruption in this phase leaves."""
    if phase == "commit":
        return "the snapshot was about to be finished; 'island list' shows whether it exists"
    kept = "; what was sent is kept for the next one" if phase == "send" else ""
    return f"no snapshot was made, earlier ones are unchanged{kept}"


def _format_taken(taken: SnapshotTaken) -> str:
    """Return how the change of a new snapshot was found, and what the snapshot cost."""
    return sheet(
        [
            ("snapshot", taken.snapshot),
            ("volume", f"{taken.volume}, {size(taken.volume_size)}"),
            ("parent", taken.parent or "none"),
            ("label", printable(taken.label)),
            ("rule", f"{taken.rule}: {printable(taken.reason)}"),
            (
                "blocks",
                f"{taken.blocks_changed} changed, of {taken.blocks_candidate} that could have; 64 KiB each",
            ),
            (
                "resumed",
                f"{taken.blocks_kept} of these blocks had been sent by an interrupted attempt"
                if taken.attempt
                else "",
            ),
            (
                "read",
                f"{size(taken.bytes_read)}"
                + (
                    f"; {count(taken.blocks_sampled, 'unchanged block')} compared"
                    if taken.blocks_sampled
                    else ""
                ),
            ),
            ("stored", f"{size(taken.bytes_stored)}; {count(taken.objects_written, 'object')} written"),
            ("time", duration(taken.seconds)),
        ]
    )


def _format_domain_taken(taken: DomainTaken) -> str:
    """Return the state of the guest, and each of its new snapshots."""
    guest = [
        ("domain", printable(taken.domain)),
        ("group", taken.group or ""),
        ("consistency", f"{taken.consistency}: {printable(taken.reason)}"),
    ]
    disks = [f"disk      {one.disk}, {printable(one.image)}\n{_format_taken(one)}" for one in taken.snapshots]
    return "\n\n".join([sheet(guest), *disks])
