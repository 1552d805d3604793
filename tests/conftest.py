"""Fixtures for all tests. Swift is started for the first test that asks for it, once.

With `--ceph` it is Ceph's object gateway instead, and only tests that need it and can run there are run.
"""

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
from tests.support import ceph_server
from tests.support.ceph_server import CephServer
from tests.support.swift_server import SwiftServer

IMPATIENT = RetryPolicy(total=5.0, first=0.01, longest=0.1)

CINDER = "tests/cinder/test_"  # the files that share Cinder's services

os.environ["ISLAND_CONFIG"] = os.devnull  # one's own configuration is no part of the tests
os.environ["PATH"] += (
    f":{Path(sys.executable).parent}"  # root's programs are installed beside the interpreter
)

OpenSwift = Callable[..., SwiftStore]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ceph",
        action="store_true",
        help="run the tests of Swift, and those alone, with a real Ceph gateway",
    )
    parser.addoption("--long", action="store_true", help="run the tests that take minutes too")
    parser.addoption(
        "--native-threads",
        action="store_true",
        help="run Cinder's services without eventlet, as Cinder 29 and later can, but for its API",
    )
    parser.addoption(
        "--attached", action="store_true", help="run tests of VDUSE and NBD devices too, in virtual machines"
    )
    parser.addoption(
        "--rounds", type=int, default=8, help="rounds of kills while a user writes to a VDUSE disk"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes longest begins first. With --ceph, say of each test whether it can be run there."""
    items.sort(key=lambda item: not item.nodeid.startswith(CINDER))
    if config.getoption("--ceph"):
        config.hook.pytest_deselected(items=[item for item in items if not _uses_swift(item)])
        items[:] = [item for item in items if _uses_swift(item)]
    for item in items:
        if item.get_closest_marker("attached") and not config.getoption("--attached"):
            item.add_marker(pytest.mark.skip(reason="with --attached only: make attached"))
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="with --long only: make long"))
        if config.getoption("--ceph"):
            if mark := item.get_closest_marker("swift_only"):
                item.add_marker(pytest.mark.skip(reason=f"not with Ceph: {mark.args[0]}"))
        elif item.get_closest_marker("ceph_only"):
            item.add_marker(pytest.mark.skip(reason="with Ceph only: make ceph"))


def _uses_swift(item: pytest.Item) -> bool:
    """Whether a test asks for the Swift server, as far as its fixtures, parameters and markers show it."""
    called = getattr(item, "callspec", None)
    asked = [*getattr(item, "fixturenames", ()), *(called.params.values() if called else ())]
    known = any(name in asked for name in ("swift_server", "swift", "services"))
    return known or item.get_closest_marker("uses_swift") is not None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Which tests stay together where several processes run them: a file's, and all that share services."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return CINDER if nodeid.startswith(CINDER) else nodeid.partition("::")[0]

    return Together(config, log)


@pytest.fixture(scope="session")
def swift_server(request: pytest.FixtureRequest) -> Iterator[SwiftServer]:
    """A Swift with one replica, or with --ceph a Ceph."""
    with make_swift_server(request.config) as server:
        yield server


def make_swift_server(config: pytest.Config, *, nodes: int = 1) -> SwiftServer:
    """Return the server to be started: a Swift of so many nodes and replicas, or with --ceph a Ceph."""
    if not config.getoption("--ceph"):
        return SwiftServer(nodes=nodes, replicas=nodes)
    if lacking := ceph_server.missing():
        pytest.fail(lacking)
    return CephServer()


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
        opened[-1].known_to_refuse = not isinstance(swift, CephServer)  # as a repository knows it
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
