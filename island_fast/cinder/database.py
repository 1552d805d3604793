"""What Cinder's database knows of volumes that may not be on this host."""

from __future__ import annotations

import contextlib
from typing import Any

from cinder import context, exception, objects
from cinder.volume import volume_utils

__all__ = ["find_hosts", "find_names_by_location", "is_managed"]

_NOT_YET_MANAGED = ("managing", "error_managing", "error_managing_deleting")


def find_hosts(name: str) -> set[str]:
    """Return the hosts of the volumes that have this `name_id`, deleted volumes included.

    A volume that Cinder migrated by copying has the `name_id` of the copy. The copy's own row, which has that
    as its id and is deleted, names the host that the volume was copied from.
    """
    rows = _find_rows(context.get_admin_context(read_deleted="yes"), name)
    return {volume_utils.extract_host(row.host) for row in rows}


def is_managed(name: str) -> bool:
    """Return whether Cinder has a volume with this `name_id`, other than one that it failed to manage."""
    return any(row.status not in _NOT_YET_MANAGED for row in _find_rows(context.get_admin_context(), name))


def _find_rows(admin: context.RequestContext, name: str) -> list[Any]:
    """Return the volumes with this `name_id` that `admin` may see."""
    rows = list(objects.VolumeList.get_all(admin, filters={"_name_id": name}))
    with contextlib.suppress(exception.VolumeNotFound):
        rows.append(objects.Volume.get_by_id(admin, name))
    return [row for row in rows if row.name_id == name]


def find_names_by_location(db: Any, host: str, location: str) -> set[str]:  # noqa: ANN401
    """Return the `name_id` of each volume that has this `provider_location`.

    `db` is the database that the driver of `host` was given. That of cinderlib has the volumes of this host
    and no others.
    """
    admin = context.get_admin_context()
    if hasattr(db, "volume_get_all"):
        rows = objects.VolumeList.get_all(admin, filters={"provider_location": location})
    else:
        rows = db.volume_get_all_by_host(admin, host)
    return {row.name_id for row in rows if row.provider_location == location}
