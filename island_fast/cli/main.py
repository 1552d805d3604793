"""The command `island`: what it understands, and which call of the Python API each verb is.

Answers, errors and signals are in `outcome.py`, what people read in `show.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from island_fast import __version__
from island_fast.cli import text as show
from island_fast.cli.config import COMPRESSIONS, configured
from island_fast.cli.copy import copy
from island_fast.cli.image import info, map_
from island_fast.cli.list import diff, retain, usage
from island_fast.cli.options import (
    NAMING,
    FileName,
    common,
    image_format_option,
    limits,
    opened,
    seconds,
    snapshots_known,
    text,
)
from island_fast.cli.restore import restore
from island_fast.cli.run import Run, conclude
from island_fast.cli.snapshot import Guest, domain_options, refuse_mixture, snapshot_domain
from island_fast.cli.verify import verify

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (by default this process's) and return its exit code. Never raises."""
    words = [*(sys.argv[1:] if argv is None else argv)]

    def work(run: Run) -> None:
        if asked := os.environ.get("_ISLAND_COMPLETE"):
            from island_fast.cli.completion import complete

            complete(island, run, asked)
            return
        run.help_asked = not {"-h", "--help"}.isdisjoint(words)
        with island.make_context("island", words or ["--help"], obj=run) as context:
            island.invoke(context)

    return conclude(work, json_asked="--json" in words, to_the_end=argv is None)


class _Verbs(click.Group):
    """Lists verbs in the order in which they are defined."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the verbs."""
        return list(self.commands)


def _version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from island_fast._diff import HASH_KERNEL

        text = f"island {__version__}, digests by {HASH_KERNEL}"
        answer = {"version": __version__, "hash_kernel": HASH_KERNEL}
        context.ensure_object(Run).answer(answer, text, brief=__version__)
        context.exit()


@click.group(
    cls=_Verbs,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=NAMING,
)
@common
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version,
              help="Tell the version and what computes digests.")  # fmt: skip
@click.pass_context
def island(context: click.Context) -> None:
    """Incremental snapshots of qcow2 volumes, each whole by itself, in a directory or OpenStack Swift.

    Only blocks that changed since the volume's previous snapshot are read and stored; any snapshot can be
    deleted, in any order, and every one restores by itself.

    \b
    Example:
      export ISLAND_REPOSITORY=/srv/snapshots    # or swift://volumes/host7
      island snapshot disk.qcow2
      island list
      island restore disk@latest restored.qcow2

    \b
    Environment:
      ISLAND_REPOSITORY       the repository, where -r does not name one
      ISLAND_COMPRESSION      compression of what is sent: zstd or none
      ISLAND_WORKERS          the most threads that work on blocks at a time
      ISLAND_LIMIT_UPLOAD     rates of --limit-upload and --limit-download,
      ISLAND_LIMIT_DOWNLOAD   such as 10M
      ISLAND_KEEP_LAST, ...   values of --keep-last and the other rules of 'island retain'
      ISLAND_CONFIG           the configuration file, for what is not set here either
                              [default: ~/.config/island/config.toml]
      ISLAND_STATE            folder of local state: locks and caches
      ISLAND_DEBUG=1          show the traceback of an error
      ST_AUTH ST_USER ST_KEY, OS_* or OS_CLOUD    credentials for Swift
      ISLAND_TO_ST_AUTH and so on, ISLAND_TO_OS_*    those for 'copy --to', where they differ

    \b
    Exit codes:
      0  done
      1  failed, or interrupted by Ctrl-C, SIGTERM or SIGHUP
      2  wrong usage
      3  not found: a file, repository, container, volume or snapshot
      4  refused for safety: going on could lose or mix data
      5  the store cannot be reached, or does not let you in
      6  damaged data
    """  # noqa: D301
    # The script is made at every login, which a broken file is not to spoil.
    run = context.ensure_object(Run)
    try:
        values = {} if context.invoked_subcommand == "completion" else configured()
    except click.UsageError:
        if not run.help_asked:
            raise
        values = {}
    run.location = run.location or values.get("repository")
    context.default_map = values


@island.command()
@click.argument("image", type=FileName(), required=False)
@click.option("--volume", metavar="NAME",
              help="The volume's name: at most 128 of A-Z a-z 0-9 . _ -  "
              "[default: the one known for IMAGE, else its file name without the last suffix]")  # fmt: skip
