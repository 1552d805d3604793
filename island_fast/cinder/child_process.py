"""Run a program from a service of Cinder's, without stopping the service's other work.

A service on eventlet stands still while it waits for a pipe or a process, except in ways that eventlet has
patched. So this module waits for nothing but time: the program writes to files, which are read now and then.
On native threads, on which a service can run since Cinder 29, only the calling thread waits.
"""

from __future__ import annotations

import errno
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

__all__ = ["run_child"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.25  # seconds between two looks at the program
_GRACE = 15.0  # seconds between SIGTERM and SIGKILL
_MAX_LINE = 1 << 16  # bytes; the rest of a longer line is cut off


def run_child(
    command: Sequence[str],
    env: Mapping[str, str],
    on_line: Callable[[str], None],
    cancelled: Callable[[], bool] = lambda: False,
    stdin: bytes = b"",
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, and return its exit status and standard output.

    `env` is its whole environment, and `stdin`, 64 KiB at most, its standard input. `on_line` gets each line
    of its standard error soon after it was written.
    When `cancelled` returns true, the program is sent SIGTERM, and 15 s later SIGKILL: it may be waiting for
    a store that does not answer. It also gets SIGTERM when this process ends. Raises OSError if the program
    does not start.
    """
    # The kernel sends the signal when the thread ends that started the program; this one waits for it.
    command = ["setpriv", "--pdeathsig", "TERM", *command]
    with (
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
        _open_pipe(stdin) as source,
    ):
        process = subprocess.Popen(
            command,
            stdin=source,
            stdout=stdout,
            stderr=stderr,
            env=dict(env),
            start_new_session=True,
        )
        lines = _LineReader(stderr, on_line)
        pause, deadline = _FIRST_PAUSE, math.inf
        while process.poll() is None:
            if deadline == math.inf and cancelled():
                deadline = time.monotonic() + _GRACE
                process.terminate()
            elif time.monotonic() > deadline:
                process.kill()
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE, pause * 1.5)
            lines.read()
        lines.read(at_end=True)
        stdout.seek(0)
        output = stdout.read().decode("utf-8", "backslashreplace")
    return subprocess.CompletedProcess(command, process.returncode, output, "")


@contextmanager
def _open_pipe(data: bytes) -> Iterator[int]:
    """Yield the end of a pipe that `data` can be read from. The pipe holds it all, so nobody waits."""
    source, sink = os.pipe()
    try:
        try:
            os.set_blocking(sink, False)
            if os.write(sink, data) != len(data):
                raise OSError(errno.EMSGSIZE, "the standard input of a program is too long for a pipe")
        finally:
            os.close(sink)
        yield source
    finally:
        os.close(source)


class _LineReader:
    """Passes on the lines that are added to a file."""

    def __init__(self, file: IO[bytes], on_line: Callable[[str], None]) -> None:
        self._fd = file.fileno()
        self._on_line = on_line
        self._at = 0
        self._rest = b""

    def read(self, *, at_end: bool = False) -> None:
        """Pass on the whole lines that are new; with `at_end`, an unfinished last line too."""
        while data := os.pread(self._fd, _MAX_LINE, self._at):
            self._at += len(data)
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._rest = self._rest[:_MAX_LINE]
            for line in lines:
                self._on_line(line.decode("utf-8", "backslashreplace"))
        if at_end and self._rest:
            self._on_line(self._rest.decode("utf-8", "backslashreplace"))
            self._rest = b""
