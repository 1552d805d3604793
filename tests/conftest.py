"""Fixtures for all tests. Swift is started for the first test that asks for it, once."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from island_fast.stores.directory import DirectoryStore
from island_fast.stores.retry import RetryPolicy
from island_fast.stores.swift import SwiftStore
from tests.support.swift_server import SwiftServer

IMPATIENT = RetryPolicy(total=5.0, first=0.01, longest=0.1)

CINDER = "tests/cinder/"

os.environ["ISLAND_CONFIG"] = os.devnull  # one's own configuration is no part of the tests
os.environ["PATH"] += (
    f":{Path(sys.executable).parent}"  # root's programs are installed beside the interpreter
)

OpenSwift = Callable[..., SwiftStore]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first."""
    items.sort(key=lambda item: not item.nodeid.startswith(CINDER))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Which tests stay together where several processes run them: a file's, and all that share services."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return CINDER if nodeid.startswith(CINDER) else nodeid.partition("::")[0]

    return Together(config, log)


@pytest.fixture(scope="session")
def swift_server() -> Iterator[SwiftServer]:
    """A Swift with one replica."""
    with SwiftServer() as server:
        yield server


@pytest.fixture
def swift(swift_server: SwiftServer, monkeypatch: pytest.MonkeyPatch) -> SwiftServer:
    """That Swift without faults, and its credentials in the environment."""
    swift_server.calm()
    for key in list(os.environ):
        if key.startswith(("OS_", "ST_")):
            monkeypatch.delenv(key)
    for key, value in swift_server.environment().items():
        monkeypatch.setenv(key, value)
    return swift_server


@pytest.fixture
def swift_url(swift: SwiftServer) -> str:
    """swift://CONTAINER/repository in a container of its own."""
    container = f"box-{secrets.token_hex(4)}"
    swift.create_container(container)
    swift.calm()
    return f"swift://{container}/repository"


@pytest.fixture
def swift_store(swift: SwiftServer) -> Iterator[OpenSwift]:
    """`swift_store(prefix, patience)`: a store below `prefix` in a fresh container."""
    opened: list[SwiftStore] = []

    def open_new(prefix: str = "repository", patience: RetryPolicy = IMPATIENT) -> SwiftStore:
        container = f"box-{secrets.token_hex(4)}"
        swift.create_container(container)
        opened.append(SwiftStore.open(f"{container}/{prefix}", patience))
        opened[-1].known_to_refuse = True  # as a repository knows it; else each PUT begins with a HEAD
        swift.calm()
        return opened[-1]

    yield open_new
    for store in opened:
        store.close()


@pytest.fixture
def directory_store(tmp_path: Path) -> Iterator[DirectoryStore]:
    """A store in a directory that its first put makes."""
    with DirectoryStore(str(tmp_path / "repository"), create_ok=True) as store:
        yield store
