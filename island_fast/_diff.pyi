"""Contracts of the compiled kernels.

Buffers must be C-contiguous, native-endian and of the exact dtype named. Other buffers raise ValueError, as
do shapes and numbers that contradict each other. Integers too large for int64 (the seed: uint64) raise
OverflowError. Each call releases the GIL while it works. No other thread may write to a buffer that a call
was given; two calls that set bits in the same `words` are two writers, even if their clusters differ.

A bitmap holds block i in bit `i & 63` of `words[i >> 6]`. An `entries` array is an L2 table, or a part of
one, as it is in the file: big-endian bytes viewed as native uint64. With extended L2 (`words_per_entry` = 2,
clusters of 2**14 bytes or more) an entry is two words. The second is a bitmap: bit i of its low half says
that subcluster i is stored, bit 32 + i that it reads as zeros.
"""

import numpy as np
from numpy.typing import NDArray

HASH_KERNEL: str
"""What `hash_blocks` uses: "libxxhash x.y.z" (compiled in), or "python-xxhash" (the package)."""

def mark_allocated(
    entries: NDArray[np.uint64],
    first_cluster: int,
    cluster_bits: int,
    words: NDArray[np.uint64],
    blocks: int,
    words_per_entry: int = 1,
) -> int:
    """Set the bit of every block that overlaps a cluster that stores data.

    entries: uint64[n * words_per_entry], the entries of clusters first_cluster .. first_cluster + n - 1 of
        the volume. An entry stores data if it is compressed (bit 62), or has an offset and no zero flag
        (bit 0); an extended one if it is compressed or any of its subclusters is stored. Entries are not
        validated, but one whose offset is not aligned counts as data, so that its reader finds it invalid.
        A zero flag in a version 2 image is not noticed.
    words: uint64[>= ceil(blocks / 64)]. Bits are only set, never cleared; those from `blocks` on stay 0.

    Returns the number of such clusters that begin before the end of the last block.
    """

def mark_changed(
    a: NDArray[np.uint64],
    b: NDArray[np.uint64],
    first_cluster: int,
    cluster_bits: int,
    words: NDArray[np.uint64],
    blocks: int,
    words_per_entry: int = 1,
) -> int:
    """Set the bit of every block that overlaps a cluster whose entries differ.

    COPIED (bit 63) does not count as a difference. Every other bit does, including those of a bitmap.

    a, b: uint64[n * words_per_entry] each; give zeros for a table that one side lacks. All else is as for
        `mark_allocated`.

    Returns the number of such clusters that begin before the end of the last block.
    """

def decode_l2(
    entries: NDArray[np.uint64],
    cluster_bits: int,
    version: int,
    file_size: int,
    kinds: NDArray[np.uint8],
    offsets: NDArray[np.uint64],
    lengths: NDArray[np.uint32],
    words_per_entry: int = 1,
) -> int:
    """Decode and check entries in QEMU's order: what each is, and where in the file its cluster is.

    entries: uint64[n * words_per_entry]; kinds, offsets and lengths have n rows, row i for entry i.
    version: 2 or 3.
    file_size: bytes.
    kinds: 0 unallocated, 1 normal, 2 zero without an offset, 3 zero with one, 4 compressed. With extended L2
        these are for entries whose 32 subclusters are alike; 5 is an entry whose subclusters differ, so that
        its bitmap must be read.
    offsets: offset in the file in bytes, 0 where there is none.
    lengths: for a compressed cluster the upper bound of its compressed size in bytes, 1 to 4 MiB, whose end
        can lie past the end of the file; otherwise 0.

    Returns -1, or the index of the first invalid entry; rows from that index on are not written. An entry is
    invalid if its offset is at or past file_size, or not a multiple of the cluster size (a compressed one can
    have any), or if it has a zero flag in a version 2 image; with extended L2 also if a subcluster is both
    stored and zero, or stored without an offset.
    """

def map_l2(
    entries: NDArray[np.uint64],
    other: NDArray[np.uint64] | None,
    cluster_bits: int,
    version: int,
    file_size: int,
    starts: NDArray[np.int64],
    kinds: NDArray[np.uint8],
    words_per_entry: int = 1,
) -> tuple[int, int]:
    """Find the extents of a table: holes, zeros and data, and which of them differ from another table.

    entries: uint64[n * words_per_entry].
    other: None, or a table of the same length; where the entries differ in more than COPIED, the kind has 4
        added.
    starts, kinds: at least n rows each, with extended L2 at least 32 n. Each row that is written begins an
        extent, which ends where the next row starts; neighbours differ in kind. Its start is the number of a
        cluster, counted from 0, or with extended L2 of a subcluster. Its kind is 0 for a hole, 1 for zeros,
        2 for data.

    Returns (rows written, -1 or the index of the first invalid entry, see `decode_l2`). If an entry is
    invalid, the rows are for the entries before it.
    """

def bitmap_runs(words: NDArray[np.uint64], first: int, stop: int, runs: NDArray[np.int64]) -> tuple[int, int]:
    """Find the runs [start, stop) of set bits within [first, stop), in order.

    words: uint64, at least `stop` bits.
    runs: int64[m, 2], m > 0; at most m rows are written. A run that continues outside of [first, stop) is
        cut there.

    Returns (rows written, the bit to continue at), the latter being `stop` if no run is left.
    """

def hash_blocks(data: NDArray[np.uint8], block_size: int, seed: int, digests: NDArray[np.uint8]) -> None:
    """Write the XXH3-128 digest of each block of `data`, in the canonical big-endian form.

    data: uint8[n * block_size].
    seed: 0 to 2**64 - 1.
    digests: uint8[n, 16]; equal to `xxhash.xxh3_128_digest(block, seed)`, whatever HASH_KERNEL is. With
        "python-xxhash" the GIL is held between blocks.
    """

def zero_blocks(data: NDArray[np.uint8], block_size: int, flags: NDArray[np.uint8]) -> int:
    """Set flags[i] to 1 if all bytes of block i of `data` are zero, otherwise to 0.

    data: uint8[n * block_size]. flags: uint8[n].

    Returns the number of zero blocks.
    """

def copy_ranges(
    source: NDArray[np.uint8],
    source_offsets: NDArray[np.int64],
    lengths: NDArray[np.int64],
    target: NDArray[np.uint8],
    target_offsets: NDArray[np.int64],
) -> int:
    """Copy ranges of bytes from one buffer to another, in order.

    source_offsets, lengths, target_offsets: int64[n], bytes. All ranges are checked before any is copied; one
        that is negative or not completely inside its buffer raises ValueError.
    source, target: they can overlap; then each range is copied as if through a third buffer. The target must
        not overlap the three arrays of numbers.

    Returns the number of bytes copied.
    """

def _hash_with_package(
    data: NDArray[np.uint8], block_size: int, seed: int, digests: NDArray[np.uint8]
) -> None:
    """Do the work of `hash_blocks` with the Python package; shapes must be checked, and n > 0."""
