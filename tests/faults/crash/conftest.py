"""The process that starts others, once for all tests here, and a line on how far the walk went."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.crash.processes import Actors, World

_WALKED = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def actors() -> Iterator[Actors]:
    with Actors() as started:
        yield started


@pytest.fixture
def world(tmp_path: Path, actors: Actors) -> World:
    """An empty one."""
    return World(tmp_path / "world", actors)


@pytest.fixture
def walked(request: pytest.FixtureRequest) -> list[str]:
    """Lines to be shown at the end of the whole run."""
    return request.config.stash.setdefault(_WALKED, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(_WALKED, []):
        terminalreporter.section("killed at every call of the store")
        for line in lines:
            terminalreporter.write_line(line)
