"""One run of the command: its answer, notes and progress, and how errors become a sentence and an exit code.

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
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from island_fast.cli.progress import Bars, Lines
from island_fast.cli.signals import Signals
from island_fast.cli.text import printable
from island_fast.errors import IslandError, UsageError

if TYPE_CHECKING:
    from island_fast.api import Repository
    from island_fast.progress import Progress
    from island_fast.stores.rate_limit import RateLimiters

__all__ = ["FullUsageError", "Run", "enclose", "run_to_exit_code"]

_PRINTED_AT_ONCE = 64 << 10  # characters
_CREDENTIAL = re.compile(r"(^|_)ST_KEY$|PASSW|SECRET|TOKEN|CREDENTIAL|_PROXY$", re.IGNORECASE)
_SHORT = 3  # characters; a value that short is part of too many words
_USER_INFO = re.compile(r"://[^/\s@'\"]*@")
_QUOTED_COMMAND = re.compile(
    r"'island (snapshot|restore|copy|list|show|diff|usage|retain|delete|keep|sweep|verify|adopt)\b(?! --help)"
)
"""The beginning of a quoted command with a verb on a repository."""


@dataclass(slots=True)
class Run:
    """One run of the command: the options that every verb has, and how far it came.

    `location` is the repository that is named; `located` says whether the command line names it. Limits are
    in bytes per second; `meters` enforces them, for all stores of the run. `help_asked` says whether --help
    is among the words. `if_interrupted` returns what an interruption leaves, in words; verbs set it. `phase`
    is the last one reported as progress, "" before the first. `answered`: the answer was printed; an error
    after that says why it is not complete. `second` is the repository of --to, "" if there is none.
    """

    signals: Signals
    location: str | None = None
    located: bool = False
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
    second: str = ""

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """Show progress while the body runs: as bars on a terminal, or as lines of JSON."""
        shown = Lines() if self.json_progress else Bars(not self.quiet)
        with shown as display:

            def report(phase: str, done: int, total: int) -> None:
                self.signals.check()
                self.phase = phase
                display(phase, done, total)

            yield report

    def answer(self, value: object, text: str, brief: str = "") -> None:
        """Print the answer: `value` with --json, `brief` with --quiet, else `text`; "" prints nothing.

        A `value` that is an iterator is a list, whose items are encoded and printed one after the other.
        """
        self.answered = True
        if self.json and isinstance(value, Iterator):
            self.answer_parts(enclose("[", ", ", "]", map(json.dumps, value)))
        elif self.json:
            _write_stdout(json.dumps(value))
        elif line := (brief if self.quiet else self.complete(text)):
            _write_stdout(line)

    def answer_parts(self, parts: Iterable[str]) -> None:
        """Print an answer of any length, part by part as they come, so that little of it is in memory.

        The parts are those of its JSON with --json, else of its text. An error that comes after the first
        part ends the answer where it is.
        """
        waiting: list[str] = []
        size = 0
        for part in parts:
            waiting.append(part)
            size += len(part)
            if size >= _PRINTED_AT_ONCE:
                self.answered = True
                _write_stdout("".join(waiting), end="")
                waiting, size = [], 0
        self.answered = True
        _write_stdout("".join(waiting))

    def finish_with(self, errors: Sequence[IslandError]) -> None:
        """Raise the last of the errors that left the answer incomplete, if any, and print the others."""
        for error in errors[:-1]:
            self.note(str(error))
        if errors:
            raise errors[-1]

    def note_if_empty(self, found: Sized, repository: Repository, text: str) -> None:
        """Print that nothing was found, unless an error is going to say why."""
        if not found and not self.quiet and not repository.left_out:
            self.note(f"{text} in {repository.store.location}")

    def note(self, text: str) -> None:
        """Print something beside the answer."""
        _write_stderr(self.complete(text))

    def complete(self, text: str) -> str:
        """Return `text` with the commands that it quotes as they can be pasted: with this run's --repository.

        What the environment or the configuration file names needs no repetition. With --to, commands are for
        the repository that the text names.
        """
        location = self.location if self.located else None
        if self.second:
            named = [one for one in (self.second, location) if one and _names(text, one)]
            location = named[0] if len(named) == 1 else None
        if location is None:
            return text
        return _QUOTED_COMMAND.sub(lambda found: f"{found[0]} -r {shlex.quote(location)}", text)


def _names(text: str, location: str) -> bool:
    """Return whether a text names a repository, and not only one whose address begins or ends alike."""
    return re.search(rf"(?<![\w/.-]){re.escape(location.rstrip('/'))}/?(?![\w/-])", text) is not None


def enclose(begin: str, between: str, end: str, parts: Iterable[str]) -> Iterator[str]:
    """Yield `begin`, the `parts` with `between` each two of them, and `end`."""
    before = begin
    for part in parts:
        yield before + part
        before = between
    yield end if before is between else begin + end


class FullUsageError(click.UsageError):
    """Wrong usage whose message says all: no hint at --help is added."""


def run_to_exit_code(
    work: Callable[[Run], None], *, json_asked: bool = False, to_the_end: bool = False
) -> int:
    """Do `work`, report how it failed if it did, and return the exit code. Never raises.

    `json_asked` says whether --json is among the arguments, in case it fails before they are parsed.
    """
    with Signals(to_the_end=to_the_end) as signals, _warnings_on_stderr(run := Run(signals)):
        try:
            try:
                work(run)
                return 0
            finally:
                signals.disarm()
        except click.exceptions.Exit as done:
            return done.exit_code
        except BaseException as error:  # noqa: BLE001 (the last resort: no traceback may leave here)
            if os.environ.get("ISLAND_DEBUG") and sys.stderr is not None:
                sys.stderr.write(_hide_credentials("".join(traceback.format_exception(error))))
            return _report(error, run, json_asked)


class _LogToStderr(logging.Handler):
    """Prints what the package logs during a run."""

    def __init__(self, run: Run) -> None:
        super().__init__(logging.WARNING)
        self._run = run

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        self._run.note(record.getMessage())


@contextlib.contextmanager
def _warnings_on_stderr(run: Run) -> Iterator[None]:
    """Print the package's warnings on standard error while the body of a run works."""
    logger = logging.getLogger("island_fast")
    handler = _LogToStderr(run)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


