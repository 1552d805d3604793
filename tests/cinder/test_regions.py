"""Snapshots that were taken in one region, and become volumes in another that shares nothing with it."""

from __future__ import annotations

import urllib.parse
import urllib.request
from typing import Any

import pytest

from tests.cinder.cloud import Cloud
from tests.cinder.content import MIB, attached, got, put, read, snapshots, write
from tests.cinder.services import Services
from tests.support.swift_server import SwiftServer

ORIGIN, HOST = "origin", "elsewhere"
COPY = "copied"
DATA = bytes(range(256)) * 4096  # 1 MiB


class Regions:
    """Two volumes' snapshots in region one, whose services that write are stopped since; and region two.

    Region two reads region one's repository as "one", and what was copied of it to its own Swift as "copied".
    `state` is what was in region one's repository when its last snapshot had been taken.
    """

    def __init__(self, services: Services) -> None:
        self.services = services
        one = services.run("one", ORIGIN)
        volume = one.create_volume(host=ORIGIN)
        write(one, volume, ORIGIN, DATA)
        self.lineage = volume.id
        self.labels = [one.snapshot(volume).id]
        write(one, volume, ORIGIN, b"later", MIB)
        self.labels.append(one.snapshot(volume).id)
        self.first, self.second = (
            f"{self.lineage}@{row['snapshot']}" for row in snapshots(services, self.lineage)
        )
        services.region("one").service(f"volume-{ORIGIN}").stop()
        self.state = objects(services.swift("one"), self._place("one")[0])

        services.swift("two").create_container(COPY)
        there = services.island("one", ORIGIN)
        keys = ("island_repository", "auth_type", "auth_url", "username", "password")
        others = {"one": {key: there[key] for key in keys}}
        mine = services.island("two", HOST)
        others[COPY] = {key: mine[key] for key in keys}
        others[COPY]["island_repository"] = f"swift://{COPY}/{self._place('one')[1]}"
        backend = {**mine, "island_other_repositories": f"one,{COPY}"}
        self.cloud = services.run("two", HOST, backend, more=others)

    def _place(self, region: str) -> list[str]:
        """Container and prefix of the region's repository."""
        url = str(self.services.island(region, ORIGIN)["island_repository"])
        return url.removeprefix("swift://").split("/", 1)

    def copy(self) -> None:
        """Copy region one's repository to region two's Swift, as container sync does."""
        container, _ = self._place("one")
        for name in objects(self.services.swift("one"), container):
            body = request(self.services.swift("one"), "GET", f"{container}/{name}")
            request(self.services.swift("two"), "PUT", f"{COPY}/{name}", body)

    def manage(self, name: str, repository: str = "one", wait: bool = True) -> Any:
        return self.cloud.manage_volume(reference(name, repository), host=HOST, wait=wait)


def reference(name: str, repository: str) -> dict[str, str]:
    return {"source-name": name, "repository": repository}


def request(swift: SwiftServer, method: str, path: str, body: bytes | None = None) -> bytes:
    """What Swift answers in the test user's account."""
    url, token = swift.sign_in()
    asked = urllib.request.Request(f"{url}/{path}", body, {"X-Auth-Token": token}, method=method)
    with urllib.request.urlopen(asked, timeout=60) as answer:
        found: bytes = answer.read()
    return found


def objects(swift: SwiftServer, container: str) -> list[str]:
    """The names in a container, as they go into a URL."""
    return [urllib.parse.quote(name) for name in request(swift, "GET", container).decode().split()]


@pytest.fixture(scope="module")
def regions(services: Services) -> Regions:
    return Regions(services)


@pytest.fixture
def untouched(services: Services, regions: Regions) -> Any:
    """Checks in the end that nothing was written to region one's Swift."""
    swift = services.swift("one")
    swift.calm()
    yield
    assert [asked for asked in swift.list_requests() if asked["method"] not in ("GET", "HEAD")] == []
    assert swift.count("GET", regions.lineage) > 0


