"""Options that verbs share, the values that options can have, and the repositories that they name."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from island_fast.cli.config import parse_rate
from island_fast.cli.help import HOW, OUTPUT, REPOSITORY, WHAT, option
from island_fast.cli.run import Run
from island_fast.errors import UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from island_fast.api import Repository
    from island_fast.stores.rate_limit import RateLimiters

__all__ = [
    "NAMING",
    "FileName",
    "add_common_options",
    "add_limit_options",
    "complete_directory",
    "complete_snapshot",
    "create_option",
    "dry_run_option",
    "image_format_option",
    "open_repository",
    "open_second_repository",
    "parse_share",
    "parse_span",
    "require_utf8",
    "volume_option",
]

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

NAMING = (
    "A SNAPSHOT is named by its id, by its first digits if no other id begins with them, by VOLUME@ID "
    "(which searches only that volume), by VOLUME@latest, or by VOLUME@label:TEXT if only one has that label."
)
"""The end of the help of verbs on snapshots."""

_STEP = 0.1  # seconds

_OTHER = "ISLAND_TO_"
"""What begins the names of variables with credentials for a second repository."""


# Options.


def add_common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that every verb has. Those that --version answers by are eager, so they come first."""
    for add in (
        option(
            OUTPUT, "-q", "--quiet", is_flag=True, is_eager=True, expose_value=False,
            callback=_store_option("quiet"),
            help="Print nothing if all is well; list and show print ids.",
        ),
        option(
            OUTPUT, "--json-progress", is_flag=True, expose_value=False,
            callback=_store_option("json_progress"),
            help="Report progress as lines of JSON on standard error.",
        ),
        option(
            OUTPUT, "--json", is_flag=True, is_eager=True, expose_value=False, callback=_store_option("json"),
            help="Print the answer as one JSON value.",
        ),
        option(
            REPOSITORY, "-r", "--repository", metavar="WHERE", expose_value=False,
            callback=_store_option("location"), envvar="ISLAND_REPOSITORY", show_envvar=True,
            shell_complete=complete_directory, help="A directory, or swift://CONTAINER/PREFIX.",
        ),
    ):  # fmt: skip
        command = add(command)
    return command


