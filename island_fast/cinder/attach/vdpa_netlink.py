"""Commands for the kernel's vDPA bus, sent by generic netlink. The kernel accepts them only from root.

A VDUSE device is nothing but a name until it is put on this bus, where a driver makes a disk of it. Root runs
this, so it imports nothing but the standard library and `generic_netlink.py`. Source: linux/vdpa.h.
"""

from __future__ import annotations

from island_fast.cinder.attach.generic_netlink import GenericNetlink, attribute

__all__ = ["VdpaNetlink"]

_DRIVER = "vdpa"
_NEW, _DELETE = 3, 4  # VDPA_CMD_DEV_NEW, VDPA_CMD_DEV_DEL
_MANAGER_NAME, _DEVICE_NAME = 2, 4  # VDPA_ATTR_MGMTDEV_DEV_NAME, VDPA_ATTR_DEV_NAME
_MANAGER = b"vduse\0"


class VdpaNetlink(GenericNetlink):
    """A netlink socket to the kernel's vDPA bus. A context manager. Errors are OSError, the kernel's own.

    Both commands send messages to the process that serves the device, and wait for it.
    """

    def __init__(self) -> None:
        super().__init__(_DRIVER)

    def add(self, name: str) -> None:
        """Put the VDUSE device of this name on the bus, where a driver finds it."""
        device = attribute(_DEVICE_NAME, name.encode() + b"\0")
        self.request(_NEW, attribute(_MANAGER_NAME, _MANAGER) + device)

    def delete(self, name: str) -> None:
        """Take the device from the bus, with its disk.

        The kernel does not ask whether the disk is open, and waits for ever for requests that nobody answers.
        """
        self.request(_DELETE, attribute(_DEVICE_NAME, name.encode() + b"\0"))
