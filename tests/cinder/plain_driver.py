"""A driver of sparse raw files, by which the services are tested before ours is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from cinder import interface
from cinder.image import image_utils
from cinder.volume import driver, volume_utils
from oslo_config import cfg

OPTIONS = [cfg.StrOpt("plain_dir", help="Where the files are.")]


@interface.volumedriver
class PlainDriver(driver.VolumeDriver):
    """Volumes and snapshots are files of their names."""

    VERSION = "1"
    CI_WIKI_NAME = "none"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.configuration.append_config_values(OPTIONS)

    def _file(self, thing: Any) -> Path:
        return Path(self.configuration.plain_dir, thing.name)

    def check_for_setup_error(self) -> None:
        Path(self.configuration.plain_dir).mkdir(exist_ok=True)

    def create_volume(self, volume: Any) -> None:
        self.extend_volume(volume, volume.size)

    def extend_volume(self, volume: Any, new_size: int) -> None:
        with open(self._file(volume), "ab") as file:
            os.truncate(file.fileno(), new_size << 30)

    def delete_volume(self, volume: Any) -> None:
        self._file(volume).unlink(missing_ok=True)

    delete_snapshot = delete_volume

    def create_snapshot(self, snapshot: Any) -> None:
        shutil.copyfile(self._file(snapshot.volume), self._file(snapshot))

    def create_volume_from_snapshot(self, volume: Any, snapshot: Any) -> None:
        shutil.copyfile(self._file(snapshot), self._file(volume))
        self.extend_volume(volume, volume.size)

    def create_cloned_volume(self, volume: Any, src_vref: Any) -> None:
        self.create_volume_from_snapshot(volume, src_vref)

    def copy_image_to_volume(
        self, context: Any, volume: Any, image_service: Any, image_id: str, disable_sparse: bool = False
    ) -> None:
        where = str(self._file(volume))
        image_utils.fetch_to_raw(context, image_service, image_id, where, "1M", size=volume.size)
        self.extend_volume(volume, volume.size)

    def copy_volume_to_image(self, context: Any, volume: Any, image_service: Any, image_meta: Any) -> None:
        volume_utils.upload_volume(context, image_service, image_meta, str(self._file(volume)), volume)

    def ensure_export(self, context: Any, volume: Any) -> None: ...
    def create_export(self, context: Any, volume: Any, connector: Any) -> None: ...
    def remove_export(self, context: Any, volume: Any) -> None: ...
    def terminate_connection(self, volume: Any, connector: Any, **kwargs: Any) -> None: ...

    def initialize_connection(self, volume: Any, connector: Any, **kwargs: Any) -> dict[str, Any]:
        return {"driver_volume_type": "local", "data": {"device_path": str(self._file(volume))}}

    def get_volume_stats(self, refresh: bool = False) -> dict[str, Any]:
        name = self.configuration.volume_backend_name
        capacity = {"total_capacity_gb": 1000, "free_capacity_gb": 900, "reserved_percentage": 0}
        return {"volume_backend_name": name, "vendor_name": "none", "storage_protocol": "file", **capacity}
