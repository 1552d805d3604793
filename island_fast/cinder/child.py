"""Programs that a service runs beside itself and must not wait for in one piece.

A service on eventlet stands still while it waits for a pipe or a process in any way that eventlet did not
patch. So nothing is waited for here but time: the program writes to files, and it is looked at now and then.
"""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

__all__ = ["run_child"]

_SOON, _LATER = 0.01, 0.25  # seconds between two looks, at first and at last
_GRACE = 15.0  # seconds from being asked to end until it is killed
_MAX_LINE = 1 << 16  # bytes of a line that is told


def run_child(
    command: Sequence[str],
    env: Mapping[str, str],
    tell: Callable[[str], None],
    cancelled: Callable[[], bool] = lambda: False,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, and return what it said on standard output.

    `env` is all of its environment. `tell` gets each line of its standard error, soon after it was written.
    Once `cancelled` says so it is asked to end (SIGTERM), and killed if it has not after 15 s: it may wait
    for a store that says nothing. It is asked, too, when this process ends. Raises OSError if it does not
    start.
    """
    command = ["setpriv", "--pdeathsig", "TERM", *command]
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=complaints,
            env=dict(env),
            start_new_session=True,
        )
        lines = _Lines(complaints, tell)
        pause, deadline = _SOON, math.inf
        while process.poll() is None:
            if deadline == math.inf and cancelled():
                deadline = time.monotonic() + _GRACE
                process.terminate()
            elif time.monotonic() > deadline:
                process.kill()
            time.sleep(pause)
            pause = min(_LATER, pause * 1.5)
            lines.look()
        lines.look(at_end=True)
        answer.seek(0)
        output = answer.read().decode("utf-8", "backslashreplace")
    return subprocess.CompletedProcess(command, process.returncode, output, "")


class _Lines:
    """Tells the whole lines that have come into a file since it was last looked at."""

    def __init__(self, file: IO[bytes], tell: Callable[[str], None]) -> None:
        self._fd = file.fileno()
        self._tell = tell
        self._at = 0
        self._rest = b""

    def look(self, *, at_end: bool = False) -> None:
        """Tell what is new; with `at_end`, an unfinished line, too."""
        while data := os.pread(self._fd, _MAX_LINE, self._at):
            self._at += len(data)
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._rest = self._rest[:_MAX_LINE]
            for line in lines:
                self._tell(line.decode("utf-8", "backslashreplace"))
        if at_end and self._rest:
            self._tell(self._rest.decode("utf-8", "backslashreplace"))
            self._rest = b""
