"""`island snapshot`: its options, also of running guests, and what a person reads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from island_fast.cli.config import COMPRESSIONS
from island_fast.cli.options import FileName, common, image_format_option, limits, opened, utf8_text
from island_fast.cli.run import Run
from island_fast.cli.text import count, duration, printable, sheet, size
from island_fast.errors import UsageError

if TYPE_CHECKING:
    from island_fast.results import DomainTaken, SnapshotTaken

__all__ = [
    "Guest",
    "domain_options",
    "format_domain_taken",
    "format_taken",
    "refuse_mixture",
    "snapshot_domain",
]


@dataclass(frozen=True, slots=True)
class Guest:
    """The running guest that is asked for, and how: see `Repository.snapshot_domain`."""

    domain: str
    disks: tuple[str, ...]
    freeze: str
    connect: str | None


def domain_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of running guests, whose values come as one `guest`, None without --domain."""

    @functools.wraps(command)
    def collected(
        *words: object,
        domain: str | None,
        disk: tuple[str, ...],
        freeze: str | None,
        connect: str | None,
        **options: object,
    ) -> object:
        if domain is None and (disk or freeze or connect):
            raise click.UsageError("--disk, --freeze and --connect belong to --domain")
        guest = None if domain is None else Guest(domain, disk, freeze or "auto", connect)
        return command(*words, guest=guest, **options)

    for option in (
        click.option(
            "--connect", metavar="URI", help="Where libvirt is.  [default: libvirt's own choice]"
        ),
        click.option(
            "--freeze", type=click.Choice(("auto", "require", "never")),
            help="Freeze the guest's file systems meanwhile: if its agent answers (auto), else fail "
            "(require), or do not ask it (never).  [default: auto]",
        ),
        click.option(
            "--disk", metavar="NAME", multiple=True,
            help="A disk of the guest, such as vda; several.  [default: all that it may write to]",
        ),
        click.option("--domain", metavar="NAME", help="A running libvirt guest, instead of IMAGE."),
    ):  # fmt: skip
        collected = option(collected)
    return collected


def snapshot_domain(
    run: Run, guest: Guest, volume: str | None, label: str, full: bool, compression: str
) -> None:
    """Take the snapshots and tell of them."""
    run.if_interrupted = lambda: (
        "disks that are not stored keep their earlier snapshots; 'island list' shows which are stored"
    )
    with opened(run, create=True) as repository, run.progress() as progress:
        taken = repository.snapshot_domain(
            guest.domain,
            disks=guest.disks,
            freeze=guest.freeze,
            connect=guest.connect,
            volume=volume,
            label=label,
            full=full,
            compression=compression,
            progress=progress,
        )
    for one in taken.snapshots:
        for note in one.notes:
            run.note(f"disk {one.disk}: {note}")
    ids = "\n".join(one.snapshot for one in taken.snapshots)
    run.answer(taken.as_json(), format_domain_taken(taken), ids)
    run.left_out(repository.left_out)


def refuse_mixture(image: object, **others: object) -> None:
    """UsageError for a guest together with what is about a single image."""
    given = [f"--{name.replace('_', '-')}" for name, value in others.items() if value]
    if image is not None or given:
        raise UsageError(f"--domain finds the images itself; leave out {', '.join(given) or 'IMAGE'}")


@click.command()
@click.argument("image", type=FileName(), required=False)
@click.option("--volume", metavar="NAME",
              help="The volume's name: at most 128 of A-Z a-z 0-9 . _ -  "
              "[default: the one known for IMAGE, else its file name without the last suffix]")  # fmt: skip
@click.option("--label", metavar="TEXT", default="", callback=utf8_text,
              help="A text to keep with the snapshot.")  # fmt: skip
@click.option("--qmp", metavar="SOCKET", type=FileName(),
              help="QMP socket of the process that has IMAGE open.")  # fmt: skip
