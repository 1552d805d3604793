"""Whole verbs on two gateways of one Ceph, which get the requests of each host in turn: `make ceph`.

What one of them was asked, the other must know at once: claims rely on it. Both keep metadata of containers.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import ConflictError, RefusedError, StoreError
from island_fast.formats.names import claim_name, epoch_stem
from island_fast.repository.local_state import LocalState
from island_fast.stores.swift import SwiftStore
from tests.conftest import OpenSwift
from tests.faults.swift.conftest import PACK_BLOCKS, PATIENT, Life
from tests.faults.swift.test_ceph_life import VERSIONS
from tests.support import qemu
from tests.support.ceph_server import CephServer
from tests.support.s3_client import request_s3
from tests.support.swift_server import Fault

pytestmark = [qemu.needs_qemu, pytest.mark.ceph_only]

HOSTS = 2
ROUNDS = 6
WRITERS = 8
PUTS = 20
MIB = 1 << 20


@pytest.fixture(scope="module")
def swift_server() -> Iterator[CephServer]:
    with CephServer(gateways=2) as server:
        yield server


def at_once(count: int, work: Callable[[int], object]) -> list[object]:
    """What each of `count` threads returned or raised, all having started at once."""
    barrier = threading.Barrier(count)

    def run(number: int) -> object:
        barrier.wait()
        try:
            return work(number)
        except (RefusedError, StoreError) as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


class Host:
    """A host with a state of its own, and a raw volume that is its number over and over."""

    def __init__(self, container: str, folder: Path, number: int) -> None:
        self.content = bytes([65 + number]) * MIB
        self.image = folder / f"image-{number}"
        self.image.write_bytes(self.content)
        self.state = folder / f"state-{number}"
        store = SwiftStore.open(f"{container}/repo", PATIENT)
        self.repository = Repository(store, LocalState(self.state), create=True)

    def take(self) -> str:
        return self.repository.snapshot(self.image, volume="vol", image_format="raw").snapshot

    def adopt(self) -> None:
        self.repository.adopt("vol")

    def restored(self, snapshot: str) -> bytes:
        target = self.image.with_name(f"back-{secrets.token_hex(4)}")
        self.repository.restore(f"vol@{snapshot}", target, image_format="raw")
        return target.read_bytes()

    def close(self) -> None:
        self.repository.close()


@pytest.fixture
def hosts(swift: CephServer, tmp_path: Path) -> Iterator[Callable[[], list[Host]]]:
    """`hosts()`: hosts that know nothing, and meet in a new container."""
    made: list[Host] = []

    def make() -> list[Host]:
        container, folder = f"box-{secrets.token_hex(4)}", tmp_path / secrets.token_hex(4)
        swift.create_container(container)
        folder.mkdir()
        made.extend(Host(container, folder, number) for number in range(HOSTS + 1))
        return made[-HOSTS - 1 :]

    swift.mend()
    yield make
    for host in made:
        host.close()


def test_a_life_is_the_same_as_with_one(life: Life, swift: CephServer, aged: None) -> None:
    before = swift.count_served()
    first = life.snapshot()
    life.write(0, PACK_BLOCKS + 8)
    life.snapshot()
    life.delete(first.snapshot)
    assert life.sweep().objects_removed == 2
    life.check()
    assert life.listed() == life.names()
    assert life.repository().refuses_overwrites is False
    served = [now - then for now, then in zip(swift.count_served(), before, strict=True)]
    assert min(served) > 20, "both had their share"


def test_of_two_claims_one_maker_at_least_sees_the_other(swift_store: OpenSwift) -> None:
    """The whole of what claims rely on: each is put at one gateway, and listed at another."""
    store = swift_store(patience=PATIENT)
    stem = epoch_stem("vol", 0)

    def claim(number: int) -> list[tuple[str, set[str]]]:
        saw = []
        for _ in range(PUTS):
            name = claim_name(stem, f"{number:032x}", os.urandom(16).hex())
            store.put(name, [b"claim"])
            saw.append((name, {info.name for info in store.list("vol/catalog/")}))
        return saw

    saw: dict[str, set[str]] = {}
    for found in at_once(WRITERS, claim):
        assert isinstance(found, list)
        saw.update(found)
    assert len(saw) == WRITERS * PUTS
    assert all(name in seen for name, seen in saw.items()), "each sees its own"
    names = sorted(saw)
    blind = [(a, b) for i, a in enumerate(names) for b in names[:i] if a not in saw[b] and b not in saw[a]]
    assert not blind


def test_of_two_hosts_that_begin_one_volume_at_once_one_does(hosts: Callable[[], list[Host]]) -> None:
    """They make the repository at the same moment, too. Who was answered with success keeps the snapshot."""
    succeeded = 0
    for _ in range(ROUNDS):
        *rivals, reader = hosts()
        outcomes = at_once(HOSTS, lambda number: rivals[number].take())  # noqa: B023
        taken = {str(one): host for one, host in zip(outcomes, rivals, strict=True) if isinstance(one, str)}
        assert len(taken) <= 1, outcomes
        assert all(isinstance(one, (str, RefusedError, ConflictError)) for one in outcomes), outcomes
        succeeded += len(taken)
        if taken:
            assert {one.snapshot for one in reader.repository.snapshots("vol")} == set(taken)
            assert reader.repository.verify().damages == ()
        for snapshot, host in taken.items():
            assert reader.restored(snapshot) == host.content
    assert succeeded


def test_of_two_hosts_that_adopt_one_volume_at_once_one_does(hosts: Callable[[], list[Host]]) -> None:
    *rivals, owner = hosts()
    kept = {owner.take(): owner.content}
    for _ in range(ROUNDS):

        def adopt_and_take(number: int) -> str:
            rivals[number].adopt()
            return rivals[number].take()

        outcomes = at_once(HOSTS, adopt_and_take)
        assert all(isinstance(one, (str, RefusedError, ConflictError)) for one in outcomes), outcomes
        kept |= {one: rivals[n].content for n, one in enumerate(outcomes) if isinstance(one, str)}
        assert {one.snapshot for one in owner.repository.snapshots("vol")} == set(kept)
    for snapshot, content in kept.items():
        assert owner.restored(snapshot) == content
    assert owner.repository.verify().damages == ()
    assert len(kept) > 1


def test_a_first_record_that_comes_when_its_sender_is_dead(
    hosts: Callable[[], list[Host]], swift: CephServer
) -> None:
    """Another host tries meanwhile, and is refused. The dead one goes on with what landed."""
    first, other, reader = hosts()
    record = "/vol/catalog/000000-00000000"
    swift.inject(Fault("hold", method="PUT", path=record))
    options = ["-r", other.repository.store.location, "--volume", "vol", "--format", "raw"]
    command = [sys.executable, "-m", "island_fast", "snapshot", first.image, *options]
    process = subprocess.Popen(command, env={**os.environ, "ISLAND_STATE": str(first.state)})
    while not swift.count("PUT", record):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    with pytest.raises(RefusedError, match="is making volume vol, or was when it was interrupted"):
        other.take()
    swift.calm()
    while reader.repository.store.peek("vol/catalog/000000-00000000") is None:
        time.sleep(0.05)
    with pytest.raises(ConflictError, match="belongs to host"):
        other.take()
    snapshot = first.take()
    assert reader.restored(snapshot) == first.content
    assert {one.snapshot for one in reader.repository.snapshots("vol")} == {snapshot}
    assert reader.repository.verify().damages == ()


def test_versions_that_are_switched_on_at_one_are_kept_at_the_other(
    life: Life, swift: CephServer, aged: None
) -> None:
    first = life.snapshot()
    digest = base64.b64encode(hashlib.md5(VERSIONS.encode()).digest()).decode()
    headers = {"content-md5": digest}
    path = f"/{life.container}"
    assert request_s3(swift, "PUT", path, {"versioning": ""}, VERSIONS.encode(), headers)[0] == 200
    life.write(0, 2 * PACK_BLOCKS)
    life.snapshot()
    life.delete(first.snapshot)
    swept = life.sweep()
    assert swept.bytes_kept == swept.bytes_removed > 0
    assert swept.bytes_freed == 0
    listed = request_s3(swift, "GET", path, {"versions": ""})[2].decode()
    marked = re.findall("<DeleteMarker>.*?<Key>(.*?)</Key>", listed)
    assert sum(not re.search("probe-|-claim-", name) for name in marked) == swept.objects_removed
    life.check()


def test_one_that_is_away_costs_tries_and_nothing_else(life: Life, swift: CephServer, aged: None) -> None:
    swift.stop_server("gateway-2")
    first = life.snapshot()
    life.write(0, 8)
    life.snapshot()
    life.delete(first.snapshot)
    life.sweep()
    swift.start_server("gateway-2")
    swift.await_server("gateway-2")
    life.check()
    assert life.listed() == life.names()
