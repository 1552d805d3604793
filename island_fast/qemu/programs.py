"""Running a program to its end, by a callable that callers can replace (`RunProgram`)."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from island_fast.errors import IslandError
from island_fast.qemu.interrupts import hold_interrupts

__all__ = [
    "PACKAGES",
    "TIMEOUT",
    "ProgramResult",
    "RunProgram",
    "check_run",
    "copy_for_program",
    "descriptor_path",
    "error_text",
    "make_environment",
    "run_program",
]

TIMEOUT = 1800.0  # seconds; an internal snapshot of a scattered 1 TiB image takes about 5
_CREDENTIALS = re.compile(r"(^|_)(OS|ST|AWS)_|PASSW|SECRET|TOKEN|CREDENTIAL|_KEY$|_PROXY$", re.IGNORECASE)
_MAX_ERROR = 300  # characters of a program's error output in a message
PACKAGES = {  # the daemon is in qemu-system-common up to Debian 12
    "flock": "util-linux",
    "fusermount3": "fuse3",
    "qemu-img": "qemu-utils (on RHEL qemu-img)",
    "qemu-nbd": "qemu-utils (on RHEL qemu-img)",
    "qemu-storage-daemon": "qemu-utils or qemu-system-common (on RHEL qemu-img)",
    "setsid": "util-linux",
    "systemd-run": "systemd",
}
"""The packages of programs that a host can lack, in words: Debian's and Ubuntu's, RHEL's if they differ."""


ProgramResult = subprocess.CompletedProcess[str]
"""What a program that has ended left: `args`, `returncode`, `stdout`, `stderr`."""


class RunProgram(Protocol):
    """A callable that runs one program to its end and returns its output, like `subprocess.run`.

    The command is a list, program first. With `root` the program gets root's rights; without, it runs as the
    user who owns the images. `env` is added to the environment, which has no credentials
    (`make_environment`). It returns for every exit status, with `stdout` and `stderr` as text and a negative
    `returncode` for a signal. It raises OSError (FileNotFoundError: no such program) if the program did not
    start, and `subprocess.TimeoutExpired` if it was stopped after a time limit.
    """

    def __call__(
        self, command: Sequence[str], /, *, root: bool = False, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `command`."""
        ...


def run_program(
    command: Sequence[str],
    *,
    root: bool = False,
    env: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT,
    files: Sequence[int] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a program that must not be stopped half-way; the default `RunProgram`.

    The program runs in a new session, so that Ctrl-C in the terminal reaches this process but not the
    program: half an internal snapshot leaks clusters, which is worse than a second of waiting. A
    KeyboardInterrupt, or a signal handler's SystemExit, is raised again after the program has ended, also if
    it came while the program was being started. After `timeout` seconds the program is killed, and
    `subprocess.TimeoutExpired` raised. The program gets the descriptors `files`, under the same numbers. This
    function gives no rights: with `root` it is a PermissionError unless this process is already root's.
    """
    if root and os.geteuid() != 0:
        raise PermissionError(errno.EPERM, "only root may do this", command[0])
    deadline = time.monotonic() + timeout
    process: subprocess.Popen[str] | None = None
    interrupt: BaseException | None = None
    try:
        with hold_interrupts():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="backslashreplace",
                env=make_environment(env),
                start_new_session=True,
                pass_fds=files,
            )
    except (KeyboardInterrupt, SystemExit) as error:
        if process is None:
            raise
        interrupt = error
    while True:
        try:
            output, error_output = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        except (KeyboardInterrupt, SystemExit) as error:
            interrupt = error
            # It can have come right after Popen took the lock with which one thread waits, which then stays
            # taken: who waits again would wait for ever. No other thread has this process.
            process._waitpid_lock = threading.Lock()  # type: ignore[attr-defined]
    if interrupt is not None:
        raise interrupt
    return subprocess.CompletedProcess(command, process.returncode, output, error_output)


def make_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment for a program that reads images, with `more` added.

    Variables that sign in somewhere are left out, for an image can be made to mislead such a program; so are
    addresses of proxies, which can hold a password.
    """
    own = {key: value for key, value in os.environ.items() if not _CREDENTIALS.search(key)}
    return {**own, "LC_ALL": "C", **(more or {})}


def check_run(execute: RunProgram, command: Sequence[str], task: str, *, root: bool = False) -> str:
    """Run `command`, which shall `task`, and return its output; IslandError that quotes it if it fails."""
    program = command[0]
    try:
        result = execute(command, root=root)
    except FileNotFoundError as error:
        package = PACKAGES.get(program)
        way_out = f"install the package {package}" if package else "install it"
        raise IslandError(f"the program {program!r}, which would {task}, is missing; {way_out}") from error
    except subprocess.TimeoutExpired as error:
        raise IslandError(f"{program} did not {task} within {error.timeout:.0f} s and was stopped") from error
    except OSError as error:
        raise IslandError(
            f"{program} could not be started to {task}: {error.strerror or error}; "
            f"{'put island.filters where rootwrap looks for filters' if root else 'check the program'}"
        ) from error
    if result.returncode:
        reason = error_text(result.stderr or result.stdout or "")
        raise IslandError(f"{program} could not {task} (status {result.returncode}): {reason}")
    return result.stdout


def error_text(text: str) -> str:
    """Return a program's error output as one printable line; of a long one the end, where the cause is."""
    line = "; ".join(part.strip() for part in text.splitlines() if part.strip())
    shown = "".join(c if c.isprintable() else "?" for c in line).rstrip(".")
    return shown[-_MAX_ERROR:] or "it gave no reason"


@contextmanager
def copy_for_program(fd: int) -> Iterator[int]:
    """Yield a copy of descriptor `fd` that a program can inherit.

    If this process was started with a closed stream, `fd` itself can have a number that is a standard stream
    of the program, which then would find something else there.
    """
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    try:
        yield copy
    finally:
        os.close(copy)


def descriptor_path(fd: int) -> str:
    """Return the name by which a program that has inherited descriptor `fd` opens that very file again."""
    return f"/proc/self/fd/{fd}"
