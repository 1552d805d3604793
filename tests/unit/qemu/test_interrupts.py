"""Signals that come while a program is being started: nothing is left alone, and no signal is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from island_fast.cli.signals import Interrupted, Signals
from island_fast.qemu import interrupts, qemu_nbd
from island_fast.qemu.interrupts import hold_interrupts
from island_fast.qemu.programs import run_program


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Ctrl-C raises, also where a shell started the tests in the background; all handlers come back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    found = [signal.getsignal(number) for number in numbers[1:]]
    for number, handler in before.items():
        signal.signal(number, handler)
    assert found == [before[number] for number in numbers[1:]]
    assert (interrupts._Held.depth, interrupts._Held.before, interrupts._Held.received) == (0, {}, [])


@pytest.fixture(params=["after the child runs", "after Popen returns"])
def interrupt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT comes once, at a moment while a program is being started."""
    if request.param == "after the child runs":
        started = subprocess.Popen._execute_child  # type: ignore[attr-defined]

        def execute(self: object, *args: object, **more: object) -> None:
            started(self, *args, **more)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

        monkeypatch.setattr(subprocess.Popen, "_execute_child", execute)
    else:
        real = subprocess.Popen

        def start(*args: object, **more: object) -> subprocess.Popen[str]:
            process: subprocess.Popen[str] = real(*args, **more)  # type: ignore[call-overload]
            os.kill(os.getpid(), signal.SIGINT)
            return process

        monkeypatch.setattr("island_fast.qemu.programs.subprocess.Popen", start)


@pytest.mark.usefixtures("interrupt")
def test_a_program_has_ended_when_the_interrupt_is_raised(tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    with pytest.raises(KeyboardInterrupt):
        run_program(["sh", "-c", f"sleep 0.5; touch {ended}"])
    assert ended.exists()


@pytest.mark.usefixtures("interrupt")
def test_under_the_commands_own_handler_too(tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    with Signals(), pytest.raises(Interrupted):
        run_program(["sh", "-c", f"sleep 0.5; touch {ended}"])
    assert ended.exists()


@pytest.mark.usefixtures("interrupt")
def test_a_qemu_nbd_that_was_just_started_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "qemu-nbd"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    before = children()
    image = tmp_path / "image"
    image.touch()
    with (
        image.open("rb") as file,
        pytest.raises(KeyboardInterrupt),
        qemu_nbd.open_for_writing(file.fileno(), image, 1 << 20, 1 << 16),
    ):
        pytest.fail("not reached")
    assert children() == before
    if (tmp_path / "pid").exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_program_that_does_not_start_is_an_error_and_the_signal_is_raised() -> None:
    with pytest.raises(FileNotFoundError):
        run_program(["/nothing/here"])
    with pytest.raises(KeyboardInterrupt), hold_interrupts():
        os.kill(os.getpid(), signal.SIGINT)


def test_each_signal_is_handled_once_at_the_end() -> None:
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        assert frame is not None
        seen.append(number)

    former = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGHUP)}
    with hold_interrupts():
        with hold_interrupts():
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), number)
        assert seen == []
    assert seen == [signal.SIGHUP, signal.SIGTERM]
    for number, handler in former.items():
        signal.signal(number, handler)


def test_bodies_that_end_in_another_order_than_they_began() -> None:
    """As green threads of one process do."""
    first, second = hold_interrupts(), hold_interrupts()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        second.__exit__(None, None, None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_other_threads_nothing_changes() -> None:
    found: list[object] = []

    def run() -> None:
        with hold_interrupts():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


@pytest.mark.timeout(30)
def test_a_signal_in_the_moment_before_waiting_can_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Popen takes a lock to wait, and a signal right after that leaves it taken."""

    class Lock:
        def __init__(self) -> None:
            self.lock, self.came = threading.Lock(), False

        def acquire(self, blocking: bool = True) -> bool:
            taken = self.lock.acquire(blocking)
            if not self.came:
                self.came = True
                raise KeyboardInterrupt
            return taken

        def release(self) -> None:
            self.lock.release()

    started: list[subprocess.Popen[str]] = []

    class Process(subprocess.Popen[str]):
        def __init__(self, *args: object, **more: object) -> None:
            super().__init__(*args, **more)  # type: ignore[call-overload]
            self._waitpid_lock = Lock()
            started.append(self)

    monkeypatch.setattr("island_fast.qemu.programs.subprocess.Popen", Process)
    with pytest.raises(KeyboardInterrupt):
        run_program(["true"], timeout=20)
    assert started[0].returncode == 0


def test_a_flood_of_signals_loses_neither_handlers_nor_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever one comes, the handler is back afterwards, and the program has ended or never began."""
    # One can come in a __del__, and another in pytest's own hook for that, which then fails the test.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    script = (
        "import os, signal, subprocess, sys, time\n"
        "for _ in range(200):\n"
        "    time.sleep(0.003); os.kill(int(sys.argv[1]), signal.SIGINT)\n"
    )
    before = children()
    flood = subprocess.Popen([sys.executable, "-c", script, str(os.getpid())])
    ended = raised = 0
    try:
        while flood.poll() is None:
            try:
                run_program(["true"])
                ended += 1
            except KeyboardInterrupt:
                raised += 1
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    except KeyboardInterrupt:
        pass  # between two of them, in this test itself
    finally:
        _settle(flood.wait)
    assert children() == before


def children() -> set[str]:
    """Processes that this one has started and not waited for; other tests' servers are among them."""
    tasks = Path("/proc/self/task").iterdir()
    return {child for task in tasks for child in (task / "children").read_text().split()}


def _settle(work: Callable[[], object]) -> None:
    while True:
        try:
            work()
            return
        except KeyboardInterrupt:
            continue
