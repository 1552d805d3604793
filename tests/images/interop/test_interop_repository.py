"""Every image that qemu makes is stored and comes back as qemu reads it, and so is each internal snapshot."""

from __future__ import annotations

from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.repository.local_state import LocalState
from tests.images.interop.images import RECIPES, Made, Recipe
from tests.support import qemu
from tests.support.memory_store import MemoryStore

pytestmark = qemu.needs_qemu


def restored(repository: Repository, snapshot: str, folder: Path) -> bytes:
    target = folder / "restored.raw"
    repository.restore(snapshot, target, image_format="raw")
    data = target.read_bytes()
    target.unlink()
    return data


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_it_comes_back(recipe: Recipe, images: dict[str, Made], tmp_path: Path) -> None:
    made = images[recipe.name]
    before = made.path.read_bytes()
    repository = Repository(MemoryStore(), LocalState(tmp_path / "state"), create=True)
    taken = {}
    for name in made.contents:
        taken[name] = repository.snapshot(made.path, volume="vol", pin=False, at=name).snapshot
    assert made.path.read_bytes() == before, "the image is left untouched"
    for name, truth in made.contents.items():
        assert restored(repository, taken[name], tmp_path) == truth, name
    if len(made.contents[None]) % 512 == 0:
        target = tmp_path / "restored.qcow2"
        repository.restore(taken[None], target)
        qemu.check(target)
        assert qemu.content(target) == made.contents[None]
