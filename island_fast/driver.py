"""The Cinder driver: volumes as qcow2 files on the compute host's own disks, their snapshots in Swift.

Thin: options, names, and Cinder's exceptions. What a volume goes through is in `volumes`; what takes long
runs as a process of its own there. A volume is known to `volumes` by its `name_id`.

Cinder keeps, so that another host can go on where this one is lost: of a volume `provider_id`, its lineage,
from its first snapshot on, and `provider_location`, "made" once it has an image, else "from:ORIGIN" or
"passing:ORIGIN" where it is to come from; of a snapshot `provider_id`, such an ORIGIN.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cinder import context as cinder_context
from cinder import exception, interface, objects
from cinder.common import constants
from cinder.image import image_utils
from cinder.volume import driver, volume_utils
from oslo_concurrency import lockutils, processutils
from oslo_config import cfg
from oslo_log import log as logging
from oslo_service import loopingcall
from oslo_utils import units

from island_fast import __version__
from island_fast.cinder.attach.exports import Exports
from island_fast.cinder.attach.selftest import choose_kind
from island_fast.cinder.database import hosts_of, names_awaiting
from island_fast.cinder.errors import referenced, translated
from island_fast.cinder.manage import Manageable
from island_fast.cinder.options import STORE_OPTIONS, VOLUME_OPTIONS, repositories
from island_fast.cinder.records import Origin, Record, Records
from island_fast.cinder.upkeep import Tending
from island_fast.cinder.volumes import Volumes
from island_fast.errors import NotFoundError, RefusedError
from island_fast.qemu.programs import ProgramResult, error_text

__all__ = ["IslandDriver"]

LOG = logging.getLogger(__name__)
CONF = cfg.CONF

_MADE = "made"
_TEND_EVERY = 5.0  # seconds
_ROOTWRAP_REFUSES = range(96, 100)  # exit statuses: no such program, bad configuration, no command, no filter
_FORGET_EVERY = 10.0  # seconds


@interface.volumedriver
class IslandDriver(driver.VolumeDriver):  # type: ignore[misc]
    """Local qcow2 volumes with incremental snapshots in Swift."""

    VERSION = __version__
    SUPPORTS_ACTIVE_ACTIVE = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.configuration.append_config_values([*VOLUME_OPTIONS, *STORE_OPTIONS])
        self._volumes: Volumes
        self._manageable: Manageable
        self._loops: list[loopingcall.FixedIntervalLoopingCall] = []

    @staticmethod
    def get_driver_options() -> list[cfg.Opt]:
        """The options that the driver adds to its section."""
        return [*VOLUME_OPTIONS, *STORE_OPTIONS]

    # Setting up.

    def do_setup(self, context: Any) -> None:
        """Read the options."""
        options = self.configuration
        with translated():
            self._repositories = repositories(options)
        self._folder = Path(options.island_volumes_dir)
        self._run = Path(options.island_run_dir) / (options.config_group or "island")
        self._connectors = {
            *options.island_connector_hosts,
            *(socket.gethostname(), CONF.host, CONF.my_ip),
            *(name for name in (volume_utils.extract_host(self.host, "host"),) if name),
        }

    def check_for_setup_error(self) -> None:
        """Try the whole path from a block device to an image; VolumeDriverException says what is missing."""
        run, links = self._run / "daemons", self._run / "devices"
        with translated():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            kind = choose_kind(run, links, self._folder, self._programs)
            exports = Exports(run, links, self._programs, kind)
            exports.forget_stale_links()
            self._volumes = Volumes(
                Records(self._folder),
                exports,
                self._programs,
                self._repositories,
                lambda name: lockutils.lock(f"island-{name}"),
                lazy=self.configuration.island_lazy_images,
            )
            self._manageable = Manageable(self._volumes)
        LOG.info("volumes are attached by %s", kind)

    def set_initialized(self) -> None:
        """Start to look after volumes, and to sweep."""
        super().set_initialized()
        tending = Tending(self._volumes, self.configuration.island_free_space_reserve / 100)
        self._start(tending.look, _TEND_EVERY)
        self._start(tending.sweep, self.configuration.island_sweep_interval)
        self._start(self._forget_departed, _FORGET_EVERY)

    def _start(self, work: Any, interval: float) -> None:
        loop = loopingcall.FixedIntervalLoopingCall(work)
        loop.start(interval, initial_delay=min(interval, 30.0), stop_on_exception=False)
        self._loops.append(loop)

    def _programs(
        self, command: Sequence[str], /, *, root: bool = False, env: Mapping[str, str] | None = None
    ) -> ProgramResult:
        """Run a program as Cinder runs them, through rootwrap where it needs root's rights."""
        status = 0
        environment = {**os.environ, "LC_ALL": "C", **(env or {})}
        try:
            output, complaints = self._execute(*command, run_as_root=root, env_variables=environment)
        except processutils.ProcessExecutionError as error:
            if not isinstance(error.exit_code, int) or (root and error.exit_code in _ROOTWRAP_REFUSES):
                raise OSError(error_text(error.stderr or str(error))) from error
            status, output, complaints = error.exit_code, error.stdout, error.stderr
        return ProgramResult(list(command), status, output or "", complaints or "")

    # What is known of a volume.

    def _name(self, volume: Any) -> str:
        """The name of a volume that this host knows, or comes to know by what Cinder keeps of it."""
        name: str = volume.name_id
        kind, _, origin = (volume.provider_location or "").partition(":")
        source = Origin.parse(origin) if origin else None
        size = volume.size * units.Gi
        self._volumes.learn(name, Record(size, volume.provider_id, source, kind == "passing", kind == _MADE))
        return name

    def _kept(self, volume: str, record: Record | None = None) -> dict[str, str | None]:
        """What Cinder is to keep of a volume."""
        record = record or self._volumes.records.read(volume)
        location = None
        if record.made:
            location = _MADE
        elif record.origin:
            location = f"{'passing' if record.passing else 'from'}:{record.origin}"
        return {"provider_location": location, "provider_id": record.lineage}

    def _keep(self, volume: Any) -> None:
        """Have Cinder keep it now, where a call's answer cannot say so."""
        kept = self._kept(volume.name_id)
        if any(getattr(volume, key) != value for key, value in kept.items()):
            volume.update(kept)
            volume.save()

    # Volumes.

    def create_volume(self, volume: Any) -> dict[str, Any]:
        """Note a new volume; its image is made when it is first attached."""
        with translated(volume):
            _refuse_encrypted(volume)
            self._volumes.create(volume.name_id, Record(volume.size * units.Gi))
            return self._kept(volume.name_id)

    def delete_volume(self, volume: Any) -> None:
        """Remove a volume from this host; its lineage goes with its snapshots, by sweeps."""
        with translated(volume):
            self._volumes.delete(volume.name_id)

    def extend_volume(self, volume: Any, new_size: int) -> None:
        """Make a volume larger, attached or not."""
        with translated(volume):
            self._volumes.extend(self._name(volume), new_size * units.Gi)

    def create_volume_from_snapshot(self, volume: Any, snapshot: Any) -> dict[str, Any]:
        """Note where a new volume comes from; made at once if that snapshot cannot be guarded here."""
        with translated(volume):
            _refuse_encrypted(volume)
            origin = self._origin(snapshot)
            record = Record(volume.size * units.Gi, origin=origin)
            self._volumes.create(volume.name_id, record, at_once=not self._guarded(snapshot, origin))
            return self._kept(volume.name_id)

    def create_cloned_volume(self, volume: Any, src_vref: Any) -> dict[str, Any]:
        """Copy a volume as it is now, on this host."""
        with translated(volume):
            self._volumes.clone(self._name(src_vref), volume.name_id, volume.size * units.Gi)
            self._keep(src_vref)
            return self._kept(volume.name_id)

    # Attaching.

    def validate_connector(self, connector: Mapping[str, Any]) -> None:
        """Refuse a connector of another host: the volumes are on this one's disks."""
        theirs = {connector.get("host"), connector.get("ip")}
        if not theirs & self._connectors:
            raise exception.InvalidConnectorException(
                f"this volume is on host {volume_utils.extract_host(self.host, 'host')}, and host "
                f"{connector.get('host')} cannot attach it: run the server there (InstanceLocalityFilter "
                "helps) or create a volume from a snapshot; live migration and evacuation are not supported"
            )

    def ensure_export(self, context: Any, volume: Any) -> None:
        """Bring the device of an attached volume back, as after a restart of the host."""
        with translated(volume):
            self._volumes.attach(self._name(volume))

    def create_export(self, context: Any, volume: Any, connector: Mapping[str, Any]) -> dict[str, Any]:
        """Make the volume's image if need be, and its device."""
        with translated(volume):
            _refuse_retyping(volume)
            self._volumes.attach(self._name(volume))
            return self._kept(volume.name_id)

    def remove_export(self, context: Any, volume: Any) -> None:
        """Take the volume's device away."""
        with translated(volume):
            self._volumes.detach(volume.name_id)

    def initialize_connection(
        self, volume: Any, connector: Mapping[str, Any], initiator_data: Any = None
    ) -> dict[str, Any]:
        """The path of the volume's device, a link of its own."""
        with translated(volume):
            path = self._volumes.attach(self._name(volume))
        return {"driver_volume_type": "local", "data": {"device_path": str(path)}}

    def terminate_connection(self, volume: Any, connector: Mapping[str, Any] | None, **kwargs: Any) -> bool:
        """Whether another attachment still needs the device; it goes with the export."""
        admin = cinder_context.get_admin_context()
        attachments = objects.VolumeAttachmentList.get_all_by_volume_id(admin, volume.id)
        return sum(one.attach_status in ("attached", "attaching") for one in attachments) > 1

    # Snapshots.

    def _origin(self, snapshot: Any) -> Origin:
        if not snapshot.provider_id:
            raise NotFoundError(f"snapshot {snapshot.id} is in no repository: it was never finished")
        return Origin.parse(snapshot.provider_id)

    def _guarded(self, snapshot: Any, origin: Origin) -> bool:
        """Whether this very host would have to delete the snapshot, so that it can refuse."""
        here = volume_utils.extract_host(snapshot.volume.host) == volume_utils.extract_host(self.host)
        return here and self._is_ours(snapshot, origin)

    def _is_ours(self, snapshot: Any, origin: Origin) -> bool:
        """Whether the snapshot is of its volume's own lineage; any other was managed, and is only read."""
        return not origin.repository and origin.lineage == snapshot.volume.provider_id

    def create_snapshot(self, snapshot: Any) -> dict[str, Any]:
        """Take a snapshot of a volume, attached or not."""
        if snapshot.provider_id:
            return {"provider_id": snapshot.provider_id}
        with translated(snapshot):
            taken = self._volumes.snapshot(self._name(snapshot.volume), snapshot.id)
            self._keep(snapshot.volume)
            return {"provider_id": str(taken)}

    def delete_snapshot(self, snapshot: Any) -> None:
        """Delete a snapshot; one that was managed from elsewhere is only forgotten."""
        volume = snapshot.volume.name_id
        with translated(snapshot):
            if not snapshot.provider_id:
                self._volumes.forget_snapshot(volume, snapshot.id)
                return
            origin = self._origin(snapshot)
            if not self._is_ours(snapshot, origin):
                LOG.info("%s is forgotten, and stays where it is", origin, resource=snapshot)
                return
            if needing := self._needing(origin):
                raise exception.SnapshotIsBusy(
                    f"snapshot {snapshot.id} is needed by {', '.join(needing)}, whose image is made when "
                    "first attached: attach or delete them first"
                )
            self._volumes.delete_snapshot(volume, origin)

    def _needing(self, origin: Origin) -> list[str]:
        """The volumes that are yet to be made from a snapshot, those too that came from a lost host."""
        made = {name for name, record in self._volumes.records.sound() if record.made}
        return sorted({*self._volumes.needing(origin), *names_awaiting(f"from:{origin}") - made})

    def revert_to_snapshot(self, context: Any, volume: Any, snapshot: Any) -> None:
        """Give a volume the content of a snapshot of its own."""
        with translated(volume):
            origin = self._origin(snapshot)
            if not self._is_ours(snapshot, origin):
                raise RefusedError(f"{origin} was managed from elsewhere; create a volume from it")
            self._volumes.revert(volume.name_id, Record(volume.size * units.Gi, origin.lineage), origin)
            self._keep(volume)

    def snapshot_revert_use_temp_snapshot(self) -> bool:
        """No: the old image stays until the new one is whole."""
        return False

    # Images.

    def copy_volume_to_image(
        self, context: Any, volume: Any, image_service: Any, image_meta: Mapping[str, Any]
    ) -> None:
        """Upload a volume as it is now, attached or not."""
        kind = image_meta["disk_format"]
        with translated(volume), image_utils.temporary_file(prefix="island_upload_") as path:
            self._volumes.export(self._name(volume), Path(path), image_utils.fixup_disk_format(kind))
            self._keep(volume)
            volume_utils.upload_volume(
                context, image_service, image_meta, path, volume, volume_format=kind, run_as_root=False
            )

    # To other types and hosts.

    def retype(self, context: Any, volume: Any, new_type: Any, diff: Any, host: Any) -> tuple[bool, None]:
        """Accept another type on this host: no type asks for the data to be stored otherwise."""
        return True, None

    def migrate_volume(
        self, context: Any, volume: Any, host: Mapping[str, Any]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Move a detached volume to another host of the same repository, through it."""
        with translated(volume):
            _refuse_retyping(volume)
            if host["capabilities"].get("location_info") != self._location_info:
                return False, None
            if volume_utils.extract_host(host["host"]) == volume_utils.extract_host(self.host):
                return True, None
            name = self._name(volume)
            return True, self._kept(name, self._volumes.depart(name, f"passing-{volume.id}"))

    def update_migrated_volume(
        self, context: Any, volume: Any, new_volume: Any, original_volume_status: str
    ) -> dict[str, Any]:
        """Keep the name that the volume got when Cinder copied it here."""
        return {
            "_name_id": new_volume.name_id,
            "provider_location": new_volume.provider_location,
            "provider_id": new_volume.provider_id,
        }

    def _forget_departed(self) -> None:
        """Forget volumes that another host has taken over."""
        here = volume_utils.extract_host(self.host)
        for name, record in self._volumes.records.sound():
            if record.on_its_way:
                hosts = hosts_of(name)
                if hosts and here not in hosts:
                    self._volumes.records.remove(name)

    @property
    def _location_info(self) -> str:
        url = self._repositories[""].url
        return f"island:{url}" if "://" in url else f"island:{socket.gethostname()}:{url}"

    # Managing.

    def manage_existing_get_size(self, volume: Any, existing_ref: Mapping[str, str]) -> int:
        """The size of what is to be managed, in GiB, rounded up."""
        with referenced(existing_ref), translated(volume):
            return self._manageable.size(existing_ref)

    def manage_existing(self, volume: Any, existing_ref: Mapping[str, str]) -> dict[str, Any]:
        """Make a volume of an unmanaged one, a qcow2 file in the directory of volumes, or a snapshot."""
        with referenced(existing_ref), translated(volume):
            self._manageable.manage(volume.name_id, existing_ref)
            return self._kept(volume.name_id)

    def unmanage(self, volume: Any) -> None:
        """Leave a volume where it is, without Cinder."""
        with translated(volume):
            if volume.provider_location != _MADE:
                self._name(volume)
            self._volumes.leave(volume.name_id)

    def get_manageable_volumes(
        self, cinder_volumes: Any, marker: Any, limit: Any, offset: Any, sort_keys: Any, sort_dirs: Any
    ) -> Any:
        """The volumes and loose qcow2 files of this host, and which of them Cinder may manage."""
        with translated():
            known = {volume.name_id: volume.id for volume in cinder_volumes}
            entries = self._manageable.volumes(known)
        return volume_utils.paginate_entries_list(entries, marker, limit, offset, sort_keys, sort_dirs)

    def manage_existing_snapshot_get_size(self, snapshot: Any, existing_ref: Mapping[str, str]) -> int:
        """The size of the snapshot's volume, in GiB, rounded up."""
        with referenced(existing_ref), translated(snapshot):
            return self._manageable.snapshot_size(existing_ref)

    def manage_existing_snapshot(self, snapshot: Any, existing_ref: Mapping[str, str]) -> dict[str, Any]:
        """Make a Cinder snapshot of one that is in a repository."""
        with referenced(existing_ref), translated(snapshot):
            self._manageable.snapshot_size(existing_ref)
            return {"provider_id": str(self._manageable.origin(existing_ref))}

    def unmanage_snapshot(self, snapshot: Any) -> None:
        """Leave a snapshot where it is, without Cinder."""

    def get_manageable_snapshots(
        self, cinder_snapshots: Any, marker: Any, limit: Any, offset: Any, sort_keys: Any, sort_dirs: Any
    ) -> Any:
        """The snapshots of this host's volumes, and which of them Cinder may manage."""
        with translated():
            known = {one.provider_id: one.id for one in cinder_snapshots if one.provider_id}
            entries = self._manageable.snapshots(known)
        return volume_utils.paginate_entries_list(entries, marker, limit, offset, sort_keys, sort_dirs)

    # What the scheduler is told.

    def _update_volume_stats(self) -> None:
        options = self.configuration
        disk = os.statvfs(self._folder)
        self._stats = {
            "volume_backend_name": options.safe_get("volume_backend_name") or type(self).__name__,
            "vendor_name": "Island",
            "driver_version": self.VERSION,
            "storage_protocol": constants.FILE,
            "total_capacity_gb": disk.f_frsize * disk.f_blocks / units.Gi,
            "free_capacity_gb": disk.f_frsize * disk.f_bavail / units.Gi,
            "provisioned_capacity_gb": self._volumes.provisioned() / units.Gi,
            "total_volumes": len(self._volumes.records.volumes()),
            "reserved_percentage": options.safe_get("reserved_percentage") or 0,
            "max_over_subscription_ratio": options.safe_get("max_over_subscription_ratio"),
            "thin_provisioning_support": True,
            "thick_provisioning_support": False,
            "online_extend_support": True,
            "multiattach": False,
            "sparse_copy_volume": True,
            "QoS_support": False,
            "location_info": self._location_info,
        }


def _refuse_encrypted(volume: Any) -> None:
    if volume.encryption_key_id:
        raise RefusedError("encrypted volume types are not supported: the guest may encrypt its disk")


def _refuse_retyping(volume: Any) -> None:
    if volume.status == "retyping":
        raise RefusedError("a retype cannot move data: migrate the volume first, then retype it")
