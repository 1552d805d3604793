"""Whole verbs on a real Ceph gateway that is killed, or keeps what is deleted: `make ceph`."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest

from island_fast.cli.sweep import _format_swept
from island_fast.progress import Progress
from tests.faults.swift.conftest import PACK_BLOCKS, Life
from tests.support import qemu
from tests.support.ceph_server import CephServer
from tests.support.s3_client import request_s3
from tests.support.swift_server import SwiftServer

pytestmark = [qemu.needs_qemu, pytest.mark.ceph_only]

T = TypeVar("T")

_XML = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
VERSIONS = f"<VersioningConfiguration {_XML}><Status>Enabled</Status></VersioningConfiguration>"
LOCK = (
    f"<ObjectLockConfiguration {_XML}><ObjectLockEnabled>Enabled</ObjectLockEnabled><Rule><DefaultRetention>"
    "<Mode>COMPLIANCE</Mode><Days>1</Days></DefaultRetention></Rule></ObjectLockConfiguration>"
)


@pytest.fixture
def ceph(swift: SwiftServer) -> CephServer:
    assert isinstance(swift, CephServer)
    return swift


def kill_gateway_in(ceph: CephServer, verb: Callable[[Progress], T]) -> T:
    """Do `verb`, and kill the gateway when its progress is first called; seconds later it is there again."""
    begun, killed = threading.Event(), threading.Event()

    def progress(what: str, done: int, total: int) -> None:
        begun.set()
        killed.wait(60)

    with ThreadPoolExecutor(1) as pool:  # the gateway would end with the thread that starts it
        future = pool.submit(verb, progress)
        assert begun.wait(60)
        ceph.stop_server("gateway")
        killed.set()
        ceph.start_server("gateway")
        answer = future.result()
    ceph.await_server("gateway")  # who opens a repository waits for 20 s only
    return answer


def test_a_sweep_of_a_plain_container_frees_what_it_removes(life: Life, aged: None):
    first = life.snapshot()
    life.write(0, 2 * PACK_BLOCKS)
    life.snapshot()
    life.delete(first.snapshot)
    swept = life.sweep()
    assert swept.bytes_freed == swept.bytes_removed > 0
    assert swept.bytes_kept == 0
    life.check()


@pytest.mark.parametrize("how", ["versions", "lock"])
def test_a_sweep_says_what_the_store_keeps(life: Life, ceph: CephServer, aged: None, how: str):
    """Versions and locks are switched on over S3, and Swift's API says nothing of them."""
    life.container = f"box-{secrets.token_hex(4)}"
    headers = {"x-amz-bucket-object-lock-enabled": "true"} if how == "lock" else {}
    assert request_s3(ceph, "PUT", f"/{life.container}", headers=headers)[0] == 200
    query, body = ("object-lock", LOCK) if how == "lock" else ("versioning", VERSIONS)
    digest = base64.b64encode(hashlib.md5(body.encode()).digest()).decode()
    status, _, answer = request_s3(
        ceph, "PUT", f"/{life.container}", {query: ""}, body.encode(), {"content-md5": digest}
    )
    assert status == 200, answer
    first = life.snapshot()
    life.write(0, 2 * PACK_BLOCKS)
    life.snapshot()
    life.delete(first.snapshot)
    swept = life.sweep()
    assert swept.bytes_kept == swept.bytes_removed > 0
    assert swept.bytes_freed == 0
    assert any("keeps what is deleted" in line for line in _format_swept([swept], dry_run=False, grace=0))
    listed = request_s3(ceph, "GET", f"/{life.container}", {"versions": ""})[2].decode()
    marked = re.findall("<DeleteMarker>.*?<Key>(.*?)</Key>", listed)
    assert sum(not re.search("probe-|-claim-", name) for name in marked) == swept.objects_removed
    life.check()
    assert life.listed() == life.names()


def test_a_gateway_that_is_killed_in_every_verb(life: Life, ceph: CephServer, aged: None):
    first = kill_gateway_in(ceph, lambda progress: life.snapshot(progress=progress))
    life.write(0, PACK_BLOCKS + 8)
    kill_gateway_in(ceph, lambda progress: life.snapshot(progress=progress))
    for snapshot in life.truth:
        stranger = life.stranger()
        kill_gateway_in(ceph, lambda progress: life.restore(snapshot, stranger, progress))  # noqa: B023
    life.delete(first.snapshot)
    assert kill_gateway_in(ceph, life.sweep).objects_removed
    life.check()
    assert life.listed() == life.names()
