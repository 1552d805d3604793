"""Folders beside a repository's volumes: somebody else's, and volumes that this user may not read."""

from __future__ import annotations

from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import AccessDeniedError
from island_fast.operations.retain import Keep
from tests.support import qemu
from tests.support.memory_store import MemoryStore

MIB = 1 << 20


@pytest.fixture
def two(repository: Repository, tmp_path: Path) -> None:
    """Volumes a and b with two snapshots each."""
    for name in ("a", "b"):
        image = qemu.create(tmp_path / f"{name}.qcow2", 16 * MIB, lazy_refcounts="on")
        for seed in (1, 2):
            qemu.noise(image, 0, MIB, seed)
            repository.snapshot(image)


def test_a_folder_of_somebody_else_is_no_damaged_volume(
    repository: Repository, store: MemoryStore, two: None
) -> None:
    for name in (".snapshots/1/info.xml", "data/00/00aa", "packs/pack-1.idx", "x/packs/1", "y/catalog/1"):
        store.put(name, [b"not ours"])
    assert repository.verify().damages == ()
    assert {one.volume for one in repository.snapshots()} == {"a", "b"}


@pytest.mark.parametrize("kind", ["catalog", "packs", "manifests"])
def test_a_volume_that_lost_the_rest_is_one(
    repository: Repository, store: MemoryStore, two: None, kind: str
) -> None:
    for name in [*store.objects]:
        if name.startswith("b/") and (not name.startswith(f"b/{kind}/") or name.endswith("-00000000")):
            del store.objects[name]
    if kind == "packs":
        store.put(f"b/packs/{'a' * 32}/0-00000000", [b"ours"])
    for path in repository.state.root.glob("*/b/cache/catalog/*"):
        path.unlink()
    assert repository.verify().damages or repository.left_out


def test_a_volume_that_may_not_be_read_stops_no_other(
    repository: Repository, two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guard(method: str) -> None:
        real = getattr(MemoryStore, method)

        def guarded(self: MemoryStore, name: str, *rest: object, **options: object) -> object:
            if name.startswith("b/"):
                raise AccessDeniedError("permission denied at b")
            return real(self, name, *rest, **options)

        monkeypatch.setattr(MemoryStore, method, guarded)

    for method in ("get", "head", "list"):
        guard(method)
    assert [one.volume for one in repository.snapshots()] == ["a", "a"]
    assert [one.volume for one in repository.retain(Keep(last=1))] == ["a"]
    assert [one.volume for one in repository.sweep()] == ["a"]
    assert repository.left_out[0].exit_code == 5
    assert repository.usage().volumes[0].volume == "a"
    assert repository.verify().snapshots == 1
    assert "permission denied at b" in str(repository.left_out[0])
    with pytest.raises(AccessDeniedError):
        repository.snapshots("b")
