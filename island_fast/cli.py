"""The command `island`: parses, calls the Python API, and tells the outcome.

An answer goes to standard output, as text or with --json as one JSON value; everything else goes to standard
error. Errors become one sentence and an exit code here, and nowhere else. SIGINT, SIGTERM and SIGHUP are
raised as an exception in the main thread, so that all work unwinds and cleans up after itself.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TextIO

import click

from island_fast import __version__, show
from island_fast.errors import IslandError, UsageError

if TYPE_CHECKING:
    from island_fast.progress import Progress
    from island_fast.repository import Repository

__all__ = ["main"]

_HARD_EXITS = 3  # this many Ctrl-C end the process at once


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end. A KeyboardInterrupt, so that nothing on the way catches it."""


class _OutputError(Exception):
    """Standard output cannot be written to; the error of the system is the cause."""


class _Signals:
    """Turns the first SIGINT, SIGTERM or SIGHUP into Interrupted in the main thread; a context manager.

    Later ones are swallowed while the first unwinds, but for the third Ctrl-C, which ends the process: that
    is as safe as a power cut. A signal that is ignored when it starts (nohup, background jobs) stays so.
    """

    def __init__(self) -> None:
        self.armed = True
        self._received = self._keys = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.armed = False
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received += 1
        self._keys += number == signal.SIGINT
        if self._keys >= _HARD_EXITS:
            os._exit(1)
        if self._received == 1 and self.armed:
            raise Interrupted
        if self._keys == _HARD_EXITS - 1 and _is_terminal(sys.stderr):
            os.write(2, b"\nisland: cleaning up; press Ctrl-C once more to leave at once\n")

    def check(self) -> None:
        """Raise Interrupted again if it was raised where nothing could unwind, or to end a worker."""
        if self._received and self.armed:
            raise Interrupted


@dataclass(slots=True)
class _Call:
    """One run of the command: what the options of every verb say, and how far it came.

    `if_interrupted` says what an interruption leaves; verbs set it, and progress may change it.
    """

    signals: _Signals
    location: str | None = None
    json: bool = False
    quiet: bool = False
    if_interrupted: str | Callable[[], str] = "nothing was changed"
    phase: str = ""

    def repository(self, *, create: bool = False) -> Repository:
        """Open the repository that is asked for."""
        from island_fast.repository import Repository  # here: it takes a good part of a second

        location = self.location or os.environ.get("ISLAND_REPOSITORY")
        if not location:
            raise UsageError(
                "no repository is named; give -r PATH or -r swift://CONTAINER/PREFIX, or set ISLAND_REPOSITORY"
            )
        return Repository.open(location, create=create)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """What verbs tell their progress to, shown as bars on a terminal."""
        with show.Bars(not self.quiet) as bars:

            def tell(phase: str, done: int, total: int) -> None:
                self.signals.check()
                self.phase = phase
                bars(phase, done, total)

            yield tell

    def answer(self, value: Any, text: str, brief: str = "") -> None:
        """Tell the outcome: `value` with --json, `brief` with --quiet, else `text`; "" tells nothing."""
        if self.json:
            _write_answer(json.dumps(value))
        elif line := (brief if self.quiet else text):
            _write_answer(line)

    def note(self, text: str) -> None:
        """Tell something beside the answer."""
        _complain(show.printable(text))


# Parsing.


def _remember(field: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    """Keeps an option's value in the `_Call`, if it is given: before the verb, after it, or both."""

    def keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value:
            setattr(context.find_object(_Call), field, value)

    return keep


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that every verb has."""
    for option in (
        click.option(
            "-q", "--quiet", is_flag=True, expose_value=False, callback=_remember("quiet"),
            help="No progress, and no answer but ids.",
        ),
        click.option(
            "--json", is_flag=True, expose_value=False, callback=_remember("json"),
            help="Answer with one JSON value on standard output.",
        ),
        click.option(
            "-r", "--repository", metavar="WHERE", expose_value=False, callback=_remember("location"),
            help="A directory's path, or swift://CONTAINER/PREFIX.  [default: $ISLAND_REPOSITORY]",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


class _Grace(click.ParamType):
    """A time span such as 24h, 90m, 3600s, 7d or 0, in seconds."""

    name = "time"
    _UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}  # noqa: RUF012
    _PATTERN = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds, or a usage error."""
        match = self._PATTERN.fullmatch(str(value))
        if not match and value != "0":
            self.fail(f"{value!r} is no time span; write one such as 24h, 90m, 3600s, 7d or 0", param, ctx)
        return float(match[1]) * self._UNITS[match[2]] if match else 0.0


class _Verbs(click.Group):
    """Lists verbs in the order in which they are defined."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the verbs."""
        return list(self.commands)


def _version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from island_fast._diff import HASH_KERNEL

        _write_answer(f"island {__version__}, digests by {HASH_KERNEL}")
        context.exit()


_SNAPSHOT_HELP = (
    "A SNAPSHOT is named by its id, by an unambiguous beginning of it, by VOLUME@ID (which looks at that volume "
    "alone), or by VOLUME@latest."
)


@click.group(
    cls=_Verbs,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_SNAPSHOT_HELP,
)
@_common
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version,
              help="Tell the version and what computes digests.")  # fmt: skip
