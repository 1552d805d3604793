"""How big a new image's clusters are, and how much of its tables a daemon keeps in memory.

To take or delete an internal snapshot, qemu goes through every cluster's table entry and reference count
while the guest's writes wait. So they wait longer if there are more clusters, and if the caches do not hold
all of the tables. The figures behind the policy are in docs/pause.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from island_fast.errors import UsageError

__all__ = ["Caches", "cache_sizes", "cluster_size", "node_options"]

_SMALLEST, _BIGGEST = 64 << 10, 2 << 20  # bytes; qemu's default, and the largest that qcow2 allows
# Of one volume; with this number, at random places, a guest waits for half a second with QEMU 7.2. QEMU 10.0
# and 11.1 take two to five times the processor time.
_MAX_CLUSTERS = 2 << 20
_L2_ENTRY_BYTES = 8
_REFCOUNT_BYTES = 2  # refcount_bits=16, qemu's default
_VERSIONS = 3  # of a volume in its file, at most: the pinned base, a new snapshot, what the guest writes now
_MIN_L2_TABLES, _MIN_REFCOUNT_BLOCKS = 2, 4  # the least that qemu accepts
_MAX_CACHE = 256 << 20  # bytes; a foreign image must not decide how much memory of this host it takes


@dataclass(frozen=True, slots=True)
class Caches:
    """qemu's two caches of one image's tables, in bytes: `l2-cache-size` and `refcount-cache-size`."""

    l2: int
    refcount: int


def cluster_size(volume_size: int) -> int:
    """Return the cluster size, in bytes, for a new image of `volume_size` bytes.

    It is the smallest from 64 KiB to 2 MiB with which the volume has few enough clusters, or 2 MiB if none
    has (volumes over 4 TiB). UsageError if the size is negative.
    """
    _check(volume_size)
    size = _SMALLEST
    while size < _BIGGEST and volume_size > _MAX_CLUSTERS * size:
        size *= 2
    return size


def cache_sizes(volume_size: int, cluster_size: int) -> Caches:
    """Return caches that hold all tables of a volume, its pinned base and a snapshot in progress.

    They are for the volume's present size, and must be computed again after it has grown. `cluster_size` is
    the image's own, whoever made it; if it is far smaller than ours, the tables can exceed the 256 MiB that
    each cache has at most. qemu takes the memory only for tables that it has read.
    """
    _check(volume_size)
    if cluster_size < 512 or cluster_size & (cluster_size - 1):
        raise UsageError(f"a qcow2 cluster cannot have {cluster_size} bytes; it is a power of two from 512")
    clusters = -(-volume_size // cluster_size)
    most = _MAX_CACHE // cluster_size
    tables = min(-(-clusters * _L2_ENTRY_BYTES // cluster_size), most)
    blocks = min(-(-clusters * _REFCOUNT_BYTES * _VERSIONS // cluster_size), most - 1)
    # Blocks lie a power of two apart, and qemu looks for one at a multiple of that modulo the number of
    # places. With an even number many blocks want the same place, which more than doubles the wait.
    blocks = max(blocks, _MIN_REFCOUNT_BLOCKS) | 1
    return Caches(max(tables, _MIN_L2_TABLES) * cluster_size, blocks * cluster_size)


def node_options(volume_size: int, cluster_size: int) -> dict[str, int | bool]:
    """Return the options of a qcow2 node in qemu with which deleting a snapshot does not hold up the guest.

    They are `cache_sizes`, and an option that clusters freed by deleting a snapshot are not punched out of
    the file. qemu (7.2 to 11.1) queues these holes in a list that it searches twice for each cluster, and
    punches them while the guest waits: for 65 536 clusters at random places this took 17 s, without it 0.2 s.
    The file keeps the space, and qemu writes there before it lets the file grow. Discards of what no snapshot
    holds are not affected.
    """
    caches = cache_sizes(volume_size, cluster_size)
    return {
        "l2-cache-size": caches.l2,
        "refcount-cache-size": caches.refcount,
        "pass-discard-snapshot": False,
    }


def _check(volume_size: int) -> None:
    if volume_size < 0:
        raise UsageError(f"a volume cannot have {volume_size} bytes")
