"""The nodes of a volume's daemon in qemu, by the options of QAPI's BlockdevOptions (qapi/block-core.json)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from island_fast.qemu.sizing import node_options

__all__ = ["FRONT_NODE", "VOLUME_NODE", "file_node", "front_node", "qcow2_node", "takes_direct"]

FRONT_NODE, VOLUME_NODE, _FILE_NODE = "front", "volume", "file"


def file_node(image: Path, direct: bool) -> dict[str, object]:
    """The file itself. With locks, for they tell others that the image is in use (`imagelock.py`)."""
    return {
        "node-name": _FILE_NODE,
        "driver": "file",
        "filename": str(image),
        "locking": "on",
        "discard": "unmap",
        "cache": {"direct": direct, "no-flush": False},
    }


def qcow2_node(size: int, cluster: int, direct: bool) -> dict[str, object]:
    """The volume, `size` bytes, its tables cached as a whole; nothing that the header names is opened.

    Without the host's page cache (`direct`): a flush, and so an internal snapshot, would else have to write
    gigabytes first, while the guest waits. A guest's flush reaches the disk with the tables.
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
    """What is exported: the volume without discards (`daemon.py` says why).

    With discard=unmap all the same, for else qemu says "done" to each and asks nobody.
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


def takes_direct(image: Path) -> bool:
    """Tell whether the image's file system has O_DIRECT; tmpfs has not everywhere."""
    try:
        os.close(os.open(image, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True
