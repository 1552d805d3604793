"""Sweeps beside other work, and sweeps, deletes and listings beside damage."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from island_fast.api import Repository
from island_fast.cli.sweep import _format_swept
from island_fast.errors import ConflictError, DamagedError, NotFoundError, StoreError
from island_fast.repository.local_state import LocalState
from island_fast.stores.checked_read import READS
from tests.operations.conftest import check
from tests.support import qemu
from tests.support.memory_store import MemoryStore, Stored

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


def spoil(store: MemoryStore, name: str, at: int | None = None) -> None:
    data = bytearray(store.objects[name].data)
    data[len(data) // 2 if at is None else at] ^= 2
    store.objects[name] = Stored(bytes(data), store.objects[name].at)


@pytest.mark.parametrize("how", ["damaged", "newer", "missing"])
def test_a_pack_that_cannot_be_read_is_left_and_told(
    repository: Repository,
    store: MemoryStore,
    half_dead: tuple[str, str],
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    """It does not keep the rest from being swept, nor its snapshots from being deleted."""
    name = next(s.object for s in repository.sweep(dry_run=True)[0].steps if s.action == "rewrite")
    if how == "missing":
        del store.objects[name]
    else:
        spoil(store, name, at=8 if how == "newer" else None)  # a flipped bit may look like a newer version
    (swept,) = repository.sweep()
    assert (swept.packs_repacked, swept.objects_removed) == (0, 1)
    assert "not repacked" in caplog.text
    repository.lineage("vol").files.notes.remove_all("packs")
    for snapshot in half_dead:
        repository.delete([snapshot])
        packs = next(repository.lineages("vol")).state.packs
        assert (packs.dead <= packs.size).all()
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
    with pytest.raises(DamagedError):  # the volume that is left out may have one that begins like this
        fresh.delete([kept[:12]])
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

    def get(self: MemoryStore, name: str, **how: Any) -> memoryview:
        data = real(self, name, **how)
        if kind in name and len(spoilt) < times:
            spoilt.append(name)
            return memoryview(bytes(data[:-1]) + bytes([data[-1] ^ 1]))
        return data

    monkeypatch.setattr(MemoryStore, "get", get)

    def restored() -> None:
        fresh = Repository(store, LocalState(tmp_path / "two"))
        check(fresh, taken.snapshot, qemu.content(image), tmp_path)

    if times == READS and kind == "/packs/":
        restored()  # by ranges: each block proves itself
        (told,) = caplog.messages
        assert spoilt[0] in told
        assert "its blocks are read singly, by their digests; run 'island verify --all --heal'" in told
    elif times == READS:
        with pytest.raises(DamagedError):
            restored()
    else:
        restored()
        assert f"({times} times)" in caplog.text
    assert len(spoilt) == times


@pytest.mark.parametrize("lock, doing", [("lock", "changing"), ("lock_sweeps", "sweeping")])
def test_whoever_waits_for_a_lock_says_for_which_process(
    repository: Repository, image: Path, tmp_path: Path, lock: str, doing: str
) -> None:
    repository.snapshot(image)
    held = tmp_path / "held"
    program = (
        "import sys; from pathlib import Path; from island_fast.repository.local_state import LineageFiles\n"
        "files = LineageFiles(Path(sys.argv[1]))\n"
        f"with files.{lock}():\n"
        "    Path(sys.argv[2]).touch()\n"
        "    sys.stdin.read()\n"
    )
    folder = repository.lineage("vol").files.folder
    command = [sys.executable, "-c", program, folder, held]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process, told(process.stdin) as lines:
        while not held.exists():
            assert process.poll() is None
            time.sleep(0.01)
        repository.sweep()
    assert lines == [f"waiting for process {process.pid}, which is {doing} volume vol"]


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


@pytest.mark.parametrize("how", ["damaged", "newer", "missing"])
def test_a_parent_that_lost_a_pack_does_not_stop_new_snapshots(
    store: MemoryStore, image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """A full scan even makes good what was lost."""
    first = Repository(store, LocalState(tmp_path / "one"), create=True).snapshot(image)
    name = next(name for name in store.objects if "/packs/" in name)
    if how == "missing":
        del store.objects[name]
    else:
        spoil(store, name, at=8 if how == "newer" else 80)
    repository = Repository(store, LocalState(tmp_path / "two"))
    repository.adopt("vol")
    taken = repository.snapshot(image, full=True)
    assert taken.parent == first.snapshot
    assert "sent again" in caplog.text
    check(repository, taken.snapshot, qemu.content(image), tmp_path)


@pytest.mark.parametrize("place", ["running/" + "a" * 32, "cache/retired/" + "a" * 32, "lock", "sweep"])
def test_local_files_may_hold_anything(repository: Repository, image: Path, place: str) -> None:
    first = repository.snapshot(image).snapshot
    path = repository.lineage("vol").files.folder / place
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\xff\xfe\x80")
    repository.snapshot(image)
    repository.delete([first])
    assert repository.sweep()
    assert repository.left_out == []


def test_a_pending_record_that_another_process_settles_is_no_error(
    repository: Repository, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = repository.snapshot(image)
    files = repository.lineage("vol").files
    gone = files.folder / "pending" / "000000-00000002"
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        gone.unlink(missing_ok=True)
        return real(path)

    gone.write_bytes(b"")
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert files.pending.all() == []
    assert repository.show(taken.snapshot).snapshot == taken.snapshot


def test_a_dry_run_counts_what_a_sweep_would_give_up(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.snapshot(image)
    noisy = MemoryStore.put

    def put(self: MemoryStore, name: str, parts: list[bytes]) -> None:
        if "/manifests/" in name:
            raise StoreError("the store does not answer")
        noisy(self, name, parts)

    qemu.noise(image, 0, MIB, 9)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryStore, "put", put)
        with pytest.raises(StoreError):
            repository.snapshot(image)
    store.now += 25 * 3600
    files = repository.lineage("vol").files
    ((left, _),) = files.registrations.all()
    os.utime(files.folder / "running" / left.snapshot, (0, 0))
    would = repository.sweep(dry_run=True)[0]
    assert [step.reason for step in would.steps] == ["no record names it"]
    assert left in files.registrations, "a dry run changes nothing"
    assert repository.sweep()[0] == would


def test_what_is_cached_of_swept_packs_goes(repository: Repository, image: Path, tmp_path: Path) -> None:
    """Snapshot, delete the oldest, sweep: the cache does not grow with that."""
    for step in range(6):
        qemu.noise(image, 0, MIB, step)
        repository.snapshot(image)
        if step > 1:
            repository.delete([repository.snapshots()[0].snapshot])
            repository.sweep()
    lineage = next(repository.lineages("vol"))
    fronts = [path for path in (lineage.files.folder / "cache" / "packs").rglob("*") if path.is_file()]
    assert len(fronts) == len(lineage.state.packs)


def test_show_tells_what_it_can_of_a_snapshot_with_a_damaged_neighbour(
    store: MemoryStore, image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repository = Repository(store, LocalState(tmp_path / "one"), create=True)
    first, second = repository.snapshot(image).snapshot, repository.snapshot(image).snapshot
    spoil(store, f"vol/manifests/{second}-0")
    shown = Repository(store, LocalState(tmp_path / "two")).show(first)
    assert (shown.snapshot, shown.bytes_unreferenced, shown.bytes_freed) == (first, None, None)
    assert "cannot compute what deleting it would free" in caplog.text


def test_a_sweep_leaves_alone_what_a_running_snapshot_has_sent_however_old(
    repository: Repository, store: MemoryStore, small_packs: None, tmp_path: Path
) -> None:
    """No record names its packs yet; only its registration accounts for them."""
    volume = qemu.create(tmp_path / "running.qcow2", 64 * MIB, lazy_refcounts="on")
    qemu.noise(volume, 0, 12 * (64 << 10), 1)
    swept = []

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "send" and total and done == total and not swept:
            store.now += 10 * 86400
            with Repository(store, repository.state) as other:
                swept.extend(other.sweep(grace=0))

    taken = repository.snapshot(volume, progress=progress)
    assert [one.objects_removed for one in swept] == [0]
    check(repository, taken.snapshot, qemu.content(volume), tmp_path)


def test_a_sweep_counts_what_is_too_young(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore(grace=86400.0)
    repository = Repository(store, LocalState(tmp_path / "young"), create=True)
    first = repository.snapshot(image).snapshot
    qemu.noise(image, 0, 3 * MIB, 7)
    repository.snapshot(image)
    (deleted,) = repository.delete([first])
    (would,) = repository.sweep(grace=0, dry_run=True)
    assert would.packs_repacked
    assert would.bytes_freed == deleted.bytes_freed
    (swept,) = repository.sweep()
    assert (swept.objects_removed, swept.objects_waiting) == (0, would.objects_removed)
    assert swept.bytes_waiting == would.bytes_freed
    assert {one.action for one in swept.steps} == {"keep"}
    assert [one.object for one in swept.steps] == [one.object for one in would.steps]
    (swept,) = repository.sweep(grace=0)
    assert (swept.bytes_freed, swept.objects_waiting, swept.bytes_waiting) == (would.bytes_freed, 0, 0)


class KeepingStore(MemoryStore):
    """A store with a count of its bytes; with `keeps`, of deleted ones too. `late`: others store much."""

    keeps = says = late = False

    def count_bytes(self) -> int | None:
        if self.says:
            return None
        return self.sent if self.keeps else sum(len(one.data) for one in self.objects.values())

    def delete(self, name: str) -> None:
        super().delete(name)
        if self.late:
            self.objects["others"] = Stored(bytes(64 * MIB), self.now)

    @property
    def keeps_deleted(self) -> bool:
        return self.says


@pytest.mark.parametrize("how", ["", "keeps", "says", "late"])
def test_a_sweep_reports_what_the_store_keeps(tmp_path: Path, image: Path, how: str) -> None:
    """As the store says, or as its own count shows."""
    store = KeepingStore()
    if how:
        setattr(store, how, True)
    repository = Repository(store, LocalState(tmp_path / "state"), create=True)
    first = repository.snapshot(image).snapshot
    qemu.noise(image, 0, 4 * MIB, 2)
    repository.snapshot(image)
    repository.delete([first])
    (swept,) = repository.sweep()
    assert swept.bytes_removed > 4 * MIB
    assert swept.bytes_kept == (swept.bytes_removed if how else 0)
    assert swept.bytes_freed == swept.bytes_removed - swept.bytes_kept
    text = "\n".join(_format_swept([swept], dry_run=False, grace=86400))
    assert ("keeps what is deleted" in text) is bool(how)
    (again,) = repository.sweep()
    assert (again.bytes_removed, again.bytes_kept) == (0, 0)
