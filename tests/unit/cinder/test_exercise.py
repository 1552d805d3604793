"""The commands of the self-test that both of root's programs have."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from island_fast.cinder.attach import exercise
from island_fast.cinder.attach.exercise import BLOCK, SIZE, TESTS, VOLUME, digest, fits_test, run_test

BENCH = ["-c", "1", "-d", "1", "-s", "4096", "-S", "4096"]


def test_only_the_volume_of_the_self_test_is_written_to() -> None:
    for command in TESTS:
        options = BENCH if command == "bench" else []
        assert fits_test(command, options, VOLUME)
        assert not fits_test(command, options, VOLUME.replace("5e1f", "5e1e"))
        assert not fits_test(command, [*options, "-f"], VOLUME)
    assert not fits_test("bench", [], VOLUME)
    assert not fits_test("attach", [], VOLUME)


def test_digests_are_printed_of_what_the_device_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = tmp_path / "device"
    data = os.urandom(BLOCK) + bytes(SIZE - BLOCK)
    device.write_bytes(data)
    assert run_test("digest", contextlib.nullcontext((device, -1)), []) == 0
    assert capsys.readouterr().out.split() == digest(data)


def test_a_benchmark_inherits_the_device_so_that_it_stays_the_self_test_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BecameError(Exception):
        pass

    def become(path: Path, options: list[str]) -> None:
        assert os.get_inheritable(device.fileno())
        raise BecameError(path, options)

    monkeypatch.setattr(exercise, "_become_bench", become)
    with (tmp_path / "device").open("wb") as device, pytest.raises(BecameError):
        run_test("bench", contextlib.nullcontext((tmp_path / "device", device.fileno())), BENCH)