@domain_options
@click.option("--no-pin", is_flag=True, help="Leave IMAGE untouched, and scan it in full.")
@click.option(
    "--at", metavar="INTERNAL_SNAPSHOT", help="Store this internal snapshot of IMAGE, not its present."
)
@click.option("--full", is_flag=True, help="Read all that is allocated, even where a table diff would do.")
@image_format_option("Format of IMAGE; a raw one is scanned in full.")
@click.option("--backing", metavar="FORMAT:FILE", multiple=True,
              help="A backing file of IMAGE, such as qcow2:base.qcow2; several, nearest first.")  # fmt: skip
@click.option("--compression", type=click.Choice(COMPRESSIONS), default=COMPRESSIONS[0], show_default=True,
              envvar="ISLAND_COMPRESSION", show_envvar=True, help="Compression of what is sent.")  # fmt: skip
@limits
@common
@click.pass_obj
def snapshot(
    run: Run,
    image: Path | None,
    guest: Guest | None,
    volume: str | None,
    label: str,
    qmp: Path | None,
    no_pin: bool,
    at: str | None,
    full: bool,
    image_format: str,
    backing: tuple[str, ...],
    compression: str,
) -> None:
    """Take a snapshot of the qcow2 file IMAGE, or with --format raw of a raw file or block device.

    An internal snapshot, the pin, stays in IMAGE: the next run compares tables with it and reads only what
    changed. The first snapshot of a volume, and every one with --no-pin or --full, reads all allocated blocks
    and stores those that differ. An image that another process has open for writing needs --qmp, or
    --domain for those of a running libvirt guest: its disks are taken at one moment, each as its own volume.
    The repository is made if WHERE is an empty or new directory, or an empty place in a container.

    \b
    Example:
      island -r /srv/snapshots snapshot disk.qcow2 --label "before the upgrade"
      island -r /srv/snapshots snapshot vm.qcow2 --qmp /run/vm.qmp
      island -r /srv/snapshots snapshot --domain web1
    """  # noqa: D301
    if guest is not None:
        refuse_mixture(image, qmp=qmp, no_pin=no_pin, at=at, format=image_format != "qcow2", backing=backing)
        snapshot_domain(run, guest, volume, label, full, compression)
        return
    if image is None:
        raise click.UsageError("missing argument 'IMAGE', or --domain for a running libvirt guest")
    run.if_interrupted = lambda: _left_of_a_snapshot(run.phase)
    with opened(run, create=True) as repository, run.progress() as progress:
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
    run.answer(taken.as_json(), format_taken(taken), taken.snapshot)


def _left_of_a_snapshot(phase: str) -> str:
    """What an interruption in this phase leaves."""
    if phase == "commit":
        return "the snapshot was about to be finished; 'island list' shows whether it is there"
    kept = "; what was sent is kept for the next one" if phase == "send" else ""
    return "no snapshot was made, earlier ones are as they were" + kept


def format_taken(answer: SnapshotTaken) -> str:
    """A snapshot just made: how its change was found, and what it took."""
    return sheet(
        [
            ("snapshot", answer.snapshot),
            ("volume", f"{answer.volume}, {size(answer.volume_size)}"),
            ("parent", answer.parent or "none"),
            ("label", printable(answer.label)),
            ("rule", f"{answer.rule}: {printable(answer.reason)}"),
            (
                "blocks",
                f"{answer.blocks_candidate} may have changed, {answer.blocks_changed} did; 64 KiB each",
            ),
            ("kept", _kept(answer)),
            ("read", size(answer.bytes_read)),
            ("stored", f"{size(answer.bytes_stored)}; {count(answer.objects_written, 'object')} written"),
            ("time", duration(answer.seconds)),
        ]
    )


def format_domain_taken(answer: DomainTaken) -> str:
    """Snapshots just made of a guest's disks, and how the guest was."""
    guest = [
        ("domain", printable(answer.domain)),
        ("group", answer.group or ""),
        ("consistency", f"{answer.consistency}: {printable(answer.reason)}"),
    ]
    disks = [f"disk      {one.disk}, {printable(one.image)}\n{format_taken(one)}" for one in answer.snapshots]
    return "\n\n".join([sheet(guest), *disks])


def _kept(answer: SnapshotTaken) -> str:
    if not answer.attempt:
        return ""
    return f"{answer.blocks_kept} of these blocks were sent by an attempt that was interrupted"
