"""Ctrl-C, SIGTERM and SIGHUP in the middle of real work, in processes of their own."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from island_fast.cli.signals import Interrupted, Signals
from island_fast.images.new_file import create_file
from island_fast.qemu.programs import run_program
from tests.cli.conftest import MIB, Island, one_sentence, pins, wait_until
from tests.support import qemu

pytestmark = qemu.needs_qemu

SIZE = 192 * MIB


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume that takes a good part of a second, and twelve packs, to store."""
    folder = tmp_path_factory.mktemp("pristine")
    image = qemu.create(folder / "large.qcow2", SIZE, lazy_refcounts="on")
    qemu.noise(image, 0, SIZE)
    return image


@pytest.fixture
def large(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(pristine, tmp_path))


def packs(island: Island) -> int:
    return len(list(island.repository.glob("large/packs/*/*")))


def interrupted_snapshot(island: Island, image: Path, *signals: signal.Signals) -> str:
    """Signal a snapshot when its first packs are stored; what it says."""
    there = packs(island)
    process = island.start("snapshot", image, "--volume", "large")
    wait_until(lambda: packs(island) > there, process)
    for number in signals:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        time.sleep(0.01)
    out, err = process.communicate(timeout=30)
    assert (process.returncode in {128 + number for number in signals}, out) == (True, b"")
    return one_sentence(err.decode())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_snapshot_leaves_everything_as_it_was(
    island: Island, large: Path, disk: Path, tmp_path: Path, number: signal.Signals
) -> None:
    first = island.json("snapshot", disk, "--volume", "large")["snapshot"]  # an earlier state of the volume
    assert island("adopt", "large").code == 0
    held = pins(large)
    sentence = interrupted_snapshot(island, large, number)
    assert sentence == (
        "interrupted; no snapshot was made, earlier ones are unchanged; "
        "what was sent is kept for the next one"
    )
    qemu.check(large)
    assert pins(large) == held == []
    assert island.text("list", "-q").split() == [first]
    island("restore", first, tmp_path / "earlier.qcow2")
    qemu.compare(disk, tmp_path / "earlier.qcow2", other_format="qcow2")
    sent = packs(island)
    again = island.json("snapshot", large, "--volume", "large")
    assert (again["attempt"], again["blocks_changed"]) == (1, SIZE >> 16)
    assert again["blocks_kept"] >= 200, "the pack that was there before the signal is not sent again"
    assert packs(island) - sent < 12
    island("restore", again["snapshot"], tmp_path / "whole.qcow2")
    qemu.compare(large, tmp_path / "whole.qcow2", other_format="qcow2")


def test_an_interrupted_increment_keeps_the_pin_it_had(island: Island, tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "large.qcow2", SIZE, lazy_refcounts="on")
    first = island.json("snapshot", image)["snapshot"]
    held = pins(image)
    qemu.noise(image, 0, SIZE)
    sentence = interrupted_snapshot(island, image, signal.SIGTERM)
    assert sentence.startswith("interrupted; no snapshot was made")
    assert pins(image) == held != []
    qemu.check(image)
    again = island.json("snapshot", image)
    assert (again["rule"], again["parent"]) == ("table-diff", first)


def test_what_waits_for_its_turn_ends_at_once(island: Island, large: Path) -> None:
    """At 1 KiB a second the second pack would wait for hours."""
    process = island.start("snapshot", large, "--limit-upload", "1K")
    wait_until(lambda: packs(island), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + signal.SIGINT, b"")
    assert one_sentence(err.decode()).startswith("interrupted; no snapshot was made")
    assert packs(island) == 1
    assert pins(large) == []


def test_more_signals_while_it_cleans_up(island: Island, large: Path) -> None:
    sentence = interrupted_snapshot(
        island, large, signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    )
    assert sentence.startswith("interrupted; no snapshot was made")
    assert pins(large) == []


def test_the_third_ctrl_c_ends_it_at_once(island: Island, large: Path) -> None:
    process = island.start("snapshot", large)
    wait_until(lambda: packs(island), process)
    for _ in range(3):
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        time.sleep(0.002)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + signal.SIGINT, b"")
    assert b"Traceback" not in err
    deadline = time.monotonic() + 30
    while island("snapshot", large).code == 4:  # a qemu-img that was begun goes on to its end
        assert time.monotonic() < deadline
    assert island.json("list")[0]["volume_size"] == SIZE
    assert len(pins(large)) == 1, "a pin that was left behind is dropped by the next snapshot"
    qemu.check(large)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_restore_leaves_no_file(
    island: Island, large: Path, tmp_path: Path, number: signal.Signals
) -> None:
    island("snapshot", large)
    folder = tmp_path / "targets"
    folder.mkdir()
    process = island.start("restore", "large@latest", folder / "out.qcow2")
    wait_until(lambda: list(folder.iterdir()), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + number, b"")
    assert one_sentence(err.decode()) == f"interrupted; {folder / 'out.qcow2'} was not made"
    assert list(folder.iterdir()) == []


def test_a_signal_just_when_the_file_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.open

    def interrupted(*words: Any) -> int:
        os.close(really(*words))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt), create_file(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_as_json(island: Island, large: Path) -> None:
    process = island.start("snapshot", large, "--json")
    wait_until(lambda: packs(island), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, b"")
    assert out == (
        b'{"error": "interrupted", "message": "interrupted; no snapshot was made, earlier ones are '
        b'unchanged; what was sent is kept for the next one", "exit_code": 143}\n'
    )


def test_a_signal_that_is_ignored_stays_ignored(island: Island, large: Path) -> None:
    process = island.start(
        "snapshot", large, "--quiet", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    wait_until(lambda: packs(island), process)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, b"")
    assert out == b""
    assert len(island.json("list")) == 1


def test_no_lock_stays_taken() -> None:
    """A signal that comes just when a lock written in Python was taken waits until it can be given back."""
    raise_now = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    lock: Any = SimpleNamespace(acquire=None, release=None, locked=None, __enter__=raise_now, __exit__=None)
    steps = []

    def work() -> None:
        threading.Condition(lock).__enter__()
        steps.append("taken")
        time.sleep(10)
        steps.append("slept")

    with Signals(), pytest.raises(Interrupted):
        work()
    assert steps == ["taken"]


def test_a_wait_is_interrupted() -> None:
    later = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    later.start()
    with Signals(), pytest.raises(Interrupted):
        Future[None]().result(timeout=20)
    later.join()


def test_a_process_just_started_is_not_forgotten(tmp_path: Path) -> None:
    script = f"kill -TERM {os.getpid()}; sleep 0.2; echo > {tmp_path}/ended"

    def work() -> None:
        assert run_program(["sh", "-c", script]).returncode == 0
        time.sleep(10)

    with Signals(), pytest.raises(Interrupted):
        work()
    assert (tmp_path / "ended").exists()


def test_handlers_are_put_back_when_it_is_called(island: Island) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    island("--help")
    island("list")
    test_a_wait_is_interrupted()
    assert [signal.getsignal(number) for number in numbers] == before
