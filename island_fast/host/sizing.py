"""How big a new image's clusters are, and how much of its tables a daemon keeps in memory.

Taking an internal snapshot, and dropping one, goes through every cluster's table entry and reference count
while the guest's writes wait. So the number of clusters decides how long they wait, and so do caches that
do not hold all of the tables. The figures behind the policy are in docs/pause.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from island_fast.errors import UsageError

__all__ = ["Caches", "cache_sizes", "cluster_size"]

_SMALLEST, _BIGGEST = 64 << 10, 2 << 20  # bytes; qemu's default, and the most that qcow2 knows
_MAX_CLUSTERS = 4 << 20  # of one volume; that many keep a guest waiting for less than a second
_L2_ENTRY_BYTES = 8
_REFCOUNT_BYTES = 2  # refcount_bits=16, qemu's default
_VERSIONS = 3  # of a volume in its file at most: the pinned base, a new snapshot, what the guest writes now
_MIN_REFCOUNT_BLOCKS = 4  # qemu refuses less


@dataclass(frozen=True, slots=True)
class Caches:
    """qemu's two caches of one image's tables, in bytes: `l2-cache-size` and `refcount-cache-size`."""

    l2: int
    refcount: int


def cluster_size(volume_size: int) -> int:
    """Return the cluster size, in bytes, for a new image of `volume_size` bytes.

    The smallest of 64 KiB to 2 MiB with which the volume has few enough clusters; 2 MiB where none has
    (volumes over 8 TiB). UsageError if the size is negative.
    """
    _check(volume_size)
    size = _SMALLEST
    while size < _BIGGEST and volume_size > _MAX_CLUSTERS * size:
        size *= 2
    return size


def cache_sizes(volume_size: int, cluster_size: int) -> Caches:
    """Return caches that hold all tables of a volume, its pinned base and a snapshot under way, in bytes.

    For the volume's size now; a volume that has grown wants them anew. `cluster_size` is the image's own,
    whoever made it. qemu takes the memory only for tables that it has read.
    """
    _check(volume_size)
    if cluster_size < 512 or cluster_size & (cluster_size - 1):
        raise UsageError(
            f"a qcow2 cluster cannot have {cluster_size} bytes, which must be a power of two from 512"
        )
    clusters = -(-volume_size // cluster_size)
    l2 = _whole(clusters * _L2_ENTRY_BYTES, cluster_size)
    refcount = _whole(clusters * _REFCOUNT_BYTES * _VERSIONS, cluster_size)
    return Caches(max(l2, 2 * cluster_size), max(refcount, _MIN_REFCOUNT_BLOCKS * cluster_size))


def _check(volume_size: int) -> None:
    if volume_size < 0:
        raise UsageError(f"a volume cannot have {volume_size} bytes")


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit
