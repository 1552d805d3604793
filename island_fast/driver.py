"""The Cinder driver: volumes as qcow2 files on the compute host's own disks, their snapshots in Swift.

This module knows only Cinder: its options, names and exceptions. The life of a volume is in the room
`cinder/`, where long work runs in processes of its own. A volume's name there is its `name_id`.

These fields are in Cinder's database, so that another host can take over if this one is lost:

    volume.provider_id         its lineage, from its first snapshot on
    volume.provider_location   "made" once it has an image; before that "from:SNAPSHOT" or "passing:SNAPSHOT",
                               the snapshot that its image is to be made from (see `VolumeRecord`)
    snapshot.provider_id       the snapshot, as the text of a `SnapshotRef`
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cinder import context as cinder_context
from cinder import exception, interface, objects
from cinder.common import constants
from cinder.image import image_utils
from cinder.volume import configuration, driver, volume_utils
from oslo_concurrency import lockutils, processutils
from oslo_config import cfg
from oslo_log import log as logging
from oslo_service import loopingcall
from oslo_utils import units

from island_fast import __version__
from island_fast.cinder.attach.exports import Exports
from island_fast.cinder.attach.selftest import choose_kind
from island_fast.cinder.database import find_hosts, find_names_by_location, is_managed
from island_fast.cinder.errors import translate_errors, translate_reference_errors
from island_fast.cinder.manage import ManageableVolumes
from island_fast.cinder.options import STORE_OPTIONS, VOLUME_OPTIONS, read_repositories
from island_fast.cinder.records import SnapshotRef, VolumeRecord, VolumeRecords
from island_fast.cinder.upkeep import Upkeep
from island_fast.cinder.volumes import Volumes
from island_fast.errors import NotFoundError, RefusedError
from island_fast.files import make_folders
from island_fast.qemu.programs import ProgramResult, error_text, make_environment

__all__ = ["IslandDriver"]

LOG = logging.getLogger(__name__)
CONF = cfg.CONF

_MADE = "made"
_FAILED_TO_MANAGE = "error_managing_deleting"  # Cinder's status of such a volume while it is deleted
_CHECK_EVERY = 5.0  # seconds
_FORGET_EVERY = 10.0  # seconds
_ROOTWRAP_REFUSES = range(96, 100)  # exit statuses: no such program, bad configuration, no command, no filter

# In [backend_defaults] they exist from now on, whether there is a service or not: cinderlib looks there.
configuration.Configuration([*VOLUME_OPTIONS, *STORE_OPTIONS], configuration.SHARED_CONF_GROUP)


@interface.volumedriver
class IslandDriver(driver.VolumeDriver):  # type: ignore[misc]
    """Local qcow2 volumes with incremental snapshots in Swift."""

    VERSION = __version__
    SUPPORTS_ACTIVE_ACTIVE = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "db" in kwargs:  # cinderlib's own, of which Cinder's class takes no notice
            self.db = kwargs["db"]
        self.configuration.append_config_values([*VOLUME_OPTIONS, *STORE_OPTIONS])
        self._volumes: Volumes
        self._manageable: ManageableVolumes
        self._loops: list[loopingcall.FixedIntervalLoopingCall] = []

    @staticmethod
    def get_driver_options() -> list[cfg.Opt]:
        """Return the options that the driver adds to its section of cinder.conf."""
        return [*VOLUME_OPTIONS, *STORE_OPTIONS]

    # Setup.

    def do_setup(self, context: Any) -> None:
        """Read the options."""
        options = self.configuration
        with translate_errors():
            self._repositories = read_repositories(options)
        self._volumes_dir = Path(options.island_volumes_dir)
        self._run_dir = Path(options.island_run_dir) / (options.config_group or "island")
        self._connectors = {
            *options.island_connector_hosts,
            *(socket.gethostname(), CONF.host, CONF.my_ip),
            *(name for name in (volume_utils.extract_host(self.host, "host"),) if name),
        }

    def check_for_setup_error(self) -> None:
        """Test the whole path from a block device to an image; VolumeDriverException says what is missing."""
        run, links = self._run_dir / "daemons", self._run_dir / "devices"
        with translate_errors():
            make_folders(self._volumes_dir)
            records = VolumeRecords(self._volumes_dir)
            service = volume_utils.extract_host(self.host)
            records.refuse_other_owner(service)
            kind = choose_kind(run, links, self._volumes_dir, self._run_program)
            records.claim(service)
            exports = Exports(run, links, self._run_program, kind)
            exports.remove_stale_links()
            self._volumes = Volumes(
                records,
                exports,
                self._run_program,
                self._repositories,
                lambda name: lockutils.lock(f"island-{name}"),
                lazy=self.configuration.island_lazy_images,
            )
            self._volumes.renew_daemons()
            self._manageable = ManageableVolumes(self._volumes, is_managed)
        LOG.info("volumes are attached through devices of kind %s", kind)

    def set_initialized(self) -> None:
        """Start what is done regularly: checks of volumes, sweeps, forgetting volumes that were migrated."""
        super().set_initialized()
        upkeep = Upkeep(self._volumes, self.configuration.island_free_space_reserve / 100)
        self._start_loop(upkeep.check_volumes, _CHECK_EVERY)
        self._start_loop(upkeep.sweep, self.configuration.island_sweep_interval)
        self._start_loop(self._forget_migrated, _FORGET_EVERY)

    def _start_loop(self, work: Callable[[], None], interval: float) -> None:
        loop = loopingcall.FixedIntervalLoopingCall(work)
        loop.start(interval, initial_delay=min(interval, 30.0), stop_on_exception=False)
        self._loops.append(loop)

    def _run_program(
        self, command: Sequence[str], /, *, root: bool = False, env: Mapping[str, str] | None = None
    ) -> ProgramResult:
        """Run a program the way Cinder does: with `root`, through rootwrap."""
        status = 0
        try:
            stdout, stderr = self._execute(*command, run_as_root=root, env_variables=make_environment(env))
        except processutils.ProcessExecutionError as error:
            if not isinstance(error.exit_code, int) or (root and error.exit_code in _ROOTWRAP_REFUSES):
                raise OSError(error_text(error.stderr or str(error))) from error
            status, stdout, stderr = error.exit_code, error.stdout, error.stderr
        return ProgramResult(list(command), status, stdout or "", stderr or "")

    # What Cinder's database keeps of a volume.

    def _adopt_record(self, volume: Any) -> str:
        """Make sure that this host knows a volume, from Cinder's fields if need be, and return its name."""
        name: str = volume.name_id
        kind, _, text = (volume.provider_location or "").partition(":")
        origin = SnapshotRef.parse(text) if text else None
        size = volume.size * units.Gi
        record = VolumeRecord(size, volume.provider_id, origin, kind == "passing", kind == _MADE)
        self._volumes.adopt_record(name, record)
        return name

    def _provider_fields(self, volume: str, record: VolumeRecord | None = None) -> dict[str, str | None]:
        """Return the fields that Cinder's database is to keep of a volume."""
        record = record or self._volumes.records.read(volume)
        location = None
        if record.made:
            location = _MADE
        elif record.origin:
            location = f"{'passing' if record.passing else 'from'}:{record.origin}"
        return {"provider_location": location, "provider_id": record.lineage}

    def _save_provider_fields(self, volume: Any) -> None:
        """Save the fields in Cinder's database now, in methods whose return value cannot carry them."""
        fields = self._provider_fields(volume.name_id)
        if any(getattr(volume, key) != value for key, value in fields.items()):
            volume.update(fields)
            volume.save()

    # Volumes.

    def create_volume(self, volume: Any) -> dict[str, Any]:
        """Record a new volume; its image is made when it is first attached."""
        with translate_errors(volume):
            _refuse_encrypted(volume)
            self._volumes.create(volume.name_id, VolumeRecord(volume.size * units.Gi))
            return self._provider_fields(volume.name_id)

    def delete_volume(self, volume: Any) -> None:
        """Remove a volume from this host. Its lineage goes as its snapshots are deleted and swept.

        Cinder calls this too for a volume that it failed to manage. What was to be managed is not Cinder's to
        remove, so it stays, and can be managed under the name that it has now.
        """
        with translate_errors(volume):
            if volume.status == _FAILED_TO_MANAGE:
                self._volumes.give_back(volume.name_id)
                return
            self._volumes.delete(volume.name_id)

    def extend_volume(self, volume: Any, new_size: int) -> None:
        """Enlarge a volume, whether it is attached or not."""
        with translate_errors(volume):
            self._volumes.extend(self._adopt_record(volume), new_size * units.Gi)

    def create_volume_from_snapshot(self, volume: Any, snapshot: Any) -> dict[str, Any]:
        """Record the snapshot that a new volume is made from.

        Its image is made at once if this host could not refuse to delete that snapshot.
        """
        with translate_errors(volume):
            _refuse_encrypted(volume)
            origin = self._parse_ref(snapshot)
            record = VolumeRecord(volume.size * units.Gi, origin=origin)
            at_once = not self._deleted_only_here(snapshot, origin)
            self._volumes.create(volume.name_id, record, at_once=at_once)
            return self._provider_fields(volume.name_id)

    def create_cloned_volume(self, volume: Any, src_vref: Any) -> dict[str, Any]:
        """Copy a volume's present content to a new volume on this host."""
        with translate_errors(volume):
            self._volumes.clone(self._adopt_record(src_vref), volume.name_id, volume.size * units.Gi)
            self._save_provider_fields(src_vref)
            return self._provider_fields(volume.name_id)

    # Attaching.

    def validate_connector(self, connector: Mapping[str, Any]) -> None:
        """Refuse connectors of other hosts: the volumes are on this host's disks."""
        theirs = {connector.get("host"), connector.get("ip")}
        if not theirs & self._connectors:
            raise exception.InvalidConnectorException(
                f"this volume is on host {volume_utils.extract_host(self.host, 'host')}, and host "
                f"{connector.get('host')} cannot attach it: run the server there (InstanceLocalityFilter "
                "helps) or create a volume from a snapshot; live migration and evacuation are not supported"
            )

    def ensure_export(self, context: Any, volume: Any) -> None:
        """Restore the device of an attached volume, as after a restart of the host."""
        with translate_errors(volume):
            self._volumes.attach(self._adopt_record(volume))

    def create_export(self, context: Any, volume: Any, connector: Mapping[str, Any]) -> dict[str, Any]:
        """Make the volume's device, and its image if it is not made yet."""
        with translate_errors(volume):
            _refuse_retyping(volume)
            self._volumes.attach(self._adopt_record(volume))
            return self._provider_fields(volume.name_id)

    def remove_export(self, context: Any, volume: Any) -> None:
        """Remove the volume's device."""
        with translate_errors(volume):
            self._volumes.detach(volume.name_id)

    def initialize_connection(
        self, volume: Any, connector: Mapping[str, Any], initiator_data: Any = None
    ) -> dict[str, Any]:
        """Return the path of the volume's device: a link that only this volume has."""
        with translate_errors(volume):
            path = self._volumes.attach(self._adopt_record(volume))
        return {"driver_volume_type": "local", "data": {"device_path": str(path)}}

    def terminate_connection(self, volume: Any, connector: Mapping[str, Any] | None, **kwargs: Any) -> bool:
        """Return whether another attachment still needs the device; `remove_export` removes it."""
        admin = cinder_context.get_admin_context()
        attachments = objects.VolumeAttachmentList.get_all_by_volume_id(admin, volume.id)
        return sum(one.attach_status in ("attached", "attaching") for one in attachments) > 1

    # Snapshots.

    def _parse_ref(self, snapshot: Any) -> SnapshotRef:
        if not snapshot.provider_id:
            raise NotFoundError(f"snapshot {snapshot.id} is not in any repository: it was never finished")
        return SnapshotRef.parse(snapshot.provider_id)

    def _deleted_only_here(self, snapshot: Any, ref: SnapshotRef) -> bool:
        """Return whether only this host can delete the snapshot, so that it can refuse to."""
        here = volume_utils.extract_host(snapshot.volume.host) == volume_utils.extract_host(self.host)
        return here and self._is_own(snapshot, ref)

    def _is_own(self, snapshot: Any, ref: SnapshotRef) -> bool:
        """Return whether the snapshot is in its volume's own lineage; others are managed and only read."""
        return not ref.repository and ref.lineage == snapshot.volume.provider_id

    def create_snapshot(self, snapshot: Any) -> dict[str, Any]:
        """Take a snapshot of a volume, whether it is attached or not."""
        if snapshot.provider_id:
            return {"provider_id": snapshot.provider_id}
        with translate_errors(snapshot):
            taken = self._volumes.snapshot(self._adopt_record(snapshot.volume), snapshot.id)
            self._save_provider_fields(snapshot.volume)
            return {"provider_id": str(taken)}

    def delete_snapshot(self, snapshot: Any) -> None:
        """Delete a snapshot. One that was managed from another lineage or repository is only forgotten."""
        volume = snapshot.volume.name_id
        with translate_errors(snapshot):
            if not snapshot.provider_id:
                self._volumes.forget_snapshot(volume, snapshot.id)
                return
            ref = self._parse_ref(snapshot)
            if not self._is_own(snapshot, ref):
                LOG.info("%s is forgotten, and stays in its repository", ref, resource=snapshot)
                return
            if dependants := self._find_dependants(ref):
                raise exception.SnapshotIsBusy(
                    f"snapshot {snapshot.id} is needed by {', '.join(dependants)}, whose image is made when "
                    "first attached: attach or delete them first"
                )
            self._volumes.delete_snapshot(volume, ref)

    def _find_dependants(self, ref: SnapshotRef) -> list[str]:
        """Return the volumes that are yet to be made from a snapshot, those of a lost host included."""
        made = {name for name, record in self._volumes.records.read_undamaged() if record.made}
        recorded = find_names_by_location(self.db, self.host, f"from:{ref}")
        return sorted({*self._volumes.find_dependants(ref), *recorded - made})

    def revert_to_snapshot(self, context: Any, volume: Any, snapshot: Any) -> None:
        """Give a volume the content of one of its own snapshots."""
        with translate_errors(volume):
            ref = self._parse_ref(snapshot)
            if not self._is_own(snapshot, ref):
                raise RefusedError(f"{ref} is not in the volume's own lineage; create a volume from it")
            self._volumes.revert(volume.name_id, VolumeRecord(volume.size * units.Gi, ref.lineage), ref)
            self._save_provider_fields(volume)

    def snapshot_revert_use_temp_snapshot(self) -> bool:
        """Return False: no temporary snapshot is needed, the old image stays until the new one is whole."""
        return False

    def backup_use_temp_snapshot(self) -> bool:
        """Return False: a snapshot cannot be attached, so cinder-backup reads a temporary volume instead."""
        if self.configuration.safe_get("backup_use_temp_snapshot"):
            LOG.warning(
                "backup_use_temp_snapshot has no effect, because snapshots of this driver cannot be "
                "attached: cinder-backup reads a temporary volume; remove the option from section [%s]",
                self.configuration.config_group,
            )
        return False

    # Images.

    def copy_volume_to_image(
        self, context: Any, volume: Any, image_service: Any, image_meta: Mapping[str, Any]
    ) -> None:
        """Upload a volume's present content, whether it is attached or not."""
        kind = image_meta["disk_format"]
        with translate_errors(volume), image_utils.temporary_file(prefix="island_upload_") as path:
            self._volumes.export(self._adopt_record(volume), Path(path), image_utils.fixup_disk_format(kind))
            self._save_provider_fields(volume)
            volume_utils.upload_volume(
                context, image_service, image_meta, path, volume, volume_format=kind, run_as_root=False
            )

    # To other types and hosts.

    def retype(self, context: Any, volume: Any, new_type: Any, diff: Any, host: Any) -> tuple[bool, None]:
        """Accept another type on this host: no type changes how the data is stored."""
        return True, None

    def migrate_volume(
        self, context: Any, volume: Any, host: Mapping[str, Any]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Move a detached volume to another host of the same repository, through the repository."""
        with translate_errors(volume):
            _refuse_retyping(volume)
            if host["capabilities"].get("location_info") != self._location_info:
                return False, None
            if volume_utils.extract_host(host["host"]) == volume_utils.extract_host(self.host):
                return True, None
            name = self._adopt_record(volume)
            return True, self._provider_fields(
                name, self._volumes.prepare_migration(name, f"passing-{volume.id}")
            )

    def update_migrated_volume(
        self, context: Any, volume: Any, new_volume: Any, original_volume_status: str
    ) -> dict[str, Any]:
        """Return the fields of a volume that Cinder copied here: it keeps the name of its copy."""
        return {
            "_name_id": new_volume.name_id,
            "provider_location": new_volume.provider_location,
            "provider_id": new_volume.provider_id,
        }

    def _forget_migrated(self) -> None:
        """Forget volumes that another host has taken over."""
        here = volume_utils.extract_host(self.host)
        for name, record in self._volumes.records.read_undamaged():
            if record.in_transit:
                hosts = find_hosts(name)
                if hosts and here not in hosts:
                    self._volumes.forget(name, record)

    @property
    def _location_info(self) -> str:
        url = self._repositories[""].url
        return f"island:{url}" if "://" in url else f"island:{socket.gethostname()}:{url}"

    # Manage and unmanage.

    def manage_existing_get_size(self, volume: Any, existing_ref: Mapping[str, str]) -> int:
        """Return the size of what is to be managed, in GiB, rounded up."""
        with translate_reference_errors(existing_ref), translate_errors(volume):
            return self._manageable.size(existing_ref)

    def manage_existing(self, volume: Any, existing_ref: Mapping[str, str]) -> dict[str, Any]:
        """Make a volume of an unmanaged volume, a qcow2 file in the directory of volumes, or a snapshot."""
        with translate_reference_errors(existing_ref), translate_errors(volume):
            self._manageable.manage(volume.name_id, existing_ref)
            return self._provider_fields(volume.name_id)

    def unmanage(self, volume: Any) -> None:
        """Leave a volume on this host's disk, without Cinder."""
        with translate_errors(volume):
            if volume.provider_location != _MADE:
                self._adopt_record(volume)
            self._volumes.release(volume.name_id)

    def get_manageable_volumes(
        self, cinder_volumes: Any, marker: Any, limit: Any, offset: Any, sort_keys: Any, sort_dirs: Any
    ) -> Any:
        """Return the volumes and loose qcow2 files of this host, and whether Cinder can manage each."""
        with translate_errors():
            known = {volume.name_id: volume.id for volume in cinder_volumes}
            entries = self._manageable.list_volumes(known)
        return volume_utils.paginate_entries_list(entries, marker, limit, offset, sort_keys, sort_dirs)

    def manage_existing_snapshot_get_size(self, snapshot: Any, existing_ref: Mapping[str, str]) -> int:
        """Return the size of the snapshot's volume, in GiB, rounded up."""
        with translate_reference_errors(existing_ref), translate_errors(snapshot):
            return self._manageable.snapshot_size(existing_ref)

    def manage_existing_snapshot(self, snapshot: Any, existing_ref: Mapping[str, str]) -> dict[str, Any]:
        """Make a snapshot that is in a repository a snapshot of Cinder's."""
        with translate_reference_errors(existing_ref), translate_errors(snapshot):
            self._manageable.snapshot_size(existing_ref)
            return {"provider_id": str(self._manageable.parse_snapshot(existing_ref))}

    def unmanage_snapshot(self, snapshot: Any) -> None:
        """Leave a snapshot in its repository, without Cinder."""

    def get_manageable_snapshots(
        self, cinder_snapshots: Any, marker: Any, limit: Any, offset: Any, sort_keys: Any, sort_dirs: Any
    ) -> Any:
        """Return the snapshots of this host's volumes, and whether Cinder can manage each."""
        with translate_errors():
            known = {one.provider_id: one.id for one in cinder_snapshots if one.provider_id}
            entries = self._manageable.list_snapshots(known)
        return volume_utils.paginate_entries_list(entries, marker, limit, offset, sort_keys, sort_dirs)

    # What the scheduler knows.

    def _update_volume_stats(self) -> None:
        """Set `_stats`, which Cinder's base class reports to the scheduler."""
        options = self.configuration
        disk = os.statvfs(self._volumes_dir)
        self._stats = {
            "volume_backend_name": options.safe_get("volume_backend_name") or type(self).__name__,
            "vendor_name": "Island",
            "driver_version": self.VERSION,
            "storage_protocol": constants.FILE,
            "total_capacity_gb": disk.f_frsize * disk.f_blocks / units.Gi,
            "free_capacity_gb": disk.f_frsize * disk.f_bavail / units.Gi,
            "provisioned_capacity_gb": self._volumes.provisioned_bytes() / units.Gi,
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
