"""All services that the tests of the Cinder driver walk through, and the configurations they run with."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Self

from tests.cinder.account import Account
from tests.cinder.cloud import Cloud
from tests.cinder.images import Glance
from tests.cinder.programs import PATIENCE, wait_for
from tests.cinder.rabbit import Rabbit
from tests.cinder.region import BACKEND, Region, Sections
from tests.support.swift_server import SwiftServer

REGIONS = ("one", "two")
DRIVER = "island_fast.driver.IslandDriver"
_READY = "Driver post RPC initialization completed successfully"
_FAILED = "Failed to initialize driver"

__all__ = ["BACKEND", "DRIVER", "REGIONS", "Services"]


class Services:
    """Everything, each part started by the first test that needs it, and ended with this context.

    Needs root: services run as a user of their own. A region is one Cinder and one Swift, or what
    `make_swift` makes instead; both regions share RabbitMQ (not its queues) and Glance.
    """

    def __init__(
        self, make_swift: Callable[[], SwiftServer] = SwiftServer, *, native_threads: bool = False
    ) -> None:
        self._make_swift = make_swift
        self.account = Account(native_threads=native_threads)
        self._stack = ExitStack()
        self._regions: dict[str, Region] = {}
        self._swifts: dict[str, SwiftServer] = {}
        self._containers: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._stack.enter_context(self.account)
        try:
            self._rabbit = Rabbit(self.account.home / "rabbit", REGIONS)
            self._stack.callback(self._rabbit.stop)
            self._rabbit.start()
            self._glance = Glance(self.account.home / "glance")
            self._stack.callback(self._glance.stop)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- the parts

    @property
    def glance(self) -> Glance:
        if not self._glance.folder.exists():
            self._glance.start()
            self._glance.await_start()
        return self._glance

    def swift(self, region: str = "one") -> SwiftServer:
        """The region's Swift, with the container of its repository."""
        if region not in self._swifts:
            self._swifts[region] = self._stack.enter_context(self._make_swift())
            self._containers[region] = f"box-{secrets.token_hex(4)}"
            self._swifts[region].create_container(self._containers[region])
        return self._swifts[region]

    def region(self, name: str = "one") -> Region:
        """A region's Cinder, its API and scheduler running."""
        if name not in self._regions:
            region = Region(name, self.account, self._rabbit, self._glance)
            self._stack.callback(region.stop)
            region.prepare()
            self._rabbit.await_start()
            self._regions[name] = region
            for kind in ("scheduler", "api"):
                region.service(kind).start()
        return self._regions[name]

    def complaints(self) -> str:
        """The last errors of the services of all regions."""
        return "\n".join(region.complaints() for region in self._regions.values())

    # -- hosts

    def island(self, region: str = "one", host: str = "hosta", **changed: object) -> dict[str, object]:
        """The section of our driver for a host: its folders, the region's Swift; `changed` goes over it."""
        swift = self.swift(region)
        options: dict[str, object] = {
            "volume_driver": DRIVER,
            "island_repository": f"swift://{self._containers[region]}/repository",
            "island_volumes_dir": self.account.folder(f"region-{region}/{host}/volumes"),
            "island_state_dir": self.account.folder(f"region-{region}/{host}/island"),
            "island_run_dir": self.region(region).run_folder(host),
            **_v1(swift),
        }
        return options | changed

    def plain(self, region: str, host: str) -> dict[str, object]:
        """The section of the driver of raw files for a host."""
        folder = self.account.folder(f"region-{region}/{host}/plain")
        return {"volume_driver": "plain_driver.PlainDriver", "plain_dir": folder}

    def run(
        self,
        region: str = "one",
        host: str = "hosta",
        backend: Mapping[str, object] | None = None,
        defaults: Mapping[str, object] | None = None,
        more: Sections | None = None,
    ) -> Cloud:
        """A cloud whose `host` holds volumes, configured so; its volume service starts anew if that changed.

        `backend` is the driver's section, by default `island()`; `defaults` go over [DEFAULT] and `more` are
        sections.
        """
        where = self.region(region)
        backend = self.island(region, host) if backend is None else backend
        changed = where.configure(host, backend, defaults, more)
        volume = where.service(f"volume-{host}")
        if changed:
            volume.stop()
        cloud = Cloud(where)
        if not volume.running:
            self.start_volume(region, host)
        cloud.await_api()
        cloud.await_host(host)
        return cloud

    def start_volume(self, region: str = "one", host: str = "hosta") -> None:
        """Start a host's volume service, and return when its driver is ready; fails if it refuses."""
        volume = self.region(region).service(f"volume-{host}")
        before = len(volume.text())
        volume.start()

        def ready() -> bool:
            said = volume.text()[before:]
            assert volume.running, volume.complaints()
            assert _FAILED not in said, volume.complaints()
            return _READY in said

        wait_for(
            f"the driver of {host} is ready", ready, volume.complaints, 2 * PATIENCE
        )  # it measures first

    def start_backup(self, region: str = "one", host: str = "hosta") -> None:
        """Start a host's backup service if it does not run, and return when it can be given work."""
        where = self.region(region)
        program = where.service(f"backup-{host}")
        if not program.running:
            before = len(program.text())
            program.start()
            where.await_line(f"backup-{host}", "Cleaning up incomplete backup operations", before)
        Cloud(where).await_service("cinder-backup", host, "up")


def _v1(swift: SwiftServer) -> dict[str, object]:
    """How to sign in to a Swift, in keystoneauth's options."""
    known = swift.environment()
    sign_in = {"auth_url": "ST_AUTH", "username": "ST_USER", "password": "ST_KEY"}
    return {"auth_type": "v1password", **{option: known[name] for option, name in sign_in.items()}}
