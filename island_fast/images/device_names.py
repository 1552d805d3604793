"""The name by which a block device is known again when its number is another device's.

The kernel numbers devices as it finds them: after a restart, /dev/dm-3 or /dev/sdb can be another disk. What
stays is in sysfs: the identity of a device mapper volume or RAID, the file below a loop device, a disk's
identifier, and the number of a partition (Linux's Documentation/ABI, sysfs-block and sysfs-block-dm).
"""

from __future__ import annotations

import os

from island_fast.qemu.open_files import SYSFS_DEVICES, read_sysfs

__all__ = ["find_stable_name"]

_KEPT = (
    *("dm/uuid", "dm/name", "md/uuid", "loop/backing_file"),
    *("wwid", "device/wwid", "serial", "device/serial"),
)
"""Files that name a device as no other one is named; the surest first."""


def find_stable_name(number: int) -> str:
    """Return the name that a device (st_rdev) keeps; "" if there is none, as for a disk without a serial."""
    place = SYSFS_DEVICES / f"{os.major(number)}:{os.minor(number)}"
    part = read_sysfs(place / "partition")
    if part:
        place /= ".."
    for key in _KEPT:
        value = read_sysfs(place / key).strip()
        if value:
            offset = read_sysfs(place / "loop/offset") if key == "loop/backing_file" else ""
            words = [key, value, *(["from", offset] if offset not in ("", "0") else [])]
            return " ".join([*words, *(["part", part] if part else [])])
    return ""
