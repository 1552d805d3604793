"""Answers of Swift that are lost, cut short or spoilt on their way."""

from __future__ import annotations

import re

import pytest

from tests.faults.swift.conftest import BLOCK, PACK_BLOCKS, Life
from tests.support import qemu
from tests.support.swift_faults import Fault
from tests.support.swift_server import SwiftServer

pytestmark = qemu.needs_qemu


# -- work that was done, and whose answer did not come


@pytest.mark.parametrize("kind", ["lose", "lie"])
def test_lost_answers_neither_lose_nor_double_anything(life: Life, swift: SwiftServer, aged: None, kind: str):
    """Every kind of object is stored, or removed, behind an answer that says nothing or the opposite."""
    for method in ("PUT", "DELETE"):
        for path in ("/repository$", "/packs/", "/manifests/", "/catalog/"):
            swift.inject(Fault(kind, 503, method=method, path=path, times=3))
    first = life.snapshot()
    life.write(0, PACK_BLOCKS + 8)
    second = life.snapshot()
    assert (first.objects_written, second.objects_written) == (5, 4)
    life.delete(first.snapshot)
    assert life.sweep().objects_removed == 2
    life.check()
    assert life.listed() == life.names()
    assert not list(life._folder.glob("host/*/vol/pending/*"))
    asked = [(r["method"], r["path"].partition("/repo/")[2]) for r in swift.list_requests()]
    removed = [name for method, name in asked if method == "DELETE" and not re.search("probe-|-claim-", name)]
    hit = {re.sub("[0-9a-f-]{9,}", "ID", name) for name in removed}
    assert hit == {"vol/packs/ID/ID", "vol/manifests/ID"}


@pytest.mark.parametrize("kind", ["lose", "lie"])
def test_an_adoption_whose_answers_are_lost(life: Life, swift: SwiftServer, kind: str):
    life.snapshot()
    heir = life.repository("heir")
    for path in ("-stop$", "/catalog/000001-00000000$"):
        swift.inject(Fault(kind, 503, method="PUT", path=path))
    told = heir.adopt("vol")
    assert (told.snapshots, told.epoch) == (1, 1)
    life.write(0, 3)
    life.snapshot(heir)
    life.check()


# -- answers that are cut or spoilt


class Kinds:
    """Two snapshots; the second needs a few ranges of its parent's first pack, and the second pack whole."""

    def __init__(self, life: Life) -> None:
        first = life.snapshot().snapshot
        life.write(0, 10)
        life.write(12, 13)
        self.second = life.snapshot().snapshot
        assert PACK_BLOCKS == 32  # left of the first pack: slots 10, 11 and 25 to 31
        self.paths = {
            "repository": "/repository$",
            "record": "/catalog/000000-00000001",
            "manifest": f"/manifests/{self.second}",
            "front": f"/packs/{first}/0-00000000",
            "ranges": f"/packs/{first}/0-00000000",
            "whole": f"/packs/{first}/0-00000001",
        }

    def spoil(self, swift: SwiftServer, kind: str, fault: str, value: int, times: int = 1) -> None:
        """One answer of that kind comes spoilt. Of a pack that is read by ranges the front comes first."""
        swift.calm()
        skip = kind == "ranges"
        swift.inject(Fault(fault, value, method="GET", path=self.paths[kind], skip=skip, times=times))

    def gets(self, swift: SwiftServer, kind: str) -> list[str | None]:
        """The Range headers of the requests for that object."""
        path = re.compile(self.paths[kind])
        return [
            r.get("RANGE") for r in swift.list_requests() if r["method"] == "GET" and path.search(r["path"])
        ]


QUIET = {"repository": 1, "record": 1, "manifest": 1, "front": 2, "ranges": 2, "whole": 1}
one_request = pytest.mark.swift_only(
    "it counts what asks for several ranges, and Ceph answers with the first"
)
KINDS = [pytest.param(kind, marks=one_request) if QUIET[kind] == 2 else kind for kind in QUIET]


@one_request
def test_what_a_restore_asks_for_in_calm(life: Life, swift: SwiftServer):
    kinds = Kinds(life)
    swift.calm()
    life.restore(kinds.second, life.stranger())
    assert {kind: len(kinds.gets(swift, kind)) for kind in kinds.paths} == QUIET
    front, ranges = kinds.gets(swift, "ranges")
    assert front is not None
    assert ranges is not None
    assert ranges.count("-") == 2
    assert kinds.gets(swift, "whole") == [None]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_is_cut_is_asked_for_again(life: Life, swift: SwiftServer, kind: str):
    kinds = Kinds(life)
    for bytes_through in (0, 70):
        kinds.spoil(swift, kind, "truncate", bytes_through)
        life.restore(kinds.second, life.stranger())
        assert len(kinds.gets(swift, kind)) == QUIET[kind] + 1
    swift.calm()
    life.check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bit_flipped_on_the_way_is_found_and_told(
    life: Life, swift: SwiftServer, kind: str, caplog: pytest.LogCaptureFixture
):
    kinds = Kinds(life)
    offsets = {"ranges": (1, BLOCK), "whole": (1, 20 * BLOCK), "front": (1, 200)}.get(kind, (1, 60))
    for at in offsets:
        kinds.spoil(swift, kind, "corrupt", at)
        caplog.clear()
        life.restore(kinds.second, life.stranger())
        assert len(kinds.gets(swift, kind)) > QUIET[kind]
        unframed = kind == "ranges" and at == 1  # the answer made no sense, which the store notices
        assert ("came damaged" in caplog.text) is not unframed
    swift.calm()
    life.check()


@pytest.mark.parametrize("path", ["/catalog/", "/manifests/", "/packs/"])
def test_a_bit_flipped_on_the_way_to_a_delete_or_a_sweep(
    life: Life, swift: SwiftServer, aged: None, path: str
):
    """What decides about deleting is read again too. The host has lost what it kept, so it reads all."""
    first = life.snapshot()
    life.write(0, PACK_BLOCKS - 2)
    second = life.snapshot()
    life.write(PACK_BLOCKS, 20)
    life.snapshot()
    heir = life.repository("heir")
    heir.adopt("vol")
    swift.inject(*(Fault("corrupt", 60, method="GET", path=path, skip=2 * n) for n in range(4)))
    life.delete(first.snapshot, heir)
    (swept,) = heir.sweep()
    assert (swept.packs_repacked, swept.objects_removed) == (1, 2)
    life.check()
    life.delete(second.snapshot, heir)
    heir.sweep()
    swift.calm()
    life.check()
