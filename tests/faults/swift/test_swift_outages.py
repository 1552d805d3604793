"""Servers of Swift that are gone, behind, or die; and refusals that come in storms."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from island_fast.errors import StoreError
from island_fast.progress import Progress
from tests.cli.conftest import pins
from tests.faults.swift.conftest import BRIEF, PACK_BLOCKS, Life
from tests.support import qemu
from tests.support.swift_faults import Fault
from tests.support.swift_server import SwiftServer

pytestmark = qemu.needs_qemu
of_swifts_servers = pytest.mark.swift_only("it is about Swift's own account, container and object servers")
ALWAYS = 1_000_000
CONTAINERS = [f"container-{node}" for node in (1, 2, 3)]


def listings(life: Life) -> set[frozenset[str]]:
    """What many listings say; the proxy asks any of three container servers for each."""
    store = life.stranger().store
    return {frozenset(info.name for info in store.list("")) for _ in range(40)}


# -- container servers


@of_swifts_servers
def test_a_container_server_that_is_behind_costs_nothing(life: Life, swift: SwiftServer, aged: None):
    """A third of the listings lacks rows and has rows of what is gone, until the updater has run."""
    first = life.snapshot()
    swift.stop_server("container-2")
    life.write(0, PACK_BLOCKS + 8)
    second = life.snapshot()
    life.delete(first.snapshot)
    assert life.sweep().objects_removed > 0
    swift.restart_server("container-2")
    assert swift.count_waiting_updates() > 0
    assert len(listings(life)) > 1
    life.write(0, 1)
    life.snapshot()
    for _ in range(2):
        life.sweep()
    life.check()
    swift.once("object-updater")
    assert swift.count_waiting_updates() == 0
    assert listings(life) == {frozenset(life.names())}
    life.delete(second.snapshot)
    assert life.sweep().objects_removed > 0
    life.check()


@of_swifts_servers
def test_without_any_container_server_all_but_listings_work(life: Life, swift: SwiftServer, aged: None):
    """For whoever is at work. Nobody begins: Swift then denies objects that are there, in some containers."""
    gone = life.snapshot()
    at_work = life.repository(patience=BRIEF)
    for server in CONTAINERS:
        swift.stop_server(server)
    lost = "vol/packs/" + "c" * 32 + "/0-00000000"
    at_work.store.put(lost, [b"left by a crash"])
    life.write(0, PACK_BLOCKS + 8)
    life.snapshot(at_work)
    life.delete(gone.snapshot, at_work)
    life.check_by(at_work)
    for verb in (at_work.sweep, at_work.snapshots):
        with pytest.raises(StoreError, match=r"list swift://.*503"):
            verb()
    with pytest.raises(StoreError, match=r"cannot reach Swift at .*503"):
        life.repository("stranger", BRIEF)
    removed = [one["path"] for one in swift.list_requests() if one["method"] == "DELETE"]
    assert all("/probe-" in path for path in removed)
    for server in CONTAINERS:
        swift.restart_server(server)
    life.check()
    assert lost not in life.listed()
    assert life.sweep().objects_removed == 2, "a pack and a manifest that the catalog dropped"
    life.check()
    swift.once("object-updater")
    assert lost in life.listed()
    assert life.sweep().objects_unknown == 1, "no host of this volume knows of it"
    assert life.sweep(unknown=True).objects_removed == 1
    assert listings(life) == {frozenset(life.names())}
    life.check()


# -- object servers


@of_swifts_servers
def test_an_object_server_that_dies_in_a_put_is_not_missed(life: Life, swift: SwiftServer):
    swift.inject(Fault("die", 500_000, method="PUT", path="/packs/"), server="object-2")
    life.snapshot()
    swift.await_death("object-2")
    life.check()
    life.write(3, 5)
    life.snapshot()
    swift.restart_server("object-2")
    life.check()
    swift.once("object-replicator")
    assert all(len(swift.find_replicas(life.path(name))) == 3 for name in life.names())


@of_swifts_servers
def test_two_object_servers_that_die_in_a_put_fail_the_snapshot_and_no_other(
    life: Life, swift: SwiftServer, aged: None
):
    life.snapshot()
    held = pins(life.image)
    life.write(5, PACK_BLOCKS)
    for server in ("object-1", "object-3"):
        swift.inject(Fault("die", 500_000, method="PUT", path="/packs/"), server=server)
    with pytest.raises(StoreError, match=r"put vol/packs/.*unknown"):
        life.snapshot(life.repository(patience=BRIEF))
    assert len(pins(life.image)) <= len(held) + 1
    for server in ("object-1", "object-3"):
        swift.await_death(server)
        swift.restart_server(server)
    life.check()
    life.snapshot()
    life.check()
    life.sweep()
    life.check()


@of_swifts_servers
def test_what_a_failed_put_left_on_one_disk_is_not_taken_for_stored(life: Life, swift: SwiftServer):
    """One object server of three keeps what it is sent; the answer is 503, and 412 from then on."""
    for server in ("object-1", "object-3"):
        swift.inject(
            Fault("choke", 0, method="PUT", path="/packs/", times=2),
            Fault("choke", 0, method="PUT", path="/manifests/"),
            server=server,
        )
    life.snapshot()
    stored = [name for name in life.names() if "/packs/" in name or "/manifests/" in name]
    assert len(stored) == 3
    assert all(len(swift.find_replicas(life.path(name))) >= 2 for name in stored)
    life.check()


# -- refusals


def once_at(stage: str, action: Callable[[], None]) -> tuple[list[str], Progress]:
    """A progress that does `action` once, in the middle of a stage; what it did, and it."""
    done: list[str] = []

    def progress(now: str, part: int, whole: int) -> None:
        if now == stage and now not in done and 2 * part >= whole:
            done.append(now)
            action()

    return done, progress


def test_tokens_that_expire_in_the_middle_of_every_verb(life: Life, swift: SwiftServer, aged: None):
    expired, progress = once_at("send", swift.revoke_tokens)
    first = life.snapshot(progress=progress)
    committing, progress = once_at("commit", swift.revoke_tokens)
    life.write(0, PACK_BLOCKS + 8)
    life.snapshot(progress=progress)
    life.delete(first.snapshot)
    sweeping, progress = once_at("sweep", swift.revoke_tokens)
    assert life.sweep(progress).objects_removed == 2
    restoring, progress = once_at("restore", swift.revoke_tokens)
    stranger = life.stranger()
    before = swift.count("GET", "/auth/")
    for snapshot in [*life.truth] * 2:
        life.restore(snapshot, stranger, progress)
    assert swift.count("GET", "/auth/") == before + 1
    assert [expired, committing, sweeping, restoring] == [["send"], ["commit"], ["sweep"], ["restore"]]
    life.check()
    assert life.listed() == life.names()


def lived(life: Life) -> list[object]:
    """Snapshot, delete, sweep, snapshot: what each told."""
    first = life.snapshot()
    life.write(0, PACK_BLOCKS + 8)
    second = life.snapshot()
    life.delete(first.snapshot)
    swept = life.sweep()
    life.write(1, 2)
    third = life.snapshot()
    told = [(s.rule, s.blocks_changed, s.objects_written) for s in (first, second, third)]
    return [*told, (swept.objects_removed, swept.packs_repacked)]


CALM = [
    ("full-scan", 64, 5),  # repository is not counted; the catalog's first record, 2 packs, manifest, record
    ("table-diff", 40, 4),
    ("table-diff", 2, 3),
    (2, 0),
]


def test_what_a_life_is_like_in_calm(life: Life, aged: None):
    assert lived(life) == CALM
    life.check()


@pytest.mark.parametrize("status", [429, 498, 503, 507])
def test_a_storm_changes_nothing(life: Life, swift: SwiftServer, aged: None, status: int):
    """Two of five requests are refused, for the whole life."""
    swift.inject(Fault("answer", status, path="/v1/", times=ALWAYS, share=0.4))
    assert lived(life) == CALM
    life.check()
    assert sum("/v1/" in r["path"] for r in swift.list_requests()) > 100
    swift.calm()
    assert life.listed() == life.names()


@of_swifts_servers
def test_a_storm_behind_the_proxy_changes_nothing(life: Life, swift: SwiftServer, aged: None):
    """Every object server says that its disk is full, now and then."""
    for server in ("object-1", "object-2", "object-3"):
        swift.inject(Fault("answer", 507, times=ALWAYS, share=0.3), server=server)
    assert lived(life) == CALM
    life.check()
    for server in ("object-1", "object-2", "object-3"):
        swift.calm(server)
    swift.once("object-replicator")
    life.check()


def test_bursts_change_nothing(life: Life, swift: SwiftServer, aged: None):
    """Of every 30 requests five in a row are refused, and five others cut off."""
    for begin in range(10, 600, 30):
        swift.inject(Fault("answer", 503, path="/v1/", skip=begin, times=5))
        swift.inject(Fault("drop", path="/v1/", skip=begin + 15, times=5))
    assert lived(life) == CALM
    life.check()