# Errors as sentences.


class _OutputError(Exception):
    """Standard output cannot be written to; the system's error is the cause."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """How a run failed: the error's name for programs, a sentence, and the exit code."""

    error: str
    message: str
    exit_code: int = 1


def _hide_credentials(text: str) -> str:
    """Return a library's text without what signs in: the values of variables, and passwords in URLs.

    Libraries quote both, as they are or as Python writes them.
    """
    values = [value for key, value in os.environ.items() if _CREDENTIAL.search(key) and len(value) > _SHORT]
    for value in sorted({part for one in values for part in (one, repr(one)[1:-1])}, key=len, reverse=True):
        text = text.replace(value, "***")
    return _USER_INFO.sub("://***@", text)


def _report(error: BaseException, run: Run, json_asked: bool) -> int:
    """Print how the run failed and return the exit code."""
    failure = _describe_failure(error, run)
    failure = replace(failure, message=run.complete(failure.message))
    as_json = run.json or (json_asked and isinstance(error, click.ClickException))
    if as_json and not run.answered and not isinstance(error, _OutputError):
        value = {"error": failure.error, "message": failure.message, "exit_code": failure.exit_code}
        with contextlib.suppress(_OutputError):
            _write_stdout(json.dumps(value))
            return failure.exit_code
    if failure.message:
        _write_stderr(failure.message)
    return failure.exit_code


