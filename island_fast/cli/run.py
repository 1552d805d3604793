"""How one run of the command ends: its answer, or one sentence and an exit code; and what signals do to it.

An answer goes to standard output, as text or with --json as one JSON value; everything else goes to standard
error. Errors become sentences and exit codes here, and nowhere else. SIGINT, SIGTERM and SIGHUP are raised
as an exception in the main thread, so that all work unwinds and cleans up after itself.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

import click

from island_fast.cli import text as show
from island_fast.cli.progress import Bars, Lines
from island_fast.cli.signals import Signals
from island_fast.errors import IslandError, UsageError

if TYPE_CHECKING:
    from island_fast.progress import Progress
    from island_fast.stores.rate_limit import RateLimiters

__all__ = ["Run", "conclude"]


class _OutputError(Exception):
    """Standard output cannot be written to; the system's error is the cause."""


@dataclass(slots=True)
class Run:
    """One run of the command: what the options of every verb say, and how far it came.

    `location` is the repository asked for. `if_interrupted` tells what an interruption leaves; verbs set
    it. `phase` is the one that progress was last told of, "" before the first. An error may follow an answer
    (`answered`) that is not complete. `help_asked` says that --help
    is among the words. With `json_progress` progress is told as lines of JSON. The limits are
    bytes in a second, and `meters` what keeps them, for all stores of the run.
    """

    signals: Signals
    location: str | None = None
    json: bool = False
    help_asked: bool = False
    quiet: bool = False
    json_progress: bool = False
    workers: int | None = None
    limit_upload: float | None = None
    limit_download: float | None = None
    meters: RateLimiters | None = None
    if_interrupted: Callable[[], str] = lambda: "nothing was changed"
    phase: str = ""
    answered: bool = False

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """What verbs tell their progress to: shown as bars on a terminal, or as lines of JSON."""
        shown = Lines() if self.json_progress else Bars(not self.quiet)
        with shown as bars:

            def tell(phase: str, done: int, total: int) -> None:
                self.signals.check()
                self.phase = phase
                bars(phase, done, total)

            yield tell

    def answer(self, value: object, text: str, brief: str = "") -> None:
        """Tell the outcome: `value` with --json, `brief` with --quiet, else `text`; "" tells nothing."""
        self.answered = True
        if self.json:
            _answer(json.dumps(value))
        elif line := (brief if self.quiet else text):
            _answer(line)

    def answer_encoded(self, value: str) -> None:
        """Tell an outcome that is JSON already; to be called with --json only."""
        self.answered = True
        _answer(value)

    def left_out(self, errors: Sequence[IslandError]) -> None:
        """Tell, after the answer, what is missing in it; raises the last of `errors`, if there are any."""
        for error in errors[:-1]:
            self.note(str(error))
        if errors:
            raise errors[-1]

    def note(self, text: str) -> None:
        """Tell something beside the answer."""
        _complain(text)


@dataclass(frozen=True, slots=True)
class _Failure:
    """How a run failed: the error's name for programs, a sentence, and the exit code."""

    error: str
    message: str
    exit_code: int = 1


def conclude(work: Callable[[Run], None], *, json_asked: bool = False, to_the_end: bool = False) -> int:
    """Do `work` and return its exit code, whatever happens; how it failed is told.

    `json_asked` says that --json is among the arguments, should it fail before they are understood.
    """
    with Signals(to_the_end=to_the_end) as signals, _warnings_told():
        run = Run(signals)
        try:
            try:
                work(run)
                return 0
            finally:
                signals.disarm()
        except click.exceptions.Exit as done:
            return done.exit_code
        except BaseException as error:  # noqa: BLE001 (this is the door: nothing may leave as a traceback)
            if os.environ.get("ISLAND_DEBUG") and sys.stderr is not None:
                traceback.print_exception(error)
            return _told(error, run, json_asked)


class _Complaining(logging.Handler):
    """Tells what the package logs."""

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        _complain(record.getMessage())


