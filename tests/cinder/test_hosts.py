"""Two hosts of a region: who may attach a volume, and how volumes get from one to the other."""

from __future__ import annotations

import os
import re
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.cinder.cloud import Cloud, exceptions
from tests.cinder.content import MIB, attached, connector, got, put, read, snapshots, write
from tests.cinder.programs import wait_for
from tests.cinder.services import Services

A, B, PLAIN = "hosta", "hostb", "plain"
DATA = bytes(range(256)) * 4096  # 1 MiB
_FORGETTING = 15.0  # seconds, in which each host looks for volumes that others have taken over


@pytest.fixture(scope="module")
def cloud(services: Services) -> Cloud:
    services.run(host=A)
    return services.run(host=B)


@pytest.fixture(scope="module")
def plain(services: Services, cloud: Cloud) -> Cloud:
    """The same, with a third host, whose driver keeps raw files."""
    backend = {**services.plain("one", PLAIN), "volume_backend_name": PLAIN}
    return services.run(host=PLAIN, backend=backend)


def places(services: Services, volume: Any) -> list[str]:
    """The hosts that have a folder of the volume."""
    root = services.account.home / "region-one"
    return sorted(path.parts[-3] for path in root.glob(f"*/volumes/{volume.id}"))


def images(services: Services, volume: Any) -> list[str]:
    """The hosts that have an image of the volume."""
    root = services.account.home / "region-one"
    return sorted(path.parts[-4] for path in root.glob(f"*/volumes/{volume.id}/image.qcow2"))


def said(services: Services, host: str) -> str:
    return services.region().service(f"volume-{host}").text()


def rule(services: Services, host: str, volume: Any) -> tuple[str, int, int]:
    """Of the volume's last snapshot: the rule, how many blocks changed, and the bytes stored."""
    line = rf"of volume {volume.id}: (\S+) .*, (\d+) of \d+ blocks changed, \d+ B read, (\d+) B stored"
    kind, changed, stored = re.findall(line, said(services, host))[-1]
    return kind, int(changed), int(stored)


def test_a_server_on_another_host_is_refused_and_told_which_host(services: Services, cloud: Cloud) -> None:
    volume = cloud.create_volume(host=A)
    before = len(said(services, A))
    reserved = cloud.api.attachments.create(volume.id, None)
    with pytest.raises(exceptions.ClientException):
        cloud.api.attachments.update(reserved["id"], connector(B))
    assert re.search(
        rf"this volume is on host {A}, and host {B} cannot attach it: run the server there",
        said(services, A)[before:],
    )
    cloud.api.attachments.delete(reserved["id"])
    cloud.await_volume(volume, "available")
    assert images(services, volume) == []
    cloud.delete_volume(volume)


def test_live_migration_is_refused_and_the_guest_goes_on(services: Services, cloud: Cloud) -> None:
    """Nova asks for a second attachment of the same server, on the other host."""
    volume, server = cloud.create_volume(host=A), str(uuid.uuid4())
    first = cloud.api.attachments.create(volume.id, None, server)
    device = Path(cloud.api.attachments.update(first["id"], connector(A)).connection_info["device_path"])
    cloud.api.attachments.complete(first["id"])
    second = cloud.api.attachments.create(volume.id, None, server)
    with pytest.raises(exceptions.ClientException):
        cloud.api.attachments.update(second["id"], connector(B))
    put(device, DATA)
    assert got(device, len(DATA)) == DATA
    assert (images(services, volume), places(services, volume)) == ([A], [A])
    cloud.api.volumes.reset_state(volume, "available", attach_status="detached")
    cloud.delete_volume(volume)
    assert not os.path.lexists(device)


def test_a_volume_moves_to_another_host_and_back(services: Services, cloud: Cloud) -> None:
    volume = cloud.create_volume(host=A)
    write(cloud, volume, A, DATA, MIB)
    cloud.migrate(volume, B)
    assert cloud.host_of(volume) == B
    assert images(services, volume) == []
    assert len(snapshots(services, volume.id)) == 1
    with attached(cloud, volume, B) as here:
        assert got(here.device, len(DATA), MIB) == DATA
        put(here.device, b"written on b", 8 * MIB)
    assert images(services, volume) == [B]
    assert snapshots(services, volume.id) == []

    whole = cloud.snapshot(volume)
    write(cloud, volume, B, b"and again", 16 * MIB)
    little = cloud.snapshot(volume)
    assert [row["label"] for row in snapshots(services, volume.id)] == [whole.id, little.id]
    assert rule(services, B, volume)[:2] == ("table-diff", 1)
    with pytest.raises(exceptions.BadRequest, match="snapshots"):
        cloud.migrate(volume, A)
    for one in (whole, little):
        cloud.delete_snapshot(one)

    cloud.migrate(volume, A)  # where an old record of it may be
    with attached(cloud, volume, A) as here:
        assert got(here.device, len(DATA), MIB) == DATA
        assert got(here.device, 12, 8 * MIB) == b"written on b"
        assert got(here.device, 9, 16 * MIB) == b"and again"
    assert snapshots(services, volume.id) == []
    wait_for("b forgets it", lambda: places(services, volume) == [A], lambda: said(services, B)[-2000:])
    cloud.delete_volume(volume)
    assert places(services, volume) == []


