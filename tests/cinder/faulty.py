"""A host of its own for the tests of faults: killed, cut off from Swift, started again."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from island_fast.cinder.island_command import IslandCommand
from tests.cinder.cloud import Attached, Cloud
from tests.cinder.disks import run
from tests.cinder.programs import Program, free_ports, wait_for
from tests.cinder.services import BACKEND, Services
from tests.support.swift_faults import Fault

ALWAYS = 1 << 30  # times that a fault happens

__all__ = ["ALWAYS", "Disk", "FaultyHost"]


@dataclass
class Disk:
    """A volume in use."""

    volume: Any
    attached: Attached

    @property
    def id(self) -> str:
        return str(self.volume.id)

    @property
    def device(self) -> Path:
        return self.attached.device


class FaultyHost:
    """One host of region one, its folders looked into from outside, its programs stopped at will."""

    def __init__(self, services: Services, name: str, **options: object) -> None:
        self.name = name
        self.services = services
        self.account = services.account
        self.backend = services.island(host=name, **options)
        self.cloud = services.run(host=name, backend=self.backend)
        self.service: Program = services.region().service(f"volume-{name}")
        self.swift = services.swift()
        self.run = Path(str(self.backend["island_run_dir"])) / BACKEND
        self.links = self.run / "devices"

    # -- doing

    def volume(self, size: int = 1, **more: Any) -> Any:
        return self.cloud.create_volume(size, host=self.name, **more)

    def disk(self, **more: Any) -> Disk:
        """A new volume, attached."""
        volume = self.volume(**more)
        return Disk(volume, self.cloud.attach(volume, self.connector))

    def detach(self, disk: Disk) -> None:
        self.cloud.detach(disk.attached, disk.volume)

    def attach(self, disk: Disk) -> None:
        """Attach it again."""
        disk.attached = self.cloud.attach(disk.volume, self.connector)

    def reserve(self, volume: Any) -> str:
        """An attachment to be, as Nova makes it first."""
        return str(self.cloud.api.attachments.create(volume.id, None)["id"])

    def connect(self, attachment: str, cloud: Cloud | None = None) -> Attached:
        """Ask for the device of an attachment to be."""
        asked = (cloud or self.cloud).api.attachments
        return Attached(attachment, asked.update(attachment, self.connector).connection_info)

    @property
    def connector(self) -> dict[str, Any]:
        return self.cloud.connector(self.name)

    def start(self) -> None:
        self.services.start_volume(host=self.name)
        self.cloud.await_host(self.name)

    @contextlib.contextmanager
    def holding(self, paths: Mapping[str, str]) -> Iterator[None]:
        """Swift lets requests of these methods with such paths wait until the end."""
        self.swift.calm()
        self.swift.inject(*(Fault("hold", 0, *which, times=ALWAYS) for which in paths.items()))
        try:
            yield
        finally:
            self.swift.calm()

    def await_request(self, method: str, path: str) -> None:
        """Return when Swift was asked so since faults were set last."""

        def asked() -> bool:
            return any(
                one["method"] == method and re.search(path, one["path"]) for one in self.swift.list_requests()
            )

        wait_for(f"{method} {path}", asked, self.service.complaints)

    def await_word(self, text: str, after: int) -> None:
        """Return when the service has said so, in its log after this many characters."""
        self.services.region().await_line(f"volume-{self.name}", text, after)

    def slow_api(self, timeout: int) -> Cloud:
        """A second API of the region, which waits so many seconds for an answer of a service."""
        region = self.services.region()
        [port] = free_ports(1)
        options = {"osapi_volume_listen_port": port, "rpc_response_timeout": timeout}
        region.configure("impatient", {}, options)
        region.service("api-impatient").start()
        cloud = Cloud(region, endpoint=f"http://127.0.0.1:{port}/v3")
        cloud.await_api()
        return cloud

    # -- looking

    def folder(self, volume: Any) -> Path:
        return Path(str(self.backend["island_volumes_dir"])) / volume.id

    def image(self, volume: Any) -> Path:
        return self.folder(volume) / "image.qcow2"

    def daemon(self, volume: Any) -> int:
        return int((self.run / "daemons" / volume.id / "pid").read_text())

    def pins(self, volume: Any) -> list[str]:
        """The internal snapshots of the volume's image."""
        return [
            line.split()[1]
            for line in run("qemu-img", "snapshot", "-l", "-U", self.image(volume)).splitlines()[2:]
        ]

    def commands(self, verb: str, about: object) -> list[int]:
        """The processes of `island VERB` that have this in their arguments."""
        return [
            pid
            for pid, words in _islands(self.account.ids[0])
            if words[words.index("island_fast") + 1 :][:1] == [verb]
            and any(str(about) in one for one in words)
        ]

    def stored(self, volume: Any) -> dict[str, str]:
        """The snapshots of the volume's lineage that are in the repository, by id, with their labels."""
        environment = self.swift.environment() | {"ISLAND_STATE": str(self.account.home / "looking")}
        island = IslandCommand(str(self.backend["island_repository"]), environment)
        return {row["snapshot"]: row["label"] for row in island.list_snapshots(volume.id)}

    # -- killing

    def kill_all(self, pids: list[int]) -> None:
        """End processes at once, before they can do anything more."""
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_for(f"{pids} are gone", lambda: not any(_runs(pid) for pid in pids), str)

    def kill_with(self, commands: list[int]) -> None:
        """End the service and these commands of its, as when the machine's memory is out."""
        assert commands
        for pid in commands:
            os.kill(pid, signal.SIGSTOP)  # the service's end asks them to end in an orderly way
        self.service.kill()
        self.kill_all(commands)


def _islands(user: int) -> Iterator[tuple[int, list[str]]]:
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == user:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if "island_fast" in words:
                    yield int(entry.name), words


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
