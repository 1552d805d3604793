"""What a service does when space is short: a volume whose pins cannot be dropped holds up no other."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from island_fast.cinder import upkeep
from island_fast.cinder.upkeep import Upkeep
from island_fast.errors import IslandError, NotFoundError


class Volumes:
    """Volumes `stuck`, `gone` and `good`, of which only the last one's pins can be dropped."""

    def __init__(self, folder: Path) -> None:
        self.exports = SimpleNamespace(volumes=list)
        self.records = SimpleNamespace(folder=folder, image_path=folder.joinpath)
        self.asked: list[str] = []
        for name in ("stuck", "good"):
            (folder / name).touch()

    def volumes_with_pins(self) -> list[str]:
        return ["stuck", "gone", "good"]

    def drop_pins(self, volume: str, *, abort_snapshot: bool) -> int:
        self.asked.append(volume)
        if volume == "stuck":
            raise IslandError("its image is damaged")
        if volume == "gone":
            raise NotFoundError("there is no image")
        return 1


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Volumes:
    full: Any = SimpleNamespace(f_bavail=0, f_blocks=100)
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    return Volumes(tmp_path)


def test_a_volume_whose_pins_cannot_be_dropped_holds_up_no_other(
    volumes: Volumes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(upkeep.time, "monotonic", lambda: now)
    kept = Upkeep(volumes, 0.1)  # type: ignore[arg-type]
    kept.check_volumes()
    assert volumes.asked == ["stuck", "gone", "good"]
    kept.check_volumes()
    assert volumes.asked[3:] == ["gone", "good"], "the failed one is left alone for a minute"
    now += 61
    kept.check_volumes()
    assert volumes.asked[5:] == ["stuck", "gone", "good"]
    errors = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert len(errors) == 2, "of a volume that was deleted meanwhile nothing is reported"
    assert all("pins of volume stuck could not be dropped" in one for one in errors)


def test_a_disk_that_a_dead_daemon_left_is_cared_for_at_once_and_then_each_minute(
    volumes: Volumes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, cared, left, hangs = 1000.0, list[str](), {"open", "hung"}, set[str]()

    def care(volume: str) -> None:
        cared.append(volume)
        if volume == "hung":
            raise IslandError("no process answers")

    volumes.exports = SimpleNamespace(
        volumes=lambda: ["hung", "open", "well"],
        state=lambda _: None,
        needs_care=left.__contains__,
        hangs=hangs.__contains__,
        care=care,
    )
    monkeypatch.setattr(upkeep.time, "monotonic", lambda: now)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=100, f_blocks=100))
    kept = Upkeep(volumes, 0.1)  # type: ignore[arg-type]
    kept.check_volumes()
    assert cared == ["hung", "open"]
    kept.check_volumes()
    assert cared[2:] == ["hung"], "what failed is tried at every look; what is open is not"
    now += 61
    left.remove("hung")
    kept.check_volumes()
    assert cared[3:] == ["open"]
    hangs.add("open")
    kept.check_volumes()
    assert cared[4:] == ["open"], "a disk that answers nothing does not wait for a minute to pass"
    assert "what the dead daemon of volume hung left could not be removed: no process answers" in caplog.text
