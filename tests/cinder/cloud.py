"""What tests do to a region through its public API, with python-cinderclient, and waiting for it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cinder.programs import PATIENCE, wait_for
from tests.cinder.region import BACKEND, PROJECT, Region

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports modules that Python 3.13 has no more
    from cinderclient import client as cinderclient
    from cinderclient import exceptions
    from cinderclient.contrib.noauth import CinderNoAuthPlugin
    from keystoneauth1.session import Session

NotFound = exceptions.NotFound


class Cloud:
    """The verbs of one project of a region. `api` is the whole client; things are its resources.

    Verbs wait until the thing is as it should be; one that ends in an error fails the test, with the user's
    messages and the services' last errors. `wait=False` returns at once. Sizes are in GiB.
    """

    def __init__(
        self, region: Region, project: str = PROJECT, version: str = "3.70", endpoint: str = ""
    ) -> None:
        self.region = region
        self.project = project
        plugin = CinderNoAuthPlugin("admin", project, None, endpoint or region.endpoint)
        self.api = cinderclient.Client(version, session=Session(auth=plugin, timeout=PATIENCE))

    # -- the services

    def await_api(self) -> None:
        """Return when the API answers; make our volume type if it is not there."""

        def answers() -> bool:
            with contextlib.suppress(Exception):  # any of requests' and the client's
                self.api.services.list()
                return True
            return False

        wait_for("the API answers", answers, self.region.complaints)
        if BACKEND not in [kind.name for kind in self.api.volume_types.list()]:
            kind = self.api.volume_types.create(BACKEND)
            kind.set_keys({"volume_backend_name": BACKEND})

    def await_host(self, host: str) -> None:
        """Return when the volume service of a host can be given work."""
        wait_for(f"{host} is a pool", lambda: self.has_pool(host), self.region.complaints)

    def has_pool(self, host: str) -> bool:
        return any(pool.name.startswith(f"{host}@") for pool in self.api.pools.list())

    def service_state(self, binary: str, host: str) -> str:
        """ "up" or "down", by the heartbeat, of for instance cinder-volume at hosta@island."""
        found = [one.state for one in self.api.services.list(host=host, binary=binary)]
        return found[0] if found else "unknown"

    def await_service(self, binary: str, host: str, state: str) -> None:
        what = f"{binary} of {host} is {state}"
        wait_for(what, lambda: self.service_state(binary, host) == state, self.region.complaints)

    def heartbeat(self, binary: str, host: str) -> str:
        """When the service was last heard of."""
        [found] = self.api.services.list(host=host, binary=binary)
        return str(found.updated_at)

    # -- volumes

    def create_volume(self, size: int = 1, host: str = "hosta", wait: bool = True, **more: Any) -> Any:
        """A volume on `host`; one made from something takes snapshot_id, source_volid or imageRef."""
        if not {"snapshot_id", "source_volid"} & set(more):  # those stay where their source is
            hint = {"query": f'["=", "$host", "{self.pool(host)}"]'}
            more["scheduler_hints"] = {**hint, **more.get("scheduler_hints", {})}
        made = self.api.volumes.create(size, **{"volume_type": BACKEND, **more})
        return self.await_volume(made, "available") if wait else made

    def pool(self, host: str) -> str:
        """The whole name of a host's one pool: HOST@BACKEND#POOL."""
        [found] = [pool.name for pool in self.api.pools.list() if pool.name.startswith(f"{host}@")]
        return str(found)

    def host_of(self, volume: Any) -> str:
        """The host that holds a volume."""
        found = self.api.volumes.get(volume.id)
        return str(getattr(found, "os-vol-host-attr:host")).partition("@")[0]

    def delete_volume(self, volume: Any, wait: bool = True, cascade: bool = False) -> None:
        self.api.volumes.delete(volume, cascade=cascade)
        if wait:
            self.await_gone(self.api.volumes.get, volume)

    def extend(self, volume: Any, size: int) -> Any:
        was = self.api.volumes.get(volume.id).status
        self.api.volumes.extend(volume, size)
        return self.await_volume(volume, was)

    def revert(self, volume: Any, snapshot: Any) -> Any:
        self.api.volumes.revert_to_snapshot(volume, snapshot)
        return self.await_volume(volume, "available")

    def manage_volume(self, ref: dict[str, str], host: str = "hosta", wait: bool = True, **more: Any) -> Any:
        made = self.api.volumes.manage(self.pool(host), ref, **{"volume_type": BACKEND, **more})
        return self.await_volume(made, "available") if wait else made

    def unmanage_volume(self, volume: Any) -> None:
        self.api.volumes.unmanage(volume)
        self.await_gone(self.api.volumes.get, volume)

    def migrate(self, volume: Any, host: str) -> Any:
        """Move a volume to another host; fails if it is not there in the end."""
        target = self.pool(host)
        self.api.volumes.migrate_volume(volume, target, False, False)

        def ended() -> bool:
            return self.api.volumes.get(volume.id).migration_status in ("success", "error")

        wait_for(f"{volume.id} is at {target}", ended, lambda: self.why(volume))
        moved = self.api.volumes.get(volume.id)
        assert moved.migration_status == "success", self.why(volume)
        return moved

    # -- snapshots

    def snapshot(self, volume: Any, wait: bool = True, **more: Any) -> Any:
        """A snapshot, whether the volume is attached or not."""
        made = self.api.volume_snapshots.create(volume.id, force=True, **more)
        return self.await_snapshot(made, "available") if wait else made

    def delete_snapshot(self, snapshot: Any, wait: bool = True) -> None:
        self.api.volume_snapshots.delete(snapshot)
        if wait:
            self.await_gone(self.api.volume_snapshots.get, snapshot)

    def manage_snapshot(self, volume: Any, ref: dict[str, str], wait: bool = True, **more: Any) -> Any:
        made = self.api.volume_snapshots.manage(volume.id, ref, **more)
        return self.await_snapshot(made, "available") if wait else made

    def unmanage_snapshot(self, snapshot: Any) -> None:
        self.api.volume_snapshots.unmanage(snapshot)
        self.await_gone(self.api.volume_snapshots.get, snapshot)

    # -- attachments

    def connector(self, host: str = "hosta") -> dict[str, Any]:
        """What Nova on this host says about itself."""
        return {
            "host": host,
            "ip": "127.0.0.1",
            "platform": "x86_64",
            "os_type": "linux",
            "multipath": False,
            "nqn": None,
            "mountpoint": "/dev/vdb",
        }

    def attach(self, volume: Any, connector: dict[str, Any] | None = None) -> Attached:
        """As Nova does: reserve, connect, complete. Errors of the connection are cinderclient's."""
        reserved = self.api.attachments.create(volume.id, None)
        attachment = str(reserved["id"])
        connected = self.api.attachments.update(attachment, connector or self.connector())
        self.api.attachments.complete(attachment)
        self.await_volume(volume, "in-use")
        return Attached(attachment, connected.connection_info)

    def detach(self, attached: Attached, volume: Any | None = None, status: str = "available") -> None:
        self.api.attachments.delete(attached.attachment)
        if volume is not None:
            self.await_volume(volume, status)

    # -- images and backups

    def upload(self, volume: Any, name: str = "image", disk_format: str = "raw") -> str:
        """Make an image of a volume; its id in Glance."""
        was = self.api.volumes.get(volume.id).status
        more = {"visibility": "public", "protected": False}
        made = self.api.volumes.upload_to_image(volume, True, name, "bare", disk_format, **more)
        self.await_volume(volume, was)
        return str(made[1]["os-volume_upload_image"]["image_id"])

    def from_image(self, image: str, size: int = 1, **more: Any) -> Any:
        return self.create_volume(size, imageRef=image, **more)

    def backup(self, volume: Any, wait: bool = True, **more: Any) -> Any:
        made = self.api.backups.create(volume.id, force=True, **more)
        return self.await_status(self.api.backups.get, made, "available") if wait else made

    def restore_backup(self, backup: Any, volume: Any | None = None) -> Any:
        """Restore onto a volume, or onto a new one; the volume."""
        target = None if volume is None else volume.id
        made = self.api.restores.restore(backup.id, volume_id=target)
        self.await_status(self.api.backups.get, backup, "available")
        return self.await_volume(self.api.volumes.get(made.volume_id), "available")

    def delete_backup(self, backup: Any) -> None:
        self.api.backups.delete(backup)
        self.await_gone(self.api.backups.get, backup)

    # -- waiting

    def await_volume(self, volume: Any, status: str) -> Any:
        return self.await_status(self.api.volumes.get, volume, status)

    def await_snapshot(self, snapshot: Any, status: str) -> Any:
        return self.await_status(self.api.volume_snapshots.get, snapshot, status)

    def await_status(self, get: Callable[[str], Any], thing: Any, status: str) -> Any:
        """The thing when it has this status; fails when it comes to rest with another, or never does."""

        def at_rest() -> bool:
            return (now := get(thing.id).status) == status or now.startswith("error")

        wait_for(
            f"{thing.id} is {status}", at_rest, lambda: f"it is {get(thing.id).status}\n{self.why(thing)}"
        )
        found = get(thing.id)
        assert found.status == status, f"{thing.id} is {found.status}, not {status}\n{self.why(thing)}"
        return found

    def await_gone(self, get: Callable[[str], Any], thing: Any) -> None:
        """Return when it is deleted; fails when it comes to rest with another status."""

        def gone() -> bool:
            try:
                now = get(thing.id)
            except NotFound:
                return True
            assert not now.status.startswith("error"), f"{thing.id} is {now.status}\n{self.why(thing)}"
            return False

        wait_for(f"{thing.id} is gone", gone, lambda: self.why(thing))

    def messages(self, thing: Any) -> list[str]:
        """What Cinder tells the user about a thing."""
        return [one.user_message for one in self.api.messages.list() if one.resource_uuid == thing.id]

    def why(self, thing: Any) -> str:
        return f"messages: {self.messages(thing)}\n{self.region.complaints()}"


class Attached:
    """An attachment and where its device is."""

    def __init__(self, attachment: str, connection: dict[str, Any]) -> None:
        self.attachment = attachment
        self.connection = connection

    @property
    def device(self) -> Path:
        return Path(self.connection["device_path"])
