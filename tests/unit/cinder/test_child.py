"""Programs that a service runs beside itself."""

from __future__ import annotations

import os
import signal

import pytest

from island_fast.cinder import child_process
from island_fast.cinder.child_process import run_child


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
