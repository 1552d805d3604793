"""The block nodes that we give to qemu, as QAPI's BlockdevOptions (qapi/block-core.json)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from island_fast.qemu.sizing import node_options

__all__ = ["FRONT_NODE", "VOLUME_NODE", "file_node", "front_node", "qcow2_node", "supports_direct_io"]

FRONT_NODE, VOLUME_NODE, _FILE_NODE = "front", "volume", "file"


def file_node(image: Path, direct: bool) -> dict[str, object]:
    """Return the node of the image file, with locks that show others that it is in use (`image_lock.py`)."""
    return {
        "node-name": _FILE_NODE,
        "driver": "file",
        "filename": str(image),
        "locking": "on",
        "discard": "unmap",
        "cache": {"direct": direct, "no-flush": False},
    }


def qcow2_node(size: int, cluster: int, direct: bool) -> dict[str, object]:
    """Return the node of a volume of `size` bytes, with all of its tables cached.

    No file that the image's header names is opened. With `direct` the host's page cache is not used:
    otherwise a flush, and so an internal snapshot, must first write gigabytes while the guest waits. A
    guest's flush brings data and tables to the disk.
    """
    return {
        "node-name": VOLUME_NODE,
        "driver": "qcow2",
        "file": _FILE_NODE,
        "backing": None,
        "discard": "unmap",
        "detect-zeroes": "unmap",
        **node_options(size, cluster),
        "cache": {"direct": direct, "no-flush": False},
    }


def front_node() -> dict[str, object]:
    """Return the node that is exported: the volume without discards (`cinder/attach/daemon.py` says why).

    It has discard=unmap nevertheless: without, qemu would report each discard as done and drop it.
    """
    refusal = {
        "event": "none",
        "iotype": "discard",
        "errno": errno.ENOSYS,
        "once": False,
        "immediately": True,
    }
    return {
        "node-name": FRONT_NODE,
        "driver": "blkdebug",
        "image": VOLUME_NODE,
        "discard": "unmap",
        "inject-error": [refusal],
    }


def supports_direct_io(image: Path) -> bool:
    """Return whether the image's file system supports O_DIRECT; tmpfs does not everywhere."""
    try:
        os.close(os.open(image, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True
