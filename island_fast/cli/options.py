"""Options that verbs share, and what their values may be."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from island_fast.cli.config import rate
from island_fast.cli.run import Run
from island_fast.errors import UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from island_fast.api import Repository
    from island_fast.stores.rate_limit import RateLimiters

__all__ = [
    "NAMING",
    "FileName",
    "common",
    "directories",
    "fraction",
    "image_format_option",
    "limits",
    "opened",
    "other_opened",
    "seconds",
    "snapshots_known",
    "utf8_text",
]


NAMING = (
    "A SNAPSHOT is named by its id, by an unambiguous beginning of it, by VOLUME@ID (which looks at that "
    "volume alone), or by VOLUME@latest."
)
"""What the help of verbs on snapshots ends with."""

_STEP = 0.1  # seconds

_OTHER = "ISLAND_TO_"
"""Before the names of variables with credentials of a second repository."""


class FileName(click.Path):
    """A path, of which only verbs find out whether it is there and may be read."""

    def __init__(self) -> None:
        super().__init__(readable=False, path_type=Path)

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """See ParamType. An empty text, such as an unset variable of a script, is no path."""
        if value == "":
            self.fail("name a file", param, ctx)
        return super().convert(value, param, ctx)


def snapshots_known(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Names of snapshots for a shell that completes `incomplete`."""
    from island_fast.cli.shell_completion import snapshot_names  # here: nobody else needs it

    return snapshot_names(context, incomplete)


def directories(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """For a shell that completes `incomplete`: it is to offer directories."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]


def opened(run: Run, *, create: bool = False) -> Repository:
    """The repository that is asked for."""
    from island_fast.api import Repository  # here: it takes a good part of a second

    if not run.location:
        raise UsageError(
            "no repository is named; give -r PATH or -r swift://CONTAINER/PREFIX, or set ISLAND_REPOSITORY"
        )
    return Repository.open(run.location, create=create, workers=run.workers, meters=_meters(run))


def other_opened(run: Run, location: str) -> Repository:
    """The repository that snapshots go to; one that is yet to be is made. It shares the limits of the first.

    Credentials are in variables that begin with ISLAND_TO_, if there are any, else in the usual ones.
    """
    from island_fast.api import Repository  # here: it takes a good part of a second

    own = any(key.startswith((f"{_OTHER}OS_", f"{_OTHER}ST_")) for key in os.environ)
    return Repository.open(
        location, create=True, variables=_OTHER if own else "", workers=run.workers, meters=_meters(run)
    )


def _meters(run: Run) -> RateLimiters | None:
    """The run's meters, if a limit is asked for; a signal ends what waits for its turn."""
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


def _remember(field: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    """Keep an option's value in the `Run`, if it is given: before the verb, after it, or both.

    What comes from elsewhere than the command line does not take the place of what is there.
    """

    def keep(context: click.Context, parameter: click.Parameter, value: object) -> None:
        run = context.ensure_object(Run)
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and value == "":
            raise UsageError(f"{parameter.opts[0]} names no repository; leave it out, or name one")
        if value and (given or not getattr(run, field)):
            setattr(run, field, value)

    return keep


def common(command: Callable[..., Any]) -> Callable[..., Any]:
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
            "--json-progress", is_flag=True, expose_value=False, callback=_remember("json_progress"),
            help="Tell progress as lines of JSON on standard error.",
        ),
        click.option(
            "-r", "--repository", metavar="WHERE", expose_value=False, callback=_remember("location"),
            envvar="ISLAND_REPOSITORY", show_envvar=True, shell_complete=directories,
            help="A directory's path, or swift://CONTAINER/PREFIX.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def image_format_option(told: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option --format of a verb, with its help text; formats are never probed."""
    return click.option(
        "--format", "image_format", type=click.Choice(["qcow2", "raw"]), default="qcow2", show_default=True,
        help=told,
    )  # fmt: skip


def limits(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that limit how fast a verb moves data, and by how many threads."""

    def remember_workers(context: click.Context, parameter: click.Parameter, value: int | None) -> None:
        context.ensure_object(Run).workers = value

    def remember(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            limit = rate(value)
            if limit is None:
                raise click.BadParameter(f"{value!r} is no rate; write one such as 500K, 10M or 1G")
            setattr(context.ensure_object(Run), parameter.name or "", limit)

    for direction, told in (
        ("download", "The same for what is fetched."),
        ("upload", "Send no more than this in a second on average, such as 500K, 10M or 1G (KiB, MiB, GiB)."),
    ):
        command = click.option(
            f"--limit-{direction}", metavar="RATE", expose_value=False, callback=remember,
            envvar=f"ISLAND_LIMIT_{direction.upper()}", show_envvar=True, help=told,
        )(command)  # fmt: skip
    return click.option(
        "--workers", metavar="N", type=click.IntRange(min=1), expose_value=False, callback=remember_workers,
        envvar="ISLAND_WORKERS", show_envvar=True,
        help="Let at most N threads work on blocks at a time. [default: as many as help]",
    )(command)  # fmt: skip


_SPAN = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """A time span such as 24h, 90m, 3600s, 7d or 0, in seconds."""
    if value is None or value == "0":
        return None if value is None else 0.0
    match = _SPAN.fullmatch(value)
    if not match:
        raise click.BadParameter(f"{value!r} is no time span; write one such as 24h, 90m, 3600s, 7d or 0")
    return float(match[1]) * _SECONDS[match[2]]


def fraction(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """A share such as 5%, as a fraction."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%", value)
    if not match or not 0 < float(match[1]) <= 100:
        raise click.BadParameter(f"{value!r} is no share; write one such as 5% or 100%")
    return float(match[1]) / 100


def utf8_text(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """A value that can be stored: what the shell passed may be any bytes."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise click.BadParameter("it is not UTF-8 text")
    return value
