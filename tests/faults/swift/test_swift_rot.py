"""Bits that flip on the disks of Swift, in one replica of three or in two.

Swift serves the ranges of a rotten replica for ever; one that it sends whole it quarantines at the end.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from island_fast.errors import DamagedError
from island_fast.formats.names import manifest_name
from island_fast.results import Salvaged
from tests.faults.swift.conftest import BLOCK, PACK_BLOCKS, Life
from tests.support import qemu
from tests.support.swift_faults import Fault
from tests.support.swift_server import SwiftServer

pytestmark = [qemu.needs_qemu, pytest.mark.swift_only("it is about replicas on Swift's disks")]
NODES = ["object-1", "object-2", "object-3"]


def only_rotten(swift: SwiftServer, path: str, at: int, rotten: list[str], skip: int = 0) -> None:
    """Rot these replicas, and let the others not answer the first request (after `skip`) for the object."""
    swift.rot(path, at, rotten)
    for server in set(NODES) - set(rotten):
        swift.inject(Fault("answer", 503, method="GET", path=path, skip=skip), server=server)


def needing_ranges(life: Life) -> tuple[str, str]:
    """A snapshot that needs a few ranges of a pack, and that pack's path."""
    first = life.snapshot()
    life.write(0, 10)
    life.write(12, 13)
    second = life.snapshot()
    return second.snapshot, life.path(f"vol/packs/{first.snapshot}/0-00000000")


def needing_whole(life: Life) -> tuple[str, str]:
    first = life.snapshot()
    return first.snapshot, life.path(f"vol/packs/{first.snapshot}/0-00000000")


@pytest.mark.parametrize("rotten", [NODES[:1], NODES[1:]], ids=["one of three", "two of three"])
def test_a_pack_that_rots_is_read_until_a_good_replica_answers(
    life: Life, swift: SwiftServer, rotten: list[str], caplog: pytest.LogCaptureFixture
):
    snapshot, path = needing_whole(life)
    only_rotten(swift, path, 20 * BLOCK, rotten)
    swift.calm()
    life.restore(snapshot, life.stranger())
    assert swift.count("GET", path) >= 2
    assert "came damaged" in caplog.text
    assert len(swift.find_replicas(path)) < 3, "Swift has noticed"
    life.check()


@pytest.mark.parametrize("rotten", [NODES[:1], NODES[1:]], ids=["one of three", "two of three"])
@pytest.mark.parametrize("front", [True, False], ids=["front", "blocks"])
def test_ranges_of_a_pack_that_rots_are_read_whole_until_a_good_replica_answers(
    life: Life, swift: SwiftServer, rotten: list[str], front: bool, caplog: pytest.LogCaptureFixture
):
    snapshot, path = needing_ranges(life)
    at = 200 if front else swift.find_replicas(path)["object-1"].stat().st_size - BLOCK
    only_rotten(swift, path, at, rotten, skip=0 if front else 1)
    if not front:  # then any replica may answer for the front
        for server in set(NODES) - set(rotten):
            swift.calm(server)
            swift.inject(Fault("answer", 503, method="GET", path=path, times=2), server=server)
    swift.calm()
    life.restore(snapshot, life.stranger())
    asked = [r.get("RANGE") for r in swift.list_requests() if r["method"] == "GET" and path in r["path"]]
    assert None in asked
    assert "came damaged" in caplog.text
    life.check()


@pytest.mark.parametrize("kind", ["record", "manifest", "repository"])
def test_small_objects_that_rot(life: Life, swift: SwiftServer, kind: str, caplog: pytest.LogCaptureFixture):
    snapshot = life.snapshot().snapshot
    names = {
        "record": "vol/catalog/000000-00000001",
        "manifest": manifest_name("vol", snapshot, 0),
        "repository": "repository",
    }
    only_rotten(swift, life.path(names[kind]), 60, NODES[:2])
    life.restore(snapshot, life.stranger())
    assert "came damaged" in caplog.text
    life.check()


def test_a_sweep_that_repacks_does_not_copy_rot(
    life: Life, swift: SwiftServer, aged: None, caplog: pytest.LogCaptureFixture
):
    first = life.snapshot()
    life.write(0, PACK_BLOCKS - 8)
    life.snapshot()
    path = life.path(f"vol/packs/{first.snapshot}/0-00000000")
    only_rotten(swift, path, (PACK_BLOCKS - 4) * BLOCK, NODES[:1])
    life.delete(first.snapshot)
    assert life.sweep().packs_repacked == 1
    assert "came damaged" in caplog.text
    life.check()


def test_what_no_replica_has_any_more_is_named_and_nothing_else_is_lost(
    life: Life, swift: SwiftServer, aged: None
):
    first = life.snapshot()
    life.write(0, PACK_BLOCKS)
    life.snapshot()
    swift.rot(life.path(f"vol/packs/{first.snapshot}/0-00000000"), 20 * BLOCK, NODES)
    with pytest.raises(DamagedError, match=f"packs/{first.snapshot}/0-00000000"):
        life.restore(first.snapshot, life.stranger())
    life.delete(first.snapshot)
    life.check()
    life.sweep()
    life.check()


def test_verifying_believes_the_good_replica(
    life: Life, swift: SwiftServer, caplog: pytest.LogCaptureFixture
):
    _, path = needing_whole(life)
    only_rotten(swift, path, 20 * BLOCK, NODES[:2])
    assert life.stranger().verify("vol@latest", sample=1.0).damages == ()
    assert "came damaged" in caplog.text
    life.check()


def test_what_no_replica_has_any_more_is_mended_from_the_image(life: Life, swift: SwiftServer, aged: None):
    first = life.snapshot()
    life.write(0, 1)
    life.snapshot()
    names = [f"vol/packs/{first.snapshot}/0-00000001", manifest_name("vol", first.snapshot, 0)]
    swift.rot(life.path(names[0]), 20 * BLOCK, NODES)
    swift.rot(life.path(names[1]), 100, NODES)
    told = life.stranger().verify(sample=1.0)
    assert {one.object for one in told.damages} == set(names)
    mended = life.repository().verify(sample=1.0, heal=True)
    assert [one.mended for one in mended.damages] == [True, True]
    assert life.stranger().verify(sample=1.0).damages == ()
    life.check()
    life.sweep()
    life.check()
    # Its replicas are in quarantine, so no HEAD confirms that there is anything left to remove.
    assert life.listed() - life.names() == {names[0]}


def test_what_no_replica_has_any_more_is_the_only_thing_that_salvage_loses(
    life: Life, swift: SwiftServer, tmp_path: Path
):
    """It asks for ranges: Swift takes away each rotten replica that it sends whole, with all other blocks."""
    taken = life.snapshot()
    path = life.path(f"vol/packs/{taken.snapshot}/0-00000000")
    swift.rot(path, 20 * BLOCK, NODES)
    target = tmp_path / "salvaged.raw"
    found = life.stranger().restore(taken.snapshot, target, image_format="raw", salvage=True)
    assert isinstance(found, Salvaged)
    assert 0 < found.bytes_lost <= 2 * BLOCK
    assert found.bytes_written >= (PACK_BLOCKS - 2) * BLOCK
