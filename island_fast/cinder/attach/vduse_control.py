"""Make VDUSE devices: block devices of the kernel that a process of a user serves.

Root makes a volume's device and gives it to the volume's daemon, which finds it by name. If the daemon made
it, as `qemu-storage-daemon` does otherwise, it would open it at the same moment, when it is root's alone. So
the device's configuration is decided here: that of QEMU's own `vduse-blk`, except for the size.

The size is 0 at first. A disk without size has no partition table that the kernel could read, and a virtio
disk has no other way to keep the kernel from that: the daemon sets the size after the disk was made.

Root runs this, so it imports nothing but the standard library. Sources: linux/vduse.h, linux/virtio_blk.h.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

__all__ = ["QUEUES", "QUEUE_SIZE", "create", "destroy", "device_name", "disks_over", "is_on_bus", "node_of"]

QUEUES = 4
"""The number of queues of each device. The kernel uses as many of them as it has processors."""
QUEUE_SIZE = 256
"""The number of requests in each queue."""

_NODES = Path("/dev/vduse")
_SYSFS = Path("/sys/class/vduse")
_DISKS = "virtio*/block/vd*"  # below the device in sysfs, once it is on the bus
_MAX_NAME = 256  # bytes
_API_VERSION = struct.pack("Q", 0)
_CONFIG = struct.Struct(f"{_MAX_NAME}sIIQII52xI")  # struct vduse_dev_config, without the bytes that follow it
_SET_VERSION, _CREATE, _DESTROY = (
    1 << 30 | size << 16 | 0x81 << 8 | number
    for number, size in ((1, len(_API_VERSION)), (2, _CONFIG.size), (3, _MAX_NAME))
)
_VENDOR, _BLOCK_DEVICE, _ALIGNMENT = 0, 2, 4096
# sizes of segments, topology, block size, flush, queues, discard, write zeroes; notify on empty, indirect
# descriptors, event index, version 1, the platform's access
_FEATURES = sum(1 << bit for bit in (2, 6, 9, 10, 12, 13, 14, 24, 28, 29, 32, 33))
_SECTOR = 512  # bytes
_MAX_DISCARD = 32768  # sectors, also of a write of zeroes
_BLOCK_CONFIG = struct.Struct("<Q II 4x I BBHI BxH IIIII B3x")  # struct virtio_blk_config
_ACL = "system.posix_acl_access"
_ACL_VERSION = struct.pack("<I", 2)  # linux/posix_acl_xattr.h
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_USER, _ACL_MASK = 0x02, 0x10
_READ_WRITE = 6


def device_name(backing: Path) -> str:
    """Return the name of the device over FOLDER/VOLUME/vduse/TOKEN.

    The whole path is in it, as a digest, so no other path leads to this device.
    """
    digest = hashlib.sha256(os.fsencode(backing)).hexdigest()[:16]
    return f"island-{backing.parts[-3]}-{digest}"


def node_of(name: str) -> Path | None:
    """Return the node that a device's daemon opens, or None if there is no such device."""
    return _NODES / name if (_SYSFS / name).is_dir() else None


def is_on_bus(name: str) -> bool:
    """Return whether a device is on the vDPA bus, so that it has a disk."""
    return (_SYSFS / name / name).is_dir()


def disks_over(name: str) -> list[str]:
    """Return the disks (vdX) that the kernel made of a device: one, or none."""
    return sorted(entry.name for entry in (_SYSFS / name / name).glob(_DISKS))


def create(name: str, user: int) -> None:
    """Make a device of this name that this user may serve; do nothing if it is made.

    The user may then also open the kernel's /dev/vduse/control, as the daemon does: it could make devices
    there, which it could not open, and remove devices that nobody serves and that have no disk.
    """
    config = _BLOCK_CONFIG.pack(
        *(0, 0, QUEUE_SIZE - 2, _SECTOR),  # sectors, longest segment, segments, block
        *(0, 0, 1, 1),  # physical block, offset, least and best request in blocks
        *(0, QUEUES),
        *(_MAX_DISCARD, 1, 1, _MAX_DISCARD, 1, 0),
    )
    head = name.encode(), _VENDOR, _BLOCK_DEVICE, _FEATURES, QUEUES, _ALIGNMENT, len(config)
    with _open_control() as control:
        try:
            fcntl.ioctl(control, _CREATE, _CONFIG.pack(*head) + config)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
    if user:
        _let_user_open(_NODES / "control", user)
    os.chown(_NODES / name, user, -1, follow_symlinks=False)


def destroy(name: str) -> bool:
    """Remove a device that is not on the bus; return False if a process serves it, which then removes it."""
    with _open_control() as control:
        try:
            fcntl.ioctl(control, _DESTROY, name.encode().ljust(_MAX_NAME, b"\0"))
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            if error.errno not in (errno.EINVAL, errno.ENOENT):  # it is gone
                raise
    return True


@contextlib.contextmanager
def _open_control() -> Iterator[int]:
    control = os.open(_NODES / "control", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(control, _SET_VERSION, _API_VERSION)
        yield control
    finally:
        os.close(control)


def _let_user_open(node: Path, user: int) -> None:
    """Let one more user open a node for reading and writing, by an entry in its access control list."""
    try:
        packed = os.getxattr(node, _ACL)[len(_ACL_VERSION) :]
        entries = list(_ACL_ENTRY.iter_unpack(packed))
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        mode, nobody = os.stat(node).st_mode, 0xFFFFFFFF  # owner, group, others
        entries = [(tag, mode >> shift & 7, nobody) for tag, shift in ((0x01, 6), (0x04, 3), (0x20, 0))]
    own = (_ACL_USER, _READ_WRITE, user), (_ACL_MASK, _READ_WRITE, 0xFFFFFFFF)
    kept = [one for one in entries if one[0] != _ACL_MASK and one[::2] != own[0][::2]]
    found = sorted([*kept, *own], key=lambda one: (one[0], one[2]))
    os.setxattr(node, _ACL, _ACL_VERSION + b"".join(_ACL_ENTRY.pack(*one) for one in found))