def _describe_failure(error: BaseException, run: Run) -> _Failure:
    """Return how a run failed that ended with `error`."""
    match error:
        case IslandError():
            return _Failure(_error_code(error), str(error), error.exit_code)
        case click.ClickException():
            return _Failure("usage", _explain_usage_error(error), UsageError.exit_code)
        case KeyboardInterrupt():
            return _Failure("interrupted", f"interrupted; {run.if_interrupted()}", run.signals.exit_code)
        case _OutputError():
            return _Failure("output", _explain_output_error(error.__cause__))
        case ImportError() if find_spec("island_fast._diff") is None:
            return _Failure("not-built", _explain_missing_kernels())
        case OSError():
            return _Failure("system", _explain_os_error(error))
        case MemoryError():
            return _Failure("memory", "there is not enough memory; free some and run it again")
        case UnicodeError():
            return _Failure("text", "a name or text is not UTF-8; rename it or give another")
    return _Failure(
        "unexpected",
        f"unexpected {type(error).__name__} ({_hide_credentials(str(error))}), a fault of this program; run "
        "it again with ISLAND_DEBUG=1 and report the traceback",
    )


def _error_code(error: IslandError) -> str:
    """Return the error's name for programs: not-found for a NotFoundError."""
    name = type(error).__name__.removesuffix("Error")
    return re.sub(r"(?<=.)(?=[A-Z])", "-", name).lower()


def _explain_usage_error(error: click.ClickException) -> str:
    """Return click's message as one sentence that says where to look."""
    if isinstance(error, FullUsageError):
        return error.message
    text = " ".join(error.format_message().split()).rstrip(".")
    if isinstance(error, click.NoSuchOption):
        text = f"no such option '{error.option_name}'"
        if error.possibilities:
            text += f"; did you mean '{error.possibilities[0]}'?"  # the most alike
    text = re.sub(r"is not a valid integer( range)?$", "is not a whole number", text)
    text = re.sub(r"(\S+) is not in the range x>=(\d+)$", r"must be at least \2, not \1", text)
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "island"
    see = " See" if text.endswith("?") else "; see"
    return f"{text[:1].lower()}{text[1:]}{see} '{command} --help'"


def _explain_missing_kernels() -> str:
    """Return why source without the compiled module runs: Python's own path begins with this folder."""
    source, python = Path(__file__).parent.parent, ".".join(map(str, sys.version_info[:2]))
    return (
        f"{source} is source without a compiled module for Python {python}; run the installed island in "
        f"another folder, or build the module with {shlex.join(['pip', 'install', '-e', str(source.parent)])}"
    )


def _explain_os_error(error: OSError) -> str:
    """Return what the system refused, and what may help."""
    reason = error.strerror or str(error) or type(error).__name__
    place = error.filename
    what = f"{os.fsdecode(place)}: {reason}" if isinstance(place, str | bytes) else reason
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return f"{what}; free some space or raise the limit, and run it again"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"{what}; run it as a user who has permission"
        case errno.EMFILE | errno.ENFILE:
            return f"{what}; raise the limit of open files"
        case errno.EIO:
            return f"{what}; check that disk"
    return f"{what}; mend that and run it again (ISLAND_DEBUG=1 shows where it happened)"


def _explain_output_error(error: BaseException | None) -> str:
    """Return why the answer cannot be printed, "" if its reader left, as `head` does."""
    if isinstance(error, BrokenPipeError):
        return ""
    reason = getattr(error, "strerror", None) or error
    return f"the work was done, but the answer cannot be written to standard output ({reason})"


# The two streams.


def _write_stdout(text: str, end: str = "\n") -> None:
    """Write `text` and `end` to standard output, if there is one."""
    try:
        _write(sys.stdout, text, end)
    except (OSError, ValueError) as error:
        _discard_output(sys.stdout)
        raise _OutputError from error


def _write_stderr(text: str) -> None:
    """Write a line to standard error, if there is one."""
    with contextlib.suppress(OSError, ValueError):
        _write(sys.stderr, f"island: {printable(text)}")


def _write(stream: TextIO | None, text: str, end: str = "\n") -> None:
    """Write `text` and `end`; what the stream's encoding lacks is escaped."""
    if stream is not None:
        if not text.isascii():
            encoding = stream.encoding or "utf-8"
            text = text.encode(encoding, "backslashreplace").decode(encoding)
        stream.write(text)
        stream.write(end)
        stream.flush()


def _discard_output(stream: TextIO) -> None:
    """Send what is left in the stream's buffer to /dev/null, else Python tries to write it at exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
