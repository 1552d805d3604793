"""Programs that a service runs beside itself."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

import island_fast
from island_fast.cinder import child_process, island_command
from island_fast.cinder.child_process import run_child
from island_fast.cinder.island_command import IslandCommand


def test_what_it_says_is_told_line_by_line() -> None:
    told: list[str] = []
    script = "echo answer; echo one >&2; printf two >&2; exit 3"
    done = run_child(["sh", "-c", script], {"PATH": os.environ["PATH"]}, told.append)
    assert (done.stdout, done.returncode) == ("answer\n", 3)
    assert told == ["one", "two"]


@pytest.mark.parametrize(
    ("ignored", "end"), [("", signal.SIGTERM), ("trap '' TERM; ", signal.SIGKILL)], ids=["obeys", "hangs"]
)
def test_one_that_is_given_up_is_asked_to_end_and_then_killed(
    monkeypatch: pytest.MonkeyPatch, ignored: str, end: signal.Signals
) -> None:
    monkeypatch.setattr(child_process, "_GRACE", 0.0 if ignored else 600.0)
    told: list[str] = []
    script = f"{ignored}echo ready >&2; while :; do sleep 0.05; done"
    done = run_child(["sh", "-c", script], dict(os.environ), told.append, lambda: bool(told))
    assert done.returncode == -end


SHOW = """
import json, os, sys
own = open("/proc/self/environ").read()
print(json.dumps([{"seen": own, "password": os.environ.get("OS_PASSWORD"), "left": sys.stdin.read()}]))
"""


def test_a_command_s_credentials_are_in_no_process_s_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """That which /proc shows as long as the process lives; the command itself has them."""
    secret, seen = "hunter2secret", []

    def run(command: list[str], env: dict[str, str], *more: object) -> object:
        seen.append(f"{command}{env}")
        path = Path(island_fast.__file__).parents[1]
        start = "import sys; from island_fast import __main__ as m\nimport types\n"
        fake = f"main = types.ModuleType('m'); main.main = lambda: exec({SHOW!r})\n"
        end = "sys.modules['island_fast.cli.main'] = main; m.main()"
        words = f"import sys; sys.path[:0] = [{str(path)!r}]; {start}{fake}{end}"
        return run_child([sys.executable, "-c", words], env, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(island_command, "run_child", run)
    monkeypatch.setenv("OS_TOKEN", secret)
    [answer] = IslandCommand(str(tmp_path), {"OS_PASSWORD": secret}).list_snapshots()
    assert answer["password"] == secret
    assert answer["left"] == ""
    assert secret not in answer["seen"] + seen[0]


def test_a_standard_input_that_no_pipe_holds_is_refused() -> None:
    with pytest.raises(OSError, match="too long"):
        run_child(["cat"], dict(os.environ), lambda _: None, stdin=bytes(1 << 21))
    done = run_child(["cat"], dict(os.environ), lambda _: None, stdin=b"x" * 60000)
    assert done.stdout == "x" * 60000
