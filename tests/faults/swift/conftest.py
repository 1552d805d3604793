"""Whole verbs of the real code on a real Swift of three nodes and three replicas that misbehaves.

`life` is a volume with its history, and what every snapshot of it should give back; each test ends with
`life.check()`: a host that knows nothing restores all of them, bit for bit.
"""

from __future__ import annotations

import itertools
import random
import secrets
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.formats.names import catalog_name
from island_fast.progress import Progress, silent
from island_fast.repository import claims, pack_writer
from island_fast.repository.local_state import LocalState
from island_fast.results import Deleted, SnapshotTaken, Swept
from island_fast.stores import swift as swift_store_module
from island_fast.stores.retry import RetryPolicy
from island_fast.stores.swift import SwiftStore
from tests.conftest import make_swift_server
from tests.support import qemu
from tests.support.swift_server import SwiftServer

BLOCK = 65536
PACK_BLOCKS = 32  # so that volumes of a few MiB have several packs
VOLUME = 8 << 20
PATIENT = RetryPolicy(total=100.0, first=0.02, longest=0.15)
BRIEF = RetryPolicy(total=1.5, first=0.02, longest=0.15)
"""Only where the store cannot answer at all: a loaded machine needs longer than this for what goes well."""
_AGED = 2 * 86400.0  # seconds


@pytest.fixture(scope="module")
def swift_server(request: pytest.FixtureRequest) -> Iterator[SwiftServer]:
    """Three nodes, three replicas of everything; the tests' other one has one of each."""
    with make_swift_server(request.config, nodes=3) as server:
        yield server


class Life:
    """The volume `vol`, whose host is "host". `truth` has the content of every live snapshot."""

    def __init__(self, swift: SwiftServer, folder: Path) -> None:
        self.swift = swift
        self.truth: dict[str, bytes] = {}
        self.container = f"box-{secrets.token_hex(4)}"
        self.image = qemu.create(folder / "vol.qcow2", VOLUME, lazy_refcounts="on")
        self._folder = folder
        self._seed = itertools.count()
        self._open: list[Repository] = []
        swift.create_container(self.container)
        self.write(0, 2 * PACK_BLOCKS)

    def repository(self, host: str = "host", patience: RetryPolicy = PATIENT) -> Repository:
        """The repository, opened anew by a host."""
        store = SwiftStore.open(f"{self.container}/repo", patience)
        self._open.append(Repository(store, LocalState(self._folder / host), create=host == "host"))
        return self._open[-1]

    def stranger(self) -> Repository:
        """The repository, opened by a host that knows nothing."""
        return self.repository(f"stranger-{secrets.token_hex(4)}")

    def close(self) -> None:
        for repository in self._open:
            repository.store.close()

    # Verbs.

    def write(self, block: int, count: int) -> None:
        """Overwrite blocks with what does not compress."""
        noise = self._folder / "noise"
        noise.write_bytes(random.Random(next(self._seed)).randbytes(count * BLOCK))
        qemu.write_file(self.image, block * BLOCK, noise)

    def snapshot(self, at: Repository | None = None, progress: Progress = silent) -> SnapshotTaken:
        at = at or self.repository()
        taken = at.snapshot(self.image, volume="vol", progress=progress)
        self.truth[taken.snapshot] = qemu.content(self.image)
        return taken

    def delete(self, snapshot: str, at: Repository | None = None) -> Deleted:
        (told,) = (at or self.repository()).delete([f"vol@{snapshot}"])
        del self.truth[snapshot]
        return told

    def sweep(self, progress: Progress = silent, *, unknown: bool = False) -> Swept:
        (swept,) = self.repository().sweep(unknown=unknown, progress=progress)
        return swept

    # How it should be.

    def check(self) -> None:
        """A host that knows nothing sees every live snapshot, and restores each to the same bytes."""
        self.check_by(self.stranger())

    def check_by(self, repository: Repository) -> None:
        assert {s.snapshot for s in repository.snapshots("vol")} == set(self.truth)
        for snapshot in self.truth:
            self.restore(snapshot, repository)

    def restore(self, snapshot: str, repository: Repository, progress: Progress = silent) -> None:
        """Restore one snapshot and compare it."""
        target = self._folder / f"restored-{secrets.token_hex(4)}"
        repository.restore(f"vol@{snapshot}", target, image_format="raw", progress=progress)
        assert target.read_bytes() == self.truth[snapshot]
        target.unlink()

    def names(self) -> set[str]:
        """Every object that should be there, by the catalog that a host sees that knows nothing."""
        (lineage,) = self.stranger().lineages("vol")
        place, packs = lineage._at, lineage.state.packs
        found = {"repository"} | {catalog_name("vol", 0, number) for number in range(place.number + 1)}
        found |= {lineage.manifest_name(row) for row in lineage.state.live.values()}
        return found | set(lineage.pack_names(packs))

    def listed(self) -> set[str]:
        """Every object that is there, as a listing has it."""
        return {info.name for info in self.stranger().store.list("")}

    def path(self, name: str) -> str:
        """An object as Swift's own servers call it."""
        return f"{self.container}/repo/{name}"


@pytest.fixture
def life(swift: SwiftServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Life]:
    """A life that has not begun; the servers are well."""
    swift.mend()
    monkeypatch.setattr(pack_writer, "MAX_SLOTS", PACK_BLOCKS)
    life = Life(swift, tmp_path)
    swift.calm()
    yield life
    life.close()


@pytest.fixture
def aged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every object is two days older than it is: no sweep spares one for its youth.

    Claims count for two days more, for those that are seconds old must not be over.
    """
    real = swift_store_module._age

    def older(now: datetime | None, then: datetime | None) -> float:
        return real(now, then) + (_AGED if now and then else 0.0)

    monkeypatch.setattr(swift_store_module, "_age", older)
    monkeypatch.setattr(claims, "EXPIRES", claims.EXPIRES + _AGED)
    monkeypatch.setattr(claims, "_USED", claims._USED + _AGED)
