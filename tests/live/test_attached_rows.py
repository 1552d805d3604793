"""The bench's rows of an attached volume: real fio, a real device, and qemu's own qcow2 beside it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from island_fast.bench.case import QUICK_SCALE, Context
from island_fast.bench.cases import attached
from island_fast.bench.report import Counter, LeftOut, Row
from island_fast.cinder.attach.speed import SHAPES, Speed
from tests.live.conftest import missing

MIB = 1 << 20


@pytest.fixture
def context(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Context:
    """Tiny volumes, one pair of each; the self-test is tested elsewhere."""
    if reason := missing():
        pytest.skip(reason)
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed (scripts/install_packages fio)")
    monkeypatch.setattr(attached, "_QUICK", attached._Amount(16 * MIB, 1, 20))
    monkeypatch.setattr(attached, "_require_devices", lambda *_: None)
    speeds = [Speed(shape, ((100.0, 200.0),)) for shape in SHAPES]
    monkeypatch.setattr(attached, "measure_speed", lambda *_: speeds)
    scratch = tmp_path_factory.mktemp("rows")
    return Context(scratch, QUICK_SCALE, True, 1, {"fio": "3", "qemu-img": "7"}, lambda text: None)


def found(context: Context, kind: str) -> list[Row | Counter | LeftOut]:
    (case,) = [case for case in attached.CASES if case.name.endswith(attached._NAMES[kind])]
    return list(case.run(context))


def test_each_job_has_its_row_and_nothing_is_left(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = attached._JOBS[1:3]
    monkeypatch.setattr(attached, "_JOBS", jobs)
    rows = [one for one in found(context, "loop") if isinstance(one, Row)]
    names = [job.name for job in (*jobs, attached._FIRST)] + [f"{one.name}, by qemu-img" for one in SHAPES]
    assert [one.work for one in rows] == [f"loop over FUSE: {name}" for name in names]
    assert all(min(one.ours.values + one.theirs.values) > 0 for one in rows)
    assert [one.ratio.median for one in rows[-3:]] == [0.5] * 3
    assert {one.ratio_is for one in rows} == {"ours / theirs"}
    assert [path for path in context.scratch.rglob("*") if path.is_file()] == []
    assert str(context.scratch) not in Path("/proc/self/mountinfo").read_text()


def test_first_writes_find_every_cluster_shared(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fio writes after a snapshot goes to clusters that the snapshot holds, each one once."""
    sizes: list[int] = []
    monkeypatch.setattr(attached, "_JOBS", ())
    stop = attached.Exports.stop

    def watched(self: attached.Exports, volume: str) -> None:
        stop(self, volume)
        sizes.extend(path.stat().st_blocks * 512 for path in sorted((context.scratch / "images").iterdir()))

    monkeypatch.setattr(attached.Exports, "stop", watched)
    found(context, "loop")
    writes = 16 * MIB // 65536 // 8
    # Two pairs: the second one's writes find what the first one's left free, but for what its snapshot holds.
    assert all(16 * MIB + writes * 65536 <= size < 16 * MIB + (2 * writes + 16) * 65536 for size in sizes)
    assert len(sizes) == 3


def test_a_kind_that_this_machine_lacks_is_named(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert found(context, "nbd") == [
        LeftOut("attached volume, kernel NBD", "only root can make block devices; run the bench as root")
    ]