def island() -> None:
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
      ISLAND_STATE            folder of local state: locks and caches
      ISLAND_DEBUG=1          show the traceback of an error
      ST_AUTH ST_USER ST_KEY, OS_* or OS_CLOUD    credentials for Swift

    \b
    Exit codes:
      0  done
      1  failed, or interrupted by Ctrl-C, SIGTERM or SIGHUP
      2  wrong usage
      3  not found: a file, repository, container, volume or snapshot
      4  refused for safety: going on could lose or mix data
      5  the store cannot be reached, or does not let you in
      6  damaged data
    """


@island.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--volume", metavar="NAME", help="The volume's name: A-Z a-z 0-9 . _ - and at most 128 of them.  "
              "[default: the one known for IMAGE, else its file name without the last suffix]")  # fmt: skip
@click.option("--label", metavar="TEXT", default="", help="A text to keep with the snapshot.")
@click.option("--qmp", metavar="SOCKET", type=click.Path(path_type=Path),
              help="QMP socket of the process that has IMAGE open.")  # fmt: skip
@click.option("--no-pin", is_flag=True, help="Leave IMAGE untouched, and scan it in full.")
@click.option("--at", metavar="INTERNAL_SNAPSHOT", help="Store this internal snapshot of IMAGE, not its present.")
@click.option("--full", is_flag=True, help="Read all that is allocated, even where a table diff would do.")
@_common
@click.pass_obj
def snapshot(
    call: _Call,
    image: Path,
    volume: str | None,
    label: str,
    qmp: Path | None,
    no_pin: bool,
    at: str | None,
    full: bool,
) -> None:
    """Take a snapshot of the qcow2 file IMAGE.

    An internal snapshot, the pin, stays in IMAGE: the next run compares tables with it and reads only what
    changed. The first snapshot of a volume, and every one with --no-pin or --full, reads all allocated blocks
    and stores those that differ. An image that another process has open for writing needs --qmp.
    The repository is made if WHERE is an empty or new directory, or an empty place in a container.

    \b
    Example:
      island -r /srv/snapshots snapshot disk.qcow2 --label "before the upgrade"
      island -r /srv/snapshots snapshot vm.qcow2 --qmp /run/vm.qmp
    """
    if not _is_text(label):
        raise UsageError("the label is not UTF-8 text; give another --label")

    def if_interrupted() -> str:
        if call.phase == "commit":
            return "the snapshot was about to be finished; 'island list' shows whether it is there"
        return "no snapshot was made, earlier ones are as they were"

    call.if_interrupted = if_interrupted
    with call.repository(create=True) as repository, call.progress() as progress:
        taken = repository.snapshot(
            image, volume=volume, label=label, qmp=qmp, pin=not no_pin, at=at, full=full, progress=progress
        )
    for note in taken.notes:
        call.note(note)
    call.answer(taken.as_json(), show.taken(taken), taken.snapshot)


@island.command("list")
@click.option("--volume", metavar="NAME", help="Only snapshots of this volume; needs no listing of the store.")
@_common
@click.pass_obj
def list_(call: _Call, volume: str | None) -> None:
    """List snapshots, oldest first within each volume.

    Ids are cut to 12 digits, which name a snapshot as well as all 32 do; --json and --quiet give them whole.

    \b
    Example:
      island -r /srv/snapshots list --volume disk
      island -r /srv/snapshots list --json | jq -r '.[].snapshot'
    """
    with call.repository() as repository:
        found = repository.snapshots(volume)
        if not found:
            call.note(f"there are no snapshots in {repository.store.location}")
    text = show.listed(found) if found else ""
    call.answer([one.as_json() for one in found], text, "\n".join(one.snapshot for one in found))


@island.command("show", epilog=_SNAPSHOT_HELP)
@click.argument("snapshot")
@_common
@click.pass_obj
def show_(call: _Call, snapshot: str) -> None:
    """Show one snapshot.

    \b
    Example:
      island -r /srv/snapshots show disk@latest
    """
    with call.repository() as repository:
        found = repository.show(snapshot)
    call.answer(found.as_json(), show.shown(found), found.snapshot)


@island.command(epilog=_SNAPSHOT_HELP)
@click.argument("snapshot")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--format", "image_format", type=click.Choice(["qcow2", "raw"]), default="qcow2",
              show_default=True, help="Format of TARGET.")  # fmt: skip
@_common
@click.pass_obj
def restore(call: _Call, snapshot: str, target: Path, image_format: str) -> None:
    """Write the volume as of SNAPSHOT to the new file TARGET.

    TARGET must not exist; it gets its name when it is whole and on disk. A qcow2 holds a pin, so its next
    snapshot is incremental; a raw file is sparse.

    \b
    Example:
      island -r /srv/snapshots restore disk@latest restored.qcow2
      island -r swift://volumes/host7 restore 6f0c2a91b3d4 disk.raw --format raw
    """

    def if_interrupted() -> str:
        if os.path.lexists(target):
            return f"{target} is whole, if this command made it"
        return f"{target} was not made"

    call.if_interrupted = if_interrupted
    with call.repository() as repository, call.progress() as progress:
        restored = repository.restore(snapshot, target, image_format=image_format, progress=progress)
    call.answer(restored.as_json(), show.restored(restored))


@island.command(epilog=_SNAPSHOT_HELP)
@click.argument("snapshots", metavar="SNAPSHOT...", nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Change nothing, and tell what would be freed.")
@_common
@click.pass_obj
def delete(call: _Call, snapshots: tuple[str, ...], dry_run: bool) -> None:
    """Delete snapshots; all others stay whole.

    All are looked up before the first is deleted. Their space is freed by the next 'island sweep'.

    \b
    Example:
      island -r /srv/snapshots delete --dry-run 6f0c2a91b3d4
      island -r /srv/snapshots delete 6f0c2a91b3d4 disk@81d0
    """
    if not dry_run:
        call.if_interrupted = "'island list' shows which snapshots are still there"
    with call.repository() as repository:
        deleted = repository.delete(snapshots, dry_run=dry_run)
    call.answer([one.as_json() for one in deleted], show.deleted(deleted, dry_run))


@island.command()
@click.option("--grace", type=_Grace(), metavar="TIME", help="Keep what is younger, such as 24h, 90m, 3600s, 7d or "
              "0; less than the default is safe only if nothing else uses the repository now.  "
              "[default: 24h in Swift, 0 in a directory]")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Change nothing, and tell what would be freed.")
@_common
@click.pass_obj
def sweep(call: _Call, grace: float | None, dry_run: bool) -> None:
    """Remove what no snapshot needs any more, from the volumes that this host owns.

    Packs that are mostly unneeded are written anew without the rest. A sweep can be interrupted and run
    again at any time.

    \b
    Example:
      island -r /srv/snapshots sweep --dry-run
      island -r swift://volumes/host7 sweep --grace 7d
    """
    if not dry_run:
        call.if_interrupted = "all snapshots are as they were; the next sweep goes on"
    with call.repository() as repository, call.progress() as progress:
        swept = repository.sweep(grace=grace, dry_run=dry_run, progress=progress)
        if not swept:
            call.note(f"this host owns no volume in {repository.store.location}")
    call.answer([one.as_json() for one in swept], show.swept(swept, dry_run))


@island.command()
@click.argument("volume")
@_common
@click.pass_obj
def adopt(call: _Call, volume: str) -> None:
    """Make this host the owner of VOLUME, and let its next snapshot come from any image.

    One host owns a volume's snapshots: only it takes, deletes and sweeps them. Adopt a volume when its host is
    gone, when that host's local state is lost, or to go on with another image as that volume.

    \b
    Example:
      island -r swift://volumes/host7 adopt disk
    """
    call.if_interrupted = "all snapshots are as they were; run it again"
    with call.repository() as repository:
        adopted = repository.adopt(volume)
    call.answer(adopted.as_json(), show.adopted(adopted))
