"""--limit-upload, --limit-download, --workers: which rates reach which stores, how many threads work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from island_fast.repository import pack_writer, workers
from island_fast.stores import rate_limit
from tests.cli.conftest import MIB, Island
from tests.support import qemu

pytestmark = qemu.needs_qemu

Rates = list[tuple[float | None, float | None]]


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Rates:
    """The rates, up and down, of each store that was metered."""
    made: dict[int, float | None] = {}
    found: Rates = []

    class RateLimiter(rate_limit.RateLimiter):
        def __init__(self, rate: float | None, wait: Callable[[float], None]) -> None:
            made[id(self)] = rate
            super().__init__(None, wait=wait)

    class RateLimitedStore(rate_limit.RateLimitedStore):
        def __init__(self, store: rate_limit.Store, meters: rate_limit.RateLimiters) -> None:
            found.append((made[id(meters.up)], made[id(meters.down)]))
            shared.add(id(meters))
            super().__init__(store, meters)

    shared: set[int] = set()
    monkeypatch.setattr(rate_limit, "RateLimiter", RateLimiter)
    monkeypatch.setattr(rate_limit, "RateLimitedStore", RateLimitedStore)
    return found


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return qemu.create(tmp_path / "small.qcow2", MIB)


def test_each_verb_that_moves_data(island: Island, small: Path, tmp_path: Path, rates: Rates) -> None:
    limits = ("--limit-upload", "1.5M", "--limit-download", "500K")
    for words, stores in {
        ("snapshot", small): 1,
        ("restore", "small@latest", tmp_path / "new"): 1,
        ("restore", "small@latest", "--onto", small): 1,
        ("copy", "--all", "--to", tmp_path / "far"): 2,
        ("verify", "--all"): 1,
        ("sweep",): 1,
    }.items():
        rates.clear()
        island.json(*words, *limits)
        assert rates == [(1.5 * MIB, 500 * 1024.0)] * stores, words
    rates.clear()
    island.json("snapshot", small)
    assert rates == [], "without a limit nothing stands before the store"
    assert "no such option" in island.fails(2, "list", *limits)


def test_workers(island: Island, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    class Pool(workers.ThreadPoolExecutor):
        def __init__(self, count: int, **more: str) -> None:
            counts.append(count)
            super().__init__(count, **more)

    monkeypatch.setattr(workers, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(pack_writer, "ThreadPoolExecutor", Pool)
    for words in (
        ("snapshot", small, "--full"),
        ("restore", "small@latest", tmp_path / "new"),
        ("restore", "small@latest", "--onto", small),
        ("verify", "small@latest", "--against", small),
        ("copy", "--all", "--to", tmp_path / "far"),
    ):
        counts.clear()
        island.json(*words, "--workers", 1)
        assert counts, words
        asking = {8} if words[0] == "verify" else set()  # threads that ask what is stored move no blocks
        assert set(counts) - asking == {1}, words
    counts.clear()
    island.json("snapshot", small, "--full")
    assert max(counts) > 1
    monkeypatch.setenv("ISLAND_WORKERS", "1")
    counts.clear()
    island.json("snapshot", small, "--full")
    assert set(counts) - {8} == {1}
    monkeypatch.delenv("ISLAND_WORKERS")
    island.configuration.parent.mkdir(parents=True)
    island.configuration.write_text("workers = 1\n")
    counts.clear()
    island.json("snapshot", small, "--full")
    assert set(counts) - {8} == {1}
    assert "--workers" in island.fails(2, "snapshot", small, "--workers", 0)


def test_option_variable_and_file(
    island: Island, small: Path, rates: Rates, monkeypatch: pytest.MonkeyPatch
) -> None:
    island.configuration.parent.mkdir(parents=True)
    island.configuration.write_text('compression = "none"\nlimit-upload = "1G"\n')
    island.json("snapshot", small)
    monkeypatch.setenv("ISLAND_LIMIT_UPLOAD", "2K")
    monkeypatch.setenv("ISLAND_LIMIT_DOWNLOAD", "3K")
    island.json("snapshot", small)
    island.json("sweep", "--limit-upload", "4K")
    assert rates == [(1 << 30, None), (2048, 3072), (4096, 3072)]
    monkeypatch.setenv("ISLAND_LIMIT_UPLOAD", "fast")
    assert "'fast' is not a valid rate" in island.fails(2, "sweep")
