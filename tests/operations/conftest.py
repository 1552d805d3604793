"""A repository in memory, for tests of whole verbs."""

from __future__ import annotations

from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.repository import pack_reader, pack_writer
from island_fast.repository.local_state import LocalState
from tests.support.memory_store import MemoryStore


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def repository(store: MemoryStore, tmp_path: Path) -> Repository:
    return Repository(store, LocalState(tmp_path / "state"), create=True)


PACK = 8
"""Blocks of a pack where `small_packs` is in force."""


@pytest.fixture
def small_packs(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of PACK blocks, sent one at a time and in order."""
    in_small_packs(store, monkeypatch)


def in_small_packs(store: MemoryStore, patch: pytest.MonkeyPatch) -> None:
    """The same, for as long as `patch` lasts."""
    patch.setattr(pack_reader, "BATCH", PACK)
    patch.setattr(pack_writer, "MAX_SLOTS", PACK)
    store.uploads = 1


def let_any_image_in(repository: Repository, volume: str = "vol") -> None:
    """Have the next snapshot of a volume come from any image that holds its pin, as after an adoption."""
    repository.lineage(volume).files.set_image(None)


def check(repository: Repository, snapshot: str, content: bytes, folder: Path) -> None:
    """Assert that a snapshot restores to these bytes; a file in `folder` comes and goes."""
    target = folder / "check.raw"
    repository.restore(snapshot, target, image_format="raw")
    assert target.read_bytes() == content
    target.unlink()