@click.option("--label", metavar="TEXT", default="", callback=text,
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
    run.answer(taken.as_json(), show.taken(taken), taken.snapshot)


def _left_of_a_snapshot(phase: str) -> str:
    """What an interruption in this phase leaves."""
    if phase == "commit":
        return "the snapshot was about to be finished; 'island list' shows whether it is there"
    kept = "; what was sent is kept for the next one" if phase == "send" else ""
    return "no snapshot was made, earlier ones are as they were" + kept


@island.command("list")
@click.option(
    "--volume", metavar="NAME", help="Only snapshots of this volume; needs no listing of the store."
)
@common
@click.pass_obj
def list_(run: Run, volume: str | None) -> None:
    """List snapshots, oldest first within each volume.

    Ids are cut to 12 digits, which name a snapshot as well as all 32 do; --json and --quiet give them whole.

    \b
    Example:
      island -r /srv/snapshots list --volume disk
      island -r /srv/snapshots list --json | jq -r '.[].snapshot'
    """  # noqa: D301
    with opened(run) as repository:
        found = repository.snapshots(volume)
        if not found and not run.quiet and not repository.left_out:
            run.note(f"there are no snapshots in {repository.store.location}")
    text = show.listed(found) if found else ""
    run.answer([one.as_json() for one in found], text, "\n".join(one.snapshot for one in found))
    run.left_out(repository.left_out)


@island.command("show", epilog=NAMING)
@click.argument("snapshot", shell_complete=snapshots_known)
@common
@click.pass_obj
def show_(run: Run, snapshot: str) -> None:
    """Show one snapshot, and what deleting it would free.

    \b
    Example:
      island -r /srv/snapshots show disk@latest
    """  # noqa: D301
    with opened(run) as repository:
        found = repository.show(snapshot)
    run.answer(found.as_json(), show.shown(found), found.snapshot)


island.add_command(restore)  # here, for the help lists verbs in this order


@island.command(epilog=NAMING)
@click.argument("snapshots", metavar="SNAPSHOT...", nargs=-1, required=True, shell_complete=snapshots_known)
@click.option("--dry-run", is_flag=True, help="Change nothing, and tell what would be freed.")
@common
@click.pass_obj
def delete(run: Run, snapshots: tuple[str, ...], dry_run: bool) -> None:
    """Delete snapshots; all others stay whole.

    All are looked up before the first is deleted. Their space is freed by the next 'island sweep'.

    \b
    Example:
      island -r /srv/snapshots delete --dry-run 6f0c2a91b3d4
      island -r /srv/snapshots delete 6f0c2a91b3d4 disk@81d0
    """  # noqa: D301
    if not dry_run:
        run.if_interrupted = lambda: "'island list' shows which snapshots are still there"
    with opened(run) as repository:
        deleted = repository.delete(snapshots, dry_run=dry_run)
    run.answer([one.as_json() for one in deleted], show.deleted(deleted, dry_run))


@island.command()
@click.option("--grace", metavar="TIME", callback=seconds,
              help="Keep what is younger than this, such as 24h, 90m, 3600s, 7d or 0. "
              "Less than the default is safe only if nothing else uses the repository now.  "
              "[default: 24h in Swift, 0 in a directory]")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Change nothing, and tell what would be freed.")
@limits
@common
@click.pass_obj
def sweep(run: Run, grace: float | None, dry_run: bool) -> None:
    """Remove what no snapshot needs any more, from the volumes that this host owns.

    Packs that are mostly unneeded are written anew without the rest; --dry-run lists every object, and why.
    A sweep can be interrupted and run again at any time; snapshots go on meanwhile.

    \b
    Example:
      island -r /srv/snapshots sweep --dry-run
      island -r swift://volumes/host7 sweep --grace 7d
    """  # noqa: D301
    if not dry_run:
        run.if_interrupted = lambda: "all snapshots are as they were; the next sweep goes on"
    with opened(run) as repository, run.progress() as progress:
        swept = repository.sweep(grace=grace, dry_run=dry_run, progress=progress)
        if not swept and not run.quiet and not repository.left_out:
            run.note(f"this host owns no volume in {repository.store.location}")
    run.answer([one.as_json() for one in swept], show.swept(swept, dry_run))
    run.left_out(repository.left_out)


@island.command()
@click.argument("volume")
@common
@click.pass_obj
def adopt(run: Run, volume: str) -> None:
    """Make this host the owner of VOLUME, and let its next snapshot come from any image.

    One host owns a volume's snapshots: only it takes, deletes and sweeps them. Adopt a volume when its host
    is gone, when that host's local state is lost, or to go on with another image as that volume.

    \b
    Example:
      island -r swift://volumes/host7 adopt disk
    """  # noqa: D301
    run.if_interrupted = lambda: "all snapshots are as they were; run it again"
    with opened(run) as repository:
        adopted = repository.adopt(volume)
    run.answer(adopted.as_json(), show.adopted(adopted))


@island.command()
@click.argument("image", type=FileName())
@click.option("--qmp", metavar="SOCKET", type=FileName(),
              help="QMP socket of the process that has IMAGE open.")  # fmt: skip
@click.option("--orphans", is_flag=True,
              help="Only those that interrupted snapshots left, by the repository's catalog.")  # fmt: skip
@common
@click.pass_obj
def unpin(run: Run, image: Path, qmp: Path | None, orphans: bool) -> None:
    """Drop all pins from the qcow2 file IMAGE, of whatever repository.

    They hold what was written over since the last snapshot. The next snapshot of IMAGE scans in full and
    stores what differs; snapshots that are stored stay as they are. Only --orphans needs a repository.

    \b
    Example:
      island unpin disk.qcow2
      island unpin vm.qcow2 --qmp /run/vm.qmp
    """  # noqa: D301
    from island_fast.operations.unpin import unpin

    run.if_interrupted = lambda: "'island info' shows which pins are still there"
    if orphans:
        with opened(run) as repository:
            answer = unpin(image, qmp, orphaned_in=repository)
    else:
        answer = unpin(image, qmp)
    run.answer(answer.as_json(), show.unpinned(answer, orphans), "\n".join(answer.pins))


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common
@click.pass_obj
def completion(run: Run, shell: str) -> None:
    """Print the script that has SHELL complete verbs, options, files and names of snapshots.

    Names of snapshots come from a repository in a directory; one in Swift is not asked. bash must be 4.4 or
    newer.

    \b
    Example:
      eval "$(island completion bash)"           # in ~/.bashrc
      eval "$(island completion zsh)"            # in ~/.zshrc, after compinit
      island completion fish | source            # in ~/.config/fish/config.fish
    """  # noqa: D301
    from island_fast.cli.completion import script

    written = script(shell, island)
    run.answer({"shell": shell, "script": written}, written.rstrip("\n"), written.rstrip("\n"))


for verb in (copy, retain, diff, usage, verify, info, map_, completion):
    island.add_command(verb)