@contextlib.contextmanager
def _warnings_told() -> Iterator[None]:
    """Tell the package's warnings on standard error while the body runs."""
    logger = logging.getLogger("island_fast")
    handler = _Complaining(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _told(error: BaseException, run: Run, json_asked: bool) -> int:
    """Tell how the run failed; returns the exit code."""
    failure = _failure(error, run)
    as_json = run.json or (json_asked and isinstance(error, click.ClickException))
    if as_json and not run.answered and not isinstance(error, _OutputError):
        value = {"error": failure.error, "message": failure.message, "exit_code": failure.exit_code}
        with contextlib.suppress(_OutputError):
            _answer(json.dumps(value))
            return failure.exit_code
    if failure.message:
        _complain(failure.message)
    return failure.exit_code


def _failure(error: BaseException, run: Run) -> _Failure:
    """What to say of an error."""
    match error:
        case IslandError():
            return _Failure(_kebab(error), str(error), error.exit_code)
        case click.ClickException():
            return _Failure("usage", _usage(error), UsageError.exit_code)
        case KeyboardInterrupt():
            return _Failure("interrupted", f"interrupted; {run.if_interrupted()}")
        case _OutputError():
            return _Failure("output", _no_output(error.__cause__))
        case OSError():
            return _Failure("system", _system(error))
        case MemoryError():
            return _Failure("memory", "there is not enough memory; free some and run it again")
        case UnicodeError():
            return _Failure("text", "a name or text is not UTF-8; rename it or give another")
    return _Failure(
        "unexpected",
        f"unexpected {type(error).__name__} ({error}), a fault of this program; run it again with "
        "ISLAND_DEBUG=1 and report the traceback",
    )


def _kebab(error: IslandError) -> str:
    """NotFoundError gives not-found."""
    name = type(error).__name__.removesuffix("Error")
    return re.sub(r"(?<=.)(?=[A-Z])", "-", name).lower()


def _usage(error: click.ClickException) -> str:
    """Click's message as a sentence of ours."""
    text = " ".join(error.format_message().split()).rstrip(".").replace(". Did you", "; did you")
    text = re.sub(r"is not a valid integer( range)?$", "is no whole number", text)
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "island"
    see = " See" if text.endswith("?") else "; see"
    return f"{text[:1].lower()}{text[1:]}{see} '{command} --help'"


def _system(error: OSError) -> str:
    """What the system refused, and what may help."""
    reason = error.strerror or str(error) or type(error).__name__
    place = error.filename
    what = f"{os.fsdecode(place)}: {reason}" if isinstance(place, str | bytes) else reason
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return f"{what}; free some space or raise the limit, and run it again"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"{what}; run it as a user who may do that"
        case errno.EMFILE | errno.ENFILE:
            return f"{what}; raise the limit of open files"
        case errno.EIO:
            return f"{what}; check that disk"
    return f"{what}; mend that and run it again (ISLAND_DEBUG=1 shows where it happened)"


def _no_output(error: BaseException | None) -> str:
    """Nothing where the reader left, as `head` does; else what the system said."""
    if isinstance(error, BrokenPipeError):
        return ""
    reason = getattr(error, "strerror", None) or error
    return f"what was asked for was done, but the answer cannot be written to standard output ({reason})"


# The two streams.


def _answer(text: str) -> None:
    """Write to standard output, where there is one."""
    try:
        _write(sys.stdout, text)
    except (OSError, ValueError) as error:
        _abandon(sys.stdout)
        raise _OutputError from error


def _complain(text: str) -> None:
    """Write a line to standard error, where there is one."""
    with contextlib.suppress(OSError, ValueError):
        _write(sys.stderr, f"island: {show.printable(text)}")


def _write(stream: TextIO | None, text: str) -> None:
    """Write a line or more; what the stream's encoding lacks is escaped."""
    if stream is not None:
        if not text.isascii():
            encoding = stream.encoding or "utf-8"
            text = text.encode(encoding, "backslashreplace").decode(encoding)
        stream.write(text)
        stream.write("\n")
        stream.flush()


def _abandon(stream: TextIO) -> None:
    """Let what is left in the stream's buffer go nowhere, so that no one tries to write it at exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
