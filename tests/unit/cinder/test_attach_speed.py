"""How fast a device is: what is complained of, and how many requests are made to find out."""

from __future__ import annotations

import logging
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from island_fast.cinder.attach import selftest, speed
from island_fast.cinder.attach.speed import SHAPES, Speed, describe_slowness, measure
from island_fast.errors import IslandError
from tests.support.daemon import create_qcow2

SIZE = 16 << 20
PLACES = Path("run"), Path("links"), Path("images")


def speeds(*ratios: float) -> list[Speed]:
    """One for each shape, with qemu's own qcow2 at a thousand requests a second."""
    return [Speed(shape, ((1000 * ratio, 1000.0),)) for shape, ratio in zip(SHAPES, ratios, strict=True)]


def test_what_has_half_of_the_speed_is_not_complained_of() -> None:
    assert describe_slowness(speeds(0.5, 0.7, 12.0), "loop") == ""


@pytest.mark.parametrize(
    "kind, way_out",
    [("loop", "load the module nbd"), ("nbd", "processors are busy"), ("vduse", "processors")],
)
def test_what_has_less_is_named_with_its_figures_and_a_way_out(kind: str, way_out: str) -> None:
    said = describe_slowness(speeds(0.9, 0.499, 0.02), kind)
    assert f"kind {kind} reach less than 0.5" in said
    assert (
        "(4 KiB writes, one at a time: 499/s against 1000/s (0.50); 4 KiB writes, 32 at a time: 20/s" in said
    )
    assert "in order" not in said
    assert way_out in said


def test_one_pair_that_met_a_busy_moment_decides_nothing() -> None:
    found = Speed(SHAPES[0], ((900.0, 1000.0), (1.0, 1000.0), (700.0, 1000.0)))
    assert (found.device, found.image, found.ratio) == (700.0, 1000.0, 0.7)


# --- measuring, on a machine whose clock is the requests that were made ---


class Machine:
    """Runs `qemu-img bench` as if each request took its side's seconds, and keeps what was run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: float, image: float) -> None:
        self.now = 0.0
        self.each = {"/dev/loop0": device, "json:": image}
        self.ran: list[tuple[str, list[str]]] = []
        monkeypatch.setattr(speed.time, "monotonic", lambda: self.now)

    def __call__(self, command: Sequence[str], /, **_: object) -> subprocess.CompletedProcess[str]:
        side = next(name for name in self.each if command[-1].startswith(name))
        how = list(command[: command.index("165") + 1])
        took = int(how[how.index("-c") + 1]) * self.each[side]
        self.now += took
        self.ran.append((side, how))
        return subprocess.CompletedProcess(command, 0, f"Sending\nRun completed in {took:.3f} seconds.\n", "")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return create_qcow2(tmp_path / "image", SIZE)


def test_both_sides_get_the_same_requests_in_turn(monkeypatch: pytest.MonkeyPatch, image: Path) -> None:
    machine = Machine(monkeypatch, 200e-6, 50e-6)
    found = list(measure(Path("/dev/loop0"), image, machine))
    assert [one.shape for one in found] == list(SHAPES)
    assert [one.ratio for one in found] == pytest.approx([0.25] * 3, rel=0.05)
    runs = [machine.ran[at : at + 2] for at in range(0, len(machine.ran), 2)]
    assert all(first[1] == second[1] and first[0] != second[0] for first, second in runs)
    assert {first[0] for first, _ in runs[::2]} != {first[0] for first, _ in runs[1::2]}
    assert len(runs) == 3 * 6


@pytest.mark.parametrize("each, pairs", [(50e-6, 6), (1e-3, 5), (0.02, 4), (0.1, 1)])
def test_on_a_slow_disk_fewer_pairs_are_measured(
    monkeypatch: pytest.MonkeyPatch, image: Path, each: float, pairs: int
) -> None:
    """The first pair of a shape is made whatever it takes, the others only if time is left, and short."""
    machine = Machine(monkeypatch, each, each)
    found = list(measure(Path("/dev/loop0"), image, machine))
    assert len(machine.ran) == 2 * 3 * pairs
    assert {len(one.pairs) for one in found} == {max(pairs - 1, 1)}
    most = [max(shape.first, math.ceil(0.05 / each)) for shape in SHAPES]
    assert max(int(how[1]) for how in (one[1][one[1].index("-c") :] for one in machine.ran)) <= max(most)


def test_what_qemu_says_otherwise_is_an_error(monkeypatch: pytest.MonkeyPatch, image: Path) -> None:
    def silent(command: Sequence[str], /, **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, "done\n", "")

    with pytest.raises(IslandError, match="did not report how long it took, but 'done"):
        list(measure(Path("/dev/loop0"), image, silent))


# --- what becomes of it when a driver starts ---


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """A host whose data path is right, and its log."""
    monkeypatch.setattr(selftest, "check_data_path", lambda *_: None)
    caplog.set_level(logging.INFO, selftest.__name__)
    return caplog


def told(log: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in log.records]


def test_a_fast_device_is_told_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, sound: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(selftest, "measure_speed", lambda *_: speeds(0.9, 0.8, 0.7))
    assert selftest.choose_kind(*PLACES, lambda *_: None) == "vduse"  # type: ignore[arg-type]
    assert [level for level, _ in told(sound)] == ["INFO"]
    assert (
        "kind vduse, compared with qemu's own qcow2: 1 MiB writes in order: 900/s against 1000/s (0.90)"
        in told(sound)[0][1]
    )


def test_a_slow_device_is_warned_of_and_chosen(
    monkeypatch: pytest.MonkeyPatch, sound: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(selftest, "measure_speed", lambda *_: speeds(0.9, 0.8, 0.2))
    assert selftest.choose_kind(*PLACES, lambda *_: None) == "vduse"  # type: ignore[arg-type]
    assert told(sound)[0] == ("WARNING", describe_slowness(speeds(0.9, 0.8, 0.2), "vduse"))


def test_a_speed_that_cannot_be_measured_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, sound: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> list[Speed]:
        raise IslandError("qemu-img could not measure")

    monkeypatch.setattr(selftest, "measure_speed", fails)
    assert selftest.choose_kind(*PLACES, lambda *_: None) == "vduse"  # type: ignore[arg-type]
    assert told(sound) == [
        ("WARNING", "the speed of devices of kind vduse could not be measured: qemu-img could not measure")
    ]
