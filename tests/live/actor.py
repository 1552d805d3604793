"""The exports of a host, in the hands of a user who is not root.

Run as that user, this reads one call to a line from standard input and answers each on standard output, in
JSON. Where a command wants root's rights it sends the command up and waits for what it gave: the test's
process, which is root, runs it. So the split of rights is the one that Cinder's rootwrap makes.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from island_fast import errors
from island_fast.cinder.attach.exports import Exports, State
from island_fast.cinder.attach.selftest import check_data_path, choose_kind, measure_speed
from island_fast.qemu.programs import run_program

ROOT = Path(__file__).resolve().parent.parent.parent
KIND = os.environ.get("ISLAND_LIVE_KIND", "loop")
USER = 65534  # nobody, in every Debian


class Remote:
    """Looks like `Exports`, and is one in a process of the user nobody. `became_root` lists what root ran."""

    def __init__(self, run: Path, links: Path, user: int = USER) -> None:
        self.became_root: list[list[str]] = []
        words = [
            "setpriv",
            f"--reuid={user}",
            f"--regid={user}",
            "--clear-groups",
            sys.executable,
            "-P",
            "-m",
        ]
        self._process = subprocess.Popen(
            [*words, "tests.live.actor", str(run), str(links)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self.call(name, *arguments)

    def call(self, name: str, *arguments: object) -> Any:
        self._say({"call": name, "arguments": [_plain(a) for a in arguments]})
        while True:
            answer = self._hear()
            if "root" in answer:
                self.became_root.append(answer["root"])
                done = run_program(answer["root"], root=True)
                self._say({"status": done.returncode, "out": done.stdout, "err": done.stderr})
            elif "error" in answer:
                raise getattr(errors, answer["error"])(answer["message"])
            else:
                return _rich(name, answer["return"])

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()

    def _say(self, message: dict[str, object]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the actor has died; see its standard error"
        return json.loads(line)


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _rich(name: str, value: Any) -> Any:
    if name == "state":
        return State(value)
    return Path(value) if name in ("attach", "monitor") and value is not None else value


def _ask_root(command: list[str]) -> subprocess.CompletedProcess[str]:
    print(json.dumps({"root": command}), flush=True)
    answer = json.loads(sys.stdin.readline())
    return subprocess.CompletedProcess(command, answer["status"], answer["out"], answer["err"])


def execute(command, /, *, root=False, env=None):
    """A `RunProgram`: what wants root's rights goes up to the test."""
    return _ask_root(list(command)) if root else run_program(command, env=env)


def _calls() -> Iterator[dict[str, Any]]:
    for line in iter(sys.stdin.readline, ""):
        yield json.loads(line)


def main() -> None:
    run, links = (Path(word) for word in sys.argv[1:])
    exports = Exports(run, links, execute, KIND)
    whole = {
        "check_data_path": lambda images: check_data_path(run, links, Path(images), execute, KIND),
        "measure_speed": lambda images: [
            (one.shape.name, one.device, one.image)
            for one in measure_speed(run, links, Path(images), execute, KIND)
        ],
        "choose_kind": lambda images: choose_kind(run, links, Path(images), execute),
    }
    for call in _calls():
        try:
            what = whole.get(call["call"]) or getattr(exports, call["call"])
            value = what(*[Path(a) if isinstance(a, str) and a[:1] == "/" else a for a in call["arguments"]])
        except errors.IslandError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        else:
            answer = {"return": value.value if isinstance(value, enum.Enum) else _plain(value)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
