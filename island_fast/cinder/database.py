"""What Cinder's database knows of volumes that this host may not have."""

from __future__ import annotations

import contextlib

from cinder import context, exception, objects
from cinder.volume import volume_utils

__all__ = ["hosts_of", "names_awaiting"]


def hosts_of(name: str) -> set[str]:
    """The hosts that volumes of this `name_id` are on, deleted ones too.

    One that Cinder copied has the `name_id` of its copy, and a deleted row with that as its id tells the
    host that it was copied from.
    """
    admin = context.get_admin_context(read_deleted="yes")
    rows = list(objects.VolumeList.get_all(admin, filters={"_name_id": name}))
    with contextlib.suppress(exception.VolumeNotFound):
        rows.append(objects.Volume.get_by_id(admin, name))
    return {volume_utils.extract_host(row.host) for row in rows if row.name_id == name}


def names_awaiting(location: str) -> set[str]:
    """The `name_id` of each volume of which Cinder keeps this `provider_location`."""
    admin = context.get_admin_context()
    return {row.name_id for row in objects.VolumeList.get_all(admin, filters={"provider_location": location})}
