"""Retention on whole repositories: what it leaves alone, and what others do meanwhile."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import ConflictError, DamagedError, NotFoundError, RefusedError, UsageError
from island_fast.operations.retain import Keep
from island_fast.repository.local_state import LocalState, Registration
from island_fast.results import Retained
from tests.operations.conftest import check
from tests.support import qemu
from tests.support.memory_store import MemoryStore

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return qemu.create(tmp_path / "vol.qcow2", MIB, lazy_refcounts="on")


def take(repository: Repository, image: Path, count: int, volume: str = "vol") -> list[str]:
    """Snapshots of a volume, the same block changed before each."""
    taken = []
    for number in range(count):
        qemu.io(image, qemu.write(0, 65536, number + 1))
        taken.append(repository.snapshot(image, volume=volume, pin=volume == "vol").snapshot)
    return taken


def left(repository: Repository, volume: str = "vol") -> list[str]:
    return [one.snapshot for one in repository.snapshots(volume)]


def kept(answer: Retained) -> dict[str, tuple[str, ...]]:
    return {one.snapshot: one.reasons for one in answer.snapshots if one.kept}


def test_what_stays_is_whole_and_the_next_snapshot_incremental(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    taken = take(repository, image, 4)
    content = qemu.content(image)
    (answer,) = repository.retain(Keep(last=1))
    assert kept(answer) == {taken[3]: ("last",)}
    assert left(repository) == taken[3:]
    repository.sweep()
    check(repository, taken[3], content, tmp_path)
    assert repository.snapshot(image).rule == "table-diff"
    (again,) = repository.retain(Keep(last=2))
    assert (again.kept, again.deleted, again.bytes_freed) == (2, 0, 0)


def test_without_a_rule_nothing_happens(repository: Repository, store: MemoryStore, image: Path) -> None:
    take(repository, image, 2)
    before = dict(store.objects)
    with pytest.raises(UsageError, match="--keep-daily"):
        repository.retain(Keep())
    assert store.objects == before


def test_volumes_are_decided_for_one_by_one(repository: Repository, image: Path) -> None:
    ours = {volume: take(repository, image, 2, volume) for volume in ("a", "vol")}
    only = repository.retain(Keep(last=1), volume="a")
    assert [one.volume for one in only] == ["a"]
    assert left(repository) == ours["vol"]
    both = repository.retain(Keep(last=1))
    assert [(one.volume, one.kept, one.deleted) for one in both] == [("a", 1, 0), ("vol", 1, 1)]
    assert left(repository) == ours["vol"][1:]
    with pytest.raises(NotFoundError):
        repository.retain(Keep(last=1), volume="c")


@pytest.mark.parametrize("dry_run", [True, False])
def test_volumes_of_other_hosts_are_left_out_and_told(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, dry_run: bool,
) -> None:  # fmt: skip
    take(repository, image, 2)
    other = Repository(store, LocalState(tmp_path / "other"))
    take(other, image, 2, "theirs")
    before = dict(store.objects)
    (answer,) = other.retain(Keep(last=1), dry_run=dry_run)
    assert (answer.volume, answer.deleted) == ("theirs", 1)
    assert caplog.messages == ["skipped, because another host owns them: vol"]
    assert not other.left_out
    changed = {name.partition("/")[0] for name in store.objects.keys() - before.keys()}
    assert changed == (set() if dry_run else {"theirs"})
    with pytest.raises(ConflictError, match="island adopt vol"):
        other.retain(Keep(last=1), volume="vol", dry_run=dry_run)


def test_the_base_of_a_running_snapshot_stays(repository: Repository, image: Path, tmp_path: Path) -> None:
    taken = take(repository, image, 4)
    files = LocalState(tmp_path / "state").lineage(repository.id, "vol")
    with files.registrations.register(Registration("d" * 32, 0, taken[1])):
        (answer,) = repository.retain(Keep(last=1))
    assert kept(answer) == {taken[1]: ("could not be deleted",), taken[3]: ("last",)}
    (error,) = repository.left_out
    assert isinstance(error, RefusedError)
    assert left(repository) == [taken[1], taken[3]]
    repository.retain(Keep(last=1), volume="vol")
    assert not repository.left_out
    assert left(repository) == taken[3:]


def test_damage_keeps_what_it_touches_and_no_more(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    taken = take(repository, image, 5)
    other = take(repository, image, 2, "zzz")
    name = f"vol/manifests/{taken[0]}-0"
    store.objects[name] = replace(store.objects[name], data=b"x" * 100)
    (tmp_path / "state" / repository.id / "vol/cache/manifests" / f"{taken[0]}-0").unlink()
    first, second = repository.retain(Keep(last=1))
    assert list(kept(first)) == [taken[0], taken[1], taken[4]], "the damaged one, its child, the newest"
    (error,) = repository.left_out
    assert isinstance(error, DamagedError), "told once"
    assert left(repository) == [taken[0], taken[1], taken[4]]
    assert left(repository, "zzz") == other[1:]
    assert second.deleted == 1


def test_what_others_delete_meanwhile_is_counted(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    taken = take(repository, image, 5)
    other = Repository(store, LocalState(tmp_path / "state"))

    def meddle(phase: str, done: int, total: int) -> None:
        if left(other) == taken[1:]:
            other.delete([taken[1], taken[4]])

    (answer,) = repository.retain(Keep(last=1), progress=meddle)
    assert left(repository) == [taken[3]], "the newest stays, which was not the newest at first"
    assert [one.snapshot for one in answer.snapshots] == [taken[0], *taken[2:]]
    assert kept(answer) == {taken[3]: ("last",), taken[4]: ("last",)}
    assert answer.deleted == 2


def test_progress_counts_what_goes(repository: Repository, image: Path) -> None:
    take(repository, image, 3)
    stored = [one.bytes_stored for one in repository.snapshots()]
    told: list[tuple[str, int, int]] = []
    repository.retain(Keep(last=1), progress=lambda *step: told.append(step))
    total = sum(stored[:2])
    assert told == [("retain", stored[0], total), ("retain", total, total)]
