"""Programs that run for the length of some tests, each with its log, and waiting for what they do."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PATIENCE = 120.0  # seconds that anything may take on a machine that is busy with something else


class Program:
    """A program in a session of its own, which can be started again. Its output goes to the end of `log`.

    `user` is a pair of numbers, user and group, if it is not to run as whoever runs the tests.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        log: Path,
        env: Mapping[str, str],
        user: tuple[int, int] | None = None,
    ) -> None:
        self.name = name
        self.command = [str(word) for word in command]
        self.log = log
        self.env = dict(env)
        self.user = user
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    def start(self) -> None:
        """Start it if it does not run."""
        if self.running:
            return
        user, group = self.user or (None, None)
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd="/",
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=user,
                group=group,
                extra_groups=None if user is None else [],
            )

    def stop(self, patience: float = PATIENCE) -> int | None:
        """Ask it to end, and wait until it has; one that does not is killed. Its exit status, if it ran."""
        if not self.running:
            return None
        self._signal(signal.SIGTERM)
        assert self._process is not None
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
        return self._process.returncode

    def kill(self) -> None:
        """End it and its group (its workers) at once. What has a session of its own lives on."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def text(self) -> str:
        """All it has ever said."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def complaints(self, lines: int = 15) -> str:
        """The last errors of its log; its end if there are none."""
        said = self.text().splitlines()
        loud = [line for line in said if " ERROR " in line or " CRITICAL " in line or "Traceback" in line]
        return "\n".join(line[:400] for line in loud[-lines:] or said[-3:])


def wait_for(
    what: str, true: Callable[[], object], why: Callable[[], str], patience: float = PATIENCE
) -> None:
    """Return when `true()` is; after `patience` seconds fail, saying `what` did not happen and `why()`."""
    end = time.monotonic() + patience
    while not true():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not after {patience:.0f} s\n{why()}")
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens at."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def write_conf(path: Path, sections: Mapping[str, Mapping[str, object]]) -> None:
    """A file of options as oslo.config reads it: no interpolation, no folding of case."""
    lines = []
    for name, options in sections.items():
        lines += [f"[{name}]", *(f"{key} = {value}" for key, value in options.items()), ""]
    path.write_text("\n".join(lines))