def test_volumes_that_were_never_attached_move(services: Services, cloud: Cloud) -> None:
    blank = cloud.create_volume(host=A)
    source = cloud.create_volume(host=A)
    write(cloud, source, A, DATA)
    snapshot = cloud.snapshot(source)
    copy = cloud.create_volume(2, snapshot_id=snapshot.id)
    assert images(services, copy) == []
    for one in (blank, copy):
        cloud.migrate(one, B)
        assert images(services, one) == []
    cloud.delete_snapshot(snapshot)  # the copy does not need it any more
    assert read(cloud, copy, B, len(DATA) + 1) == DATA + b"\0"
    assert read(cloud, blank, B, 4096) == bytes(4096)
    assert snapshots(services, copy.id) == snapshots(services, source.id) == []
    for one in (blank, copy, source):
        cloud.delete_volume(one)


def test_an_attached_volume_stays(services: Services, cloud: Cloud) -> None:
    """Cinder would have Nova copy it; here Nova cannot be asked."""
    volume = cloud.create_volume(host=A)
    with attached(cloud, volume, A) as here:
        put(here.device, DATA)
        with pytest.raises(AssertionError):
            cloud.migrate(volume, B)
        assert got(here.device, len(DATA)) == DATA
    assert cloud.host_of(volume) == A
    assert images(services, volume) == [A]
    assert read(cloud, volume, A, len(DATA)) == DATA
    cloud.delete_volume(volume)


def test_a_volume_is_copied_to_another_driver_and_back(services: Services, plain: Cloud) -> None:
    kind = plain.api.volume_types.create(f"any-{uuid.uuid4()}")  # of no driver in particular
    volume = plain.create_volume(host=A, volume_type=kind.name)
    write(plain, volume, A, DATA)
    plain.migrate(volume, PLAIN)
    assert read(plain, volume, PLAIN, len(DATA) + 1) == DATA + b"\0"
    wait_for("a has it no more", lambda: images(services, volume) == [], plain.region.complaints)
    plain.migrate(volume, A)
    assert read(plain, volume, A, len(DATA) + 1) == DATA + b"\0"

    snapshot = plain.snapshot(volume)
    write(plain, volume, A, b"later")
    plain.revert(volume, snapshot)
    assert read(plain, volume, A, 8) == DATA[:8]
    plain.delete_snapshot(snapshot)
    _taken_over_is_kept(services, plain, volume)
    assert read(plain, volume, B, len(DATA)) == DATA
    plain.delete_volume(volume)


def _taken_over_is_kept(services: Services, plain: Cloud, volume: Any) -> None:
    """Of a copied volume a deleted row tells the host that it came from; B must not take it for gone."""
    plain.migrate(volume, B)
    plain.api.volumes.extend(volume, 2)
    plain.await_volume(volume, "available")
    name = getattr(plain.api.volumes.get(volume.id), "os-vol-mig-status-attr:name_id")
    assert name != volume.id
    root = services.account.home / "region-one"
    wait_for("a forgets it", lambda: not (root / A / "volumes" / name).exists(), plain.region.complaints)
    until = time.monotonic() + _FORGETTING
    while time.monotonic() < until:
        assert (root / B / "volumes" / name).exists()
        time.sleep(0.5)


def test_a_retype_does_not_move_data(services: Services, plain: Cloud) -> None:
    kind = plain.api.volume_types.create(f"plain-{uuid.uuid4()}")
    kind.set_keys({"volume_backend_name": PLAIN})
    volume = plain.create_volume(host=A)
    write(plain, volume, A, DATA)
    before = len(said(services, A))
    plain.api.volumes.retype(volume, kind.name, "on-demand")

    def ended() -> bool:
        return "a retype cannot move data: migrate the volume first" in said(services, A)[before:]

    wait_for("the retype is refused", ended, plain.region.complaints)
    plain.await_volume(volume, "available")
    assert plain.host_of(volume) == A
    assert read(plain, volume, A, len(DATA)) == DATA
    plain.delete_volume(volume)


def test_a_volume_from_a_snapshot_of_another_host_is_made_at_once(services: Services, cloud: Cloud) -> None:
    source = cloud.create_volume(host=A)
    write(cloud, source, A, DATA)
    snapshot = cloud.snapshot(source)
    api = services.region().service("api")
    services.region().configure("control", {}, {"snapshot_same_host": False})
    api.stop()
    api.start()
    cloud.await_api()
    try:
        hint = {"query": f'["=", "$host", "{cloud.pool(B)}"]'}
        made = cloud.create_volume(snapshot_id=snapshot.id, scheduler_hints=hint)
    finally:
        services.region().configure("control", {})
        api.stop()
        api.start()
        cloud.await_api()
    assert cloud.host_of(made) == B
    assert images(services, made) == [B]
    cloud.delete_snapshot(snapshot)
    assert read(cloud, made, B, len(DATA)) == DATA
    for one in (made, source):
        cloud.delete_volume(one)
