"""Many calls at once, in a service on eventlet and in one on native threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import pytest

import tests.cinder.guest as guest
from tests.cinder.account import NATIVE_THREADS
from tests.cinder.cloud import Cloud
from tests.cinder.services import Services

_HOSTS = {"eventlet": "hosta", "native": "hostv"}
_MIB = 1 << 20
_COUNT = 2


@pytest.mark.long
@pytest.mark.parametrize("threads", ["eventlet", "native"])
def test_calls_at_once_do_not_disturb_each_other(services: Services, threads: str) -> None:
    """Each of several volumes is attached, snapshotted twice, cloned and grown while the others are."""
    if threads == "native" and int(version("cinder").partition(".")[0]) < 29:
        pytest.skip("Cinder before 29 runs on eventlet only")
    host = _HOSTS[threads]
    program = services.region().service(f"volume-{host}")
    if threads == "native":
        program.env |= NATIVE_THREADS
    cloud = services.run(host=host)
    if threads == "native":
        assert "Service is starting with native threading" in program.text()
    with ThreadPoolExecutor(_COUNT) as pool:
        volumes = list(pool.map(lambda _: Cloud(cloud.region).create_volume(host=host), range(_COUNT)))
        for done in [pool.submit(live, Cloud(cloud.region), host, one) for one in volumes]:
            done.result()
    folders = {path.name for path in (cloud.region.folder / host / "volumes").iterdir() if path.is_dir()}
    assert not folders & {one.id for one in volumes}
    if threads == "native":
        assert program.stop() == 0, "it did not end by itself"


def live(cloud: Cloud, host: str, volume: Any) -> None:
    """What one volume goes through."""
    attached = cloud.attach(volume, cloud.connector(host))
    contents, snapshots = [], []
    for number in range(2):
        contents.append(guest.noise((volume.id, number), _MIB))
        guest.write(attached.device, 0, contents[-1])
        snapshots.append(cloud.snapshot(volume))
    latest = guest.noise((volume.id, "latest"), _MIB)
    guest.write(attached.device, 0, latest)
    waiting = [cloud.snapshot(volume, wait=False) for _ in range(2)]  # both at once, and the clone with them
    clone = cloud.create_volume(source_volid=volume.id)
    for one in waiting:
        cloud.await_snapshot(one, "available")
    cloud.extend(volume, 2)
    assert guest.size(attached.device) == 2 * guest.GIB
    copies = [cloud.create_volume(snapshot_id=one.id) for one in [*snapshots, waiting[0]]]
    for copy, content in zip([*copies, clone], [*contents, latest, latest], strict=True):
        there = cloud.attach(copy, cloud.connector(host))
        assert guest.read(there.device, 0, _MIB) == content
        cloud.detach(there, copy)
        cloud.delete_volume(copy)
    cloud.detach(attached, volume)
    cloud.delete_volume(volume, cascade=True)