def _store_option(field: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    """Return a callback that keeps an option's value in the `Run`, given before the verb, after it, or both.

    A value from a variable or the configuration file never replaces one from the command line.
    """

    def store(context: click.Context, parameter: click.Parameter, value: object) -> None:
        run = context.ensure_object(Run)
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and value == "":
            raise UsageError(f"{parameter.opts[0]} names no repository; leave it out, or name one")
        if value and (given or not getattr(run, field)):
            setattr(run, field, value)
            if field == "location":
                run.located = given

    return store


def volume_option(text: str) -> _Decorator:
    """Return the option --volume of a verb, with its help text."""
    return option(WHAT, "--volume", metavar="NAME", help=text)


def image_format_option(text: str) -> _Decorator:
    """Return the option --format of a verb, with its help text; formats are never probed."""
    return option(
        HOW, "--format", "image_format", type=click.Choice(["qcow2", "raw"]), default="qcow2",
        show_default=True, help=text,
    )  # fmt: skip


def dry_run_option(text: str = "Change nothing; show what would be freed.") -> _Decorator:
    """Return the option --dry-run of a verb."""
    return option(HOW, "--dry-run", is_flag=True, help=text)


def create_option() -> _Decorator:
    """Return the option --create of a verb that makes a repository."""
    return option(
        REPOSITORY, "--create", "create_anew", is_flag=True,
        help="Create the repository even if this host has used another one at that place, whose disk may not "
        "be mounted.",
    )  # fmt: skip


def add_limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that limit how fast a verb moves data, and by how many threads."""

    def store_workers(context: click.Context, parameter: click.Parameter, value: int | None) -> None:
        context.ensure_object(Run).workers = value

    def store_rate(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            limit = parse_rate(value)
            if limit is None:
                raise click.BadParameter(
                    f"{value!r} is not a valid rate; write one number and K, M or G, without B, such as 10M"
                )
            setattr(context.ensure_object(Run), parameter.name or "", limit)

    for direction, text in (
        ("download", "The same for what is fetched."),
        ("upload", "Send at most this much per second on average, such as 500K, 10M or 1G (KiB, MiB, GiB)."),
    ):
        command = option(
            HOW, f"--limit-{direction}", metavar="RATE", expose_value=False, callback=store_rate,
            envvar=f"ISLAND_LIMIT_{direction.upper()}", show_envvar=True, help=text,
        )(command)  # fmt: skip
    return option(
        HOW, "--workers", metavar="N", type=click.IntRange(min=1), expose_value=False, callback=store_workers,
        envvar="ISLAND_WORKERS", show_envvar=True, show_default="automatic",
        help="Use at most N worker threads.",
    )(command)  # fmt: skip


# Values.


class FileName(click.Path):
    """A path. The verb finds out whether the file exists and can be read."""

    def __init__(self) -> None:
        super().__init__(readable=False, path_type=Path)

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """See click.ParamType. Refuses an empty text, such as an unset variable of a script."""
        if value == "":
            self.fail("name a file", param, ctx)
        return super().convert(value, param, ctx)


_SPAN = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_span(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Return the seconds of a time span such as 24h, 90m, 3600s, 7d or 0."""
    if value is None or value == "0":
        return None if value is None else 0.0
    match = _SPAN.fullmatch(value)
    if not match:
        raise click.BadParameter(
            f"{value!r} is not a valid time span; write one such as 24h, 90m, 3600s, 7d or 0"
        )
    return float(match[1]) * _SECONDS[match[2]]


def parse_share(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Return a share such as 5% as a fraction."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%", value)
    if not match or not 0 < float(match[1]) <= 100:
        raise click.BadParameter(f"{value!r} is not a valid share; write one such as 5% or 100%")
    return float(match[1]) / 100


def require_utf8(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Return a text that can be stored; the shell can pass any bytes."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise click.BadParameter("it is not UTF-8 text")
    return value


def complete_snapshot(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Return names of snapshots to a shell that completes `incomplete`."""
    from island_fast.cli.shell_completion import snapshot_names  # here: nothing else needs it

    return snapshot_names(context, incomplete)


def complete_directory(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Have a shell that completes `incomplete` offer directories."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]


# Repositories.


def open_repository(
    run: Run, *, create: bool = False, create_anew: bool = False, shared: bool = False
) -> Repository:
    """Open the repository of this run; with `create` it need not exist yet, see `Repository.open`."""
    from island_fast.api import Repository  # here: it takes a good part of a second

    if not run.location:
        raise UsageError(
            "no repository is named; give -r PATH or -r swift://CONTAINER/PREFIX, or set ISLAND_REPOSITORY, "
            "or 'repository' at the top of the configuration file (see 'man island-config')"
        )
    return Repository.open(
        run.location, create=create, create_anew=create_anew, shared=shared, workers=run.workers,
        meters=_meters(run),
    )  # fmt: skip


def open_second_repository(run: Run, location: str, *, create_anew: bool) -> Repository:
    """Open the repository that snapshots are copied to, or create it. It shares the limits of the first.

    Its credentials are in variables that begin with ISLAND_TO_, if there are any, else in the usual ones.
    """
    from island_fast.api import Repository  # here: it takes a good part of a second

    own = any(key.startswith((f"{_OTHER}OS_", f"{_OTHER}ST_")) for key in os.environ)
    return Repository.open(
        location, create=True, create_anew=create_anew, variables=_OTHER if own else "", workers=run.workers,
        meters=_meters(run),
    )  # fmt: skip


def _meters(run: Run) -> RateLimiters | None:
    """Return what enforces the run's limits, if there are any; a signal ends every wait for them."""
    if run.meters is None and (run.limit_upload or run.limit_download):
        from island_fast.stores.rate_limit import RateLimiter, RateLimiters

        def wait(span: float) -> None:
            end = time.monotonic() + span
            while (left := end - time.monotonic()) > 0:
                run.signals.check()
                time.sleep(min(left, _STEP))

        up, down = (RateLimiter(limit, wait=wait) for limit in (run.limit_upload, run.limit_download))
        run.meters = RateLimiters(up, down)
    return run.meters
