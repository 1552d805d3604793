"""Whether reference counts leave room for one more internal snapshot.

An internal snapshot adds a reference to every cluster that the volume uses. Counts have 16 bits by default,
but can have 1, 2, 4 or 8 (qcow2 specification, "Host cluster management"). When one is full, qemu takes no
snapshot, says only "Invalid argument", and leaks the clusters that it has counted until then.
"""

from __future__ import annotations

import numpy as np

from island_fast.arrays import Uint8s
from island_fast.qcow2.changes import has_compressed
from island_fast.qcow2.holes import FileData
from island_fast.qcow2.image import Image

__all__ = ["reason_no_room"]

_ENOUGH_BITS = 16
_OFFSET = np.uint64(~0x1FF & (1 << 64) - 1)


def reason_no_room(image: Image) -> str | None:
    """Return why the image cannot hold one more internal snapshot; None if it can.

    Some cluster has the highest count there is, whether the volume still uses it or not; or half of that,
    and the volume has compressed clusters, many of which can share one. While a process has the image open,
    the counts on disk can be lower than its own.
    """
    bits = image.header.refcount_bits
    if bits >= _ENOUGH_BITS:
        return None
    full = (1 << bits) - 1
    highest = _highest_count(image, bits)
    if highest < full and (2 * highest <= full or not has_compressed(image, image.active_point())):
        return None
    return (
        f"its reference counts of {bits} bit{'s' if bits > 1 else ''} leave no room for a pin "
        "('qemu-img amend -f qcow2 -o refcount_bits=16 IMAGE' makes room)"
    )


def _highest_count(image: Image, bits: int) -> int:
    """Return the highest reference count of a cluster of the file; at most 8 bits each.

    Only as many blocks of counts are read as the clusters of the file need, each once, and none that is not
    stored in the file: a small file can claim to be huge.
    """
    cluster = image.header.cluster_size
    size = image.file_size
    needed = -(-size // (cluster * (cluster * 8 // bits)))
    table = image.read(
        image.header.refcount_offset, min(needed * 8, image.header.refcount_clusters * cluster)
    )
    offsets = np.frombuffer(table[: len(table) // 8 * 8], ">u8").astype(np.uint64) & _OFFSET
    blocks = np.unique(offsets[(offsets != 0) & (offsets < np.uint64(size))]).astype(np.int64)
    highest = 0
    for offset in blocks[FileData(image).holds(blocks, cluster)].tolist():
        counts: Uint8s = np.frombuffer(image.read(offset, cluster), np.uint8)
        for shift in range(0, 8, bits):
            highest = max(
                highest, int((counts >> np.uint8(shift) & np.uint8((1 << bits) - 1)).max(initial=0))
            )
        if highest == (1 << bits) - 1:
            break
    return highest
