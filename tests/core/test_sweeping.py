"""Sweeps beside other work, and sweeps, deletes and listings beside damage."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from island_fast.errors import ConflictError, DamagedError, NotFoundError
from island_fast.local import LocalState
from island_fast.repository import Repository
from island_fast.stores.checked import READS
from tests import qemu
from tests.core.conftest import check
from tests.memory_store import MemoryStore, Stored

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "vol.qcow2", 64 * MIB, lazy_refcounts="on")
    qemu.noise(path, 0, 4 * MIB, 1)
    return path


@pytest.fixture
def half_dead(repository: Repository, image: Path, tmp_path: Path) -> tuple[str, str]:
    """Two live snapshots; the first pack of the deleted one before them is to be repacked."""
    first = repository.snapshot(image).snapshot
    qemu.noise(image, 0, 3 * MIB, 2)
    second = repository.snapshot(image).snapshot
    qemu.noise(image, 3 * MIB, MIB // 2, 3)
    third = repository.snapshot(image).snapshot
    repository.delete([first])
    return second, third


def during_repack(monkeypatch: pytest.MonkeyPatch, deed: Callable[[], object]) -> list[str]:
    """Do `deed` once, just after a repacked pack was put; names of such packs."""
    real, put_again = MemoryStore.put, []

    def put(store: MemoryStore, name: str, parts: list[bytes]) -> None:
        real(store, name, parts)
        if "/packs/" in name and "." in name.rpartition("/")[2]:
            put_again.append(name)
            if len(put_again) == 1:
                deed()

    monkeypatch.setattr(MemoryStore, "put", put)
    return put_again


def test_a_snapshot_is_taken_while_a_sweep_repacks(
    repository: Repository,
    store: MemoryStore,
    half_dead: tuple[str, str],
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = Repository(store, repository.state)  # as another process of this host
    qemu.noise(image, 10 * MIB, MIB, 4)
    taken = []
    during_repack(monkeypatch, lambda: taken.append(other.snapshot(image)))
    (swept,) = repository.sweep()
    assert swept.packs_repacked == 1
    check(repository, taken[0].snapshot, qemu.content(image), tmp_path)
    assert repository.sweep()[0].steps == ()


def test_slots_that_die_while_a_sweep_repacks_are_not_forgotten(
    repository: Repository,
    store: MemoryStore,
    half_dead: tuple[str, str],
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    second, third = half_dead
    other = Repository(store, repository.state)
    during_repack(monkeypatch, lambda: other.delete([second]))
    assert repository.sweep()[0].packs_repacked == 1
    check(repository, third, qemu.content(image), tmp_path)
    packs = next(repository.lineages("vol")).state.packs
    assert packs.dead[packs.suffix > 0].tolist() == [MIB // 2]
    while repository.sweep()[0].steps:
        pass
    check(repository, third, qemu.content(image), tmp_path)
    repository.delete([third])
    repository.sweep()
    assert not [name for name in store.objects if "/packs/" in name]


def test_a_sweep_that_is_overtaken_by_an_adoption_deletes_nothing(
    repository: Repository,
    store: MemoryStore,
    half_dead: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = Repository(store, LocalState(tmp_path / "other"))

    def there_and_back() -> None:
        other.adopt("vol")
        Repository(store, repository.state).adopt("vol")

    there = set(store.objects)
    with monkeypatch.context() as patch:
        during_repack(patch, there_and_back)
        assert repository.sweep() == []
    assert isinstance(repository.left_out[0], ConflictError)
    assert there < set(store.objects)
    assert repository.sweep()[0].packs_repacked == 1
    assert repository.left_out == []


def spoil(store: MemoryStore, name: str) -> None:
    data = bytearray(store.objects[name].data)
    data[len(data) // 2] ^= 1
    store.objects[name] = Stored(bytes(data), store.objects[name].at)


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_a_pack_that_cannot_be_read_is_left_and_told(
    repository: Repository,
    store: MemoryStore,
    half_dead: tuple[str, str],
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    """It does not keep the rest from being swept, nor its snapshots from being deleted."""
    name = next(s.object for s in repository.sweep(dry_run=True)[0].steps if s.action == "rewrite")
    if how == "damaged":
        spoil(store, name)
    else:
        del store.objects[name]
    (swept,) = repository.sweep()
    assert (swept.packs_repacked, swept.objects_removed) == (0, 1)
    assert "not repacked" in caplog.text
    repository.lineage("vol").files.uncache("/packs/")
    repository.delete(half_dead)
    repository.sweep()
    assert not [name for name in store.objects if "/packs/" in name]


def test_a_damaged_lineage_does_not_stop_the_others(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    kept = repository.snapshot(image, volume="b").snapshot
    repository.adopt("b")
    for volume in ("a", "c"):
        repository.snapshot(image, volume=volume, pin=False)
    spoil(store, "a/catalog/000000-00000001")
    fresh = Repository(store, LocalState(tmp_path / "fresh"))
    assert [s.volume for s in fresh.snapshots()] == ["b", "c"]
    assert [type(error).__name__ for error in fresh.left_out] == ["DamagedObjectError"]
    assert fresh.show(kept).volume == "b"
    with pytest.raises(DamagedError):
        fresh.show("f" * 32)
    with pytest.raises(NotFoundError):
        fresh.show("b@" + "f" * 32)


@pytest.mark.parametrize("times", [1, READS - 1, READS])
@pytest.mark.parametrize("kind", ["/catalog/", "/manifests/", "/packs/", "repository"])
def test_what_comes_damaged_is_read_again_and_told(
    store: MemoryStore,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    times: int,
) -> None:
    taken = Repository(store, LocalState(tmp_path / "one"), create=True).snapshot(image)
    real, spoilt = MemoryStore.get, []

    def get(self: MemoryStore, name: str, *, newest: bool = False) -> memoryview:
        data = real(self, name, newest=newest)
        if kind in name and len(spoilt) < times:
            spoilt.append(name)
            return memoryview(bytes(data[:-1]) + bytes([data[-1] ^ 1]))
        return data

    monkeypatch.setattr(MemoryStore, "get", get)

    def restored() -> None:
        fresh = Repository(store, LocalState(tmp_path / "two"))
        check(fresh, taken.snapshot, qemu.content(image), tmp_path)

    if times == READS:
        with pytest.raises(DamagedError):
            restored()
    else:
        restored()
        assert f"({times} times)" in caplog.text
    assert len(spoilt) == times


def test_whoever_waits_for_a_lock_says_for_which_process(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    taken = repository.snapshot(image)
    held = tmp_path / "held"
    program = (
        "import sys; from pathlib import Path; from island_fast.local import LineageFiles\n"
        "files = LineageFiles(Path(sys.argv[1]))\n"
        "with files.lock():\n"
        "    Path(sys.argv[2]).touch()\n"
        "    sys.stdin.read()\n"
    )
    folder = repository.lineage("vol").files.folder
    command = [sys.executable, "-c", program, folder, held]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process, told(process.stdin) as lines:
        while not held.exists():
            assert process.poll() is None
            time.sleep(0.01)
        repository.delete([taken.snapshot])
    assert lines == [f"waiting for process {process.pid}, which is changing volume vol"]


@contextmanager
def told(until: IO[bytes]) -> Iterator[list[str]]:
    """What the package logs while the body runs; `until` is closed when it first does."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            until.close()

    handler = Handler()
    logging.getLogger("island_fast").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("island_fast").removeHandler(handler)
        until.close()
