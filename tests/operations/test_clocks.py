"""A host whose clock is far off stores nothing, and what such a host once stored locks nobody out."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import RefusedError
from island_fast.repository import clock
from island_fast.repository.local_state import LocalState
from tests.operations.conftest import check
from tests.support import qemu
from tests.support.memory_store import MemoryStore

pytestmark = qemu.needs_qemu

MIB = 1 << 20
YEAR_2106 = (1 << 32) * 10**9
YEAR_2300 = 10_413_792_000 * 10**9
NOW = 1_700_000_000 * 10**9


def at(monkeypatch: pytest.MonkeyPatch, when: int) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: when)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "vol.qcow2", 4 * MIB)
    qemu.io(path, qemu.write(0, MIB, 1))
    return path


@pytest.mark.parametrize("when", [-1, YEAR_2106, YEAR_2300])
@pytest.mark.parametrize("pin", [True, False])
def test_a_wrong_clock_stores_nothing(
    when: int,
    pin: bool,
    image: Path,
    repository: Repository,
    store: MemoryStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for round_ in range(2):  # the first snapshot, and one of a volume that is there
        before = dict(store.objects)
        with monkeypatch.context() as patch:
            at(patch, when)
            with pytest.raises(RefusedError, match=r"the clock of this host is wrong: .*; set the clock"):
                repository.snapshot(image, pin=pin)
            assert store.objects == before
            if round_:
                with pytest.raises(RefusedError, match="clock"):
                    repository.delete([repository.snapshots()[0].snapshot])
                assert store.objects == before
        repository.snapshot(image, pin=pin)
    assert len(repository.snapshots()) == 2


@pytest.mark.parametrize("when", [YEAR_2106, YEAR_2300])
def test_a_snapshot_of_a_wrong_clock_locks_nothing(
    when: int, image: Path, store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions stored it: nobody could read the record, nor any after it."""
    here = Repository(store, LocalState(tmp_path / "state"), create=True)
    first = here.snapshot(image)
    with monkeypatch.context() as patch:
        patch.setattr(clock, "_END", 1 << 40)
        at(patch, when)
        future = here.snapshot(image, pin=False)
    at(monkeypatch, NOW)
    qemu.io(image, qemu.write(MIB, MIB, 2))
    last = here.snapshot(image)
    elsewhere = Repository(store, LocalState(tmp_path / "other"))
    for repository in (here, elsewhere):
        found = [one.snapshot for one in repository.snapshots()]
        assert found == [first.snapshot, future.snapshot, last.snapshot]
        check(repository, last.snapshot, qemu.content(image), tmp_path)
    elsewhere.restore(future.snapshot, tmp_path / "back.qcow2")
    qemu.check(tmp_path / "back.qcow2")
    assert "snapshots" not in qemu.info(tmp_path / "back.qcow2")
    far = Repository(MemoryStore(location="far"), LocalState(tmp_path / "state"), create=True)
    assert [one.copied for one in here.copy(far)] == [True] * 3
    here.delete([future.snapshot])
    here.sweep()
    check(here, last.snapshot, qemu.content(image), tmp_path)