def test_a_snapshot_becomes_a_volume(services: Services, regions: Regions, untouched: None) -> None:
    cloud = regions.cloud
    volume = regions.manage(regions.second)
    assert volume.size == 1
    with attached(cloud, volume, HOST) as here:
        assert got(here.device, MIB) == DATA
        assert got(here.device, 6, MIB) == b"later\0"
        put(here.device, b"in two", 2 * MIB)
    mine = cloud.snapshot(volume)
    assert [row["label"] for row in snapshots(services, volume.id, "two")] == [mine.id]
    write(cloud, volume, HOST, b"spoilt")
    cloud.revert(volume, mine)
    assert read(cloud, volume, HOST, 6) == DATA[:6]
    cloud.delete_snapshot(mine)
    cloud.delete_volume(volume)
    assert labels(services, regions) == regions.labels


def labels(services: Services, regions: Regions) -> list[str]:
    """The labels of the snapshots that region one has."""
    return [row["label"] for row in snapshots(services, regions.lineage, "one")]


def test_a_managed_snapshot_makes_volumes_and_is_only_forgotten(
    services: Services, regions: Regions, untouched: None
) -> None:
    cloud = regions.cloud
    under = cloud.create_volume(host=HOST)  # Cinder wants a volume for each snapshot
    managed = [
        cloud.manage_snapshot(under, reference(name, "one")) for name in (regions.first, regions.second)
    ]
    made = [cloud.create_volume(2, snapshot_id=one.id) for one in managed]
    cloud.delete_snapshot(managed[0])
    cloud.unmanage_snapshot(managed[1])
    assert read(cloud, made[0], HOST, MIB + 5) == DATA + bytes(5)
    assert read(cloud, made[1], HOST, MIB + 5) == DATA + b"later"
    for one in (*made, under):
        cloud.delete_volume(one)
    assert labels(services, regions) == regions.labels


@pytest.mark.parametrize(
    ("name", "repository", "told"),
    [
        ("{lineage}@123", "one", "does not name a snapshot"),
        ("../../{lineage}@{id}", "one", "does not name a snapshot"),
        ("a/b@{id}", "one", "does not name a snapshot"),
        ("{lineage}@{id}", "../one", "does not name a snapshot"),
        ("{lineage}@{id}", "nowhere", "no repository 'nowhere' is configured"),
        ("{lineage}@" + "0" * 32, "one", "there is no snapshot"),
        ("nothing@{id}", "one", "has no snapshots"),
        ("{lineage}@{id}", "", "has no snapshots"),  # it is not in region two's own
        ("../volumes", "", "there is no volume or qcow2 file"),
    ],
)
def test_bad_references_are_refused(
    services: Services, regions: Regions, name: str, repository: str, told: str
) -> None:
    cloud, snapshot = regions.cloud, regions.second.partition("@")[2]
    name = name.format(lineage=regions.lineage, id=snapshot)
    log = services.region("two").service(f"volume-{HOST}")
    before = len(log.text())
    ref = reference(name, repository) if repository else {"source-name": name}
    volume = cloud.manage_volume(ref, host=HOST, wait=False)
    # Cinder shows "error_managing" as "error".
    with pytest.raises(AssertionError, match="is error, not available"):
        cloud.await_volume(volume, "available")
    assert told in log.text()[before:]
    cloud.delete_volume(volume)


def test_a_copied_snapshot_needs_nothing_of_the_region_it_was_taken_in(
    services: Services, regions: Regions
) -> None:
    regions.copy()
    swift = services.swift("one")
    swift.stop_server("proxy")
    try:
        volume = regions.manage(regions.second, COPY)
        assert read(regions.cloud, volume, HOST, MIB + 5) == DATA + b"later"
        regions.cloud.delete_volume(volume)
    finally:
        swift.restart_server("proxy")
    container, _ = regions._place("one")
    assert objects(swift, container) == regions.state
    assert objects(services.swift("two"), COPY) == regions.state


def test_no_secret_is_told(services: Services, regions: Regions) -> None:
    assert services.swift("two").key not in services.region("two").service(f"volume-{HOST}").text()


def test_region_one_goes_on(services: Services, regions: Regions) -> None:
    one: Cloud = services.run("one", ORIGIN)
    volume = one.api.volumes.get(regions.lineage)
    write(one, volume, ORIGIN, b"on", 3 * MIB)
    third = one.snapshot(volume)
    assert labels(services, regions) == [*regions.labels, third.id]
    assert read(one, volume, ORIGIN, MIB + 5) == DATA + b"later"
    one.delete_volume(volume, cascade=True)
    assert labels(services, regions) == []
