"""`island snapshot --domain`: its options, and what it answers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from island_fast.cli import text
from island_fast.cli.options import opened
from island_fast.cli.run import Run
from island_fast.errors import UsageError

__all__ = ["Guest", "domain_options", "refuse_mixture", "snapshot_domain"]


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
    run.answer(taken.as_json(), text.domain_taken(taken), ids)
    run.left_out(repository.left_out)


def refuse_mixture(image: object, **others: object) -> None:
    """UsageError for a guest together with what is about a single image."""
    given = [f"--{name.replace('_', '-')}" for name, value in others.items() if value]
    if image is not None or given:
        raise UsageError(f"--domain finds the images itself; leave out {', '.join(given) or 'IMAGE'}")
