"""Contracts of the compiled kernels.

All buffers are C-contiguous, native-endian and of the exact dtype named; others raise ValueError,
as do shapes and numbers that do not fit together. Integers too large for int64 (the seed: uint64)
raise OverflowError. Each call releases the GIL while it works; the caller lets no other thread
write to a buffer that a call was given. Two calls that mark one `words` count as two writers even
when their clusters differ.

A bitmap holds block i in bit `i & 63` of `words[i >> 6]`. An `entries` array is an L2 table, or a
part of one, as it lies in the file: big-endian bytes viewed as native uint64. With extended L2
(`words_per_entry` = 2, clusters of 2**14 bytes or more) an entry is two words, the second a bitmap: bit i
of its low half says that subcluster i is stored, bit 32 + i that it reads as zeros.
"""

import numpy as np
from numpy.typing import NDArray

HASH_KERNEL: str
"""What `hash_blocks` runs on: "libxxhash x.y.z" (compiled in), or "python-xxhash"."""

def mark_allocated(
    entries: NDArray[np.uint64],
    first_cluster: int,
    cluster_bits: int,
    words: NDArray[np.uint64],
    blocks: int,
    words_per_entry: int = 1,
) -> int:
    """Set the bit of every block touched by a cluster that stores data.

    entries: uint64[n * words_per_entry], the entries of clusters first_cluster ..
    first_cluster + n - 1 of the volume. One stores data if it is compressed (bit 62), or has no zero
    flag (bit 0) and an offset; an extended one if it is compressed or any of its subclusters is stored.
    Nothing is checked here, but an entry whose offset is not aligned is marked as well, so that its
    reader finds it invalid. A zero flag in a version 2 image is not seen.
    words: uint64[>= ceil(blocks / 64)]. Bits are only added; those from `blocks` on stay 0.

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
    """Set the bit of every block touched by a cluster whose entries differ.

    COPIED (bit 63) does not count as a difference, every other bit does, those of a bitmap too.

    a, b: uint64[n * words_per_entry] each, otherwise as `mark_allocated`. Give zeros for a table that one
    side lacks.

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
    """Classify entries in qemu's order and find where in the file their clusters are.

    entries: uint64[n * words_per_entry]; kinds, offsets and lengths have n rows, row i for entry i.
    kinds: 0 unallocated, 1 normal, 2 zero plain, 3 zero allocated, 4 compressed; with extended L2 these are
    of entries whose 32 subclusters are alike, and 5 is one that needs its bitmap to be told.
    offsets: host byte offset, 0 where there is none. lengths: for a compressed cluster the upper
    bound of its compressed size in bytes, 1 to 4 MiB; its end may lie past the end of the file.
    Otherwise 0.
    version: 2 or 3. file_size: bytes.

    Returns -1, or the index of the first invalid entry: a host offset that is not a multiple of the
    cluster size (compressed ones may have any) or is at or past file_size, or a zero flag in a version 2
    image; with extended L2 also a subcluster that is both stored and zero, or stored without an offset.
    Rows from that index on are left as they were.
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
    """Find where in a table something else begins: holes, zeros, data, and what differs from another table.

    entries: uint64[n * words_per_entry]. other: None, or a table of the same length; where their entries
    differ in more than COPIED, the kind has 4 added. starts and kinds: at least n rows each, 32 n with
    extended L2. A row's start is the number of a cluster, from 0, or with extended L2 of a subcluster; its
    kind is 0 for a hole, 1 for zeros, 2 for data. It goes on to the next row's start. Neighbours differ.

    Returns the number of rows, and -1 or the index of the first entry that is invalid as for `decode_l2`;
    then the rows tell of those before it.
    """

def bitmap_runs(words: NDArray[np.uint64], first: int, stop: int, runs: NDArray[np.int64]) -> tuple[int, int]:
    """Find the runs [start, stop) of set bits within [first, stop), in order.

    words: uint64 with at least `stop` bits. runs: int64[m, 2], m > 0; at most m rows are written.
    Runs are maximal within [first, stop): one that goes on outside is cut there.

    Returns (rows written, the next bit to look at). The latter is `stop` when nothing is left.
    """

def hash_blocks(data: NDArray[np.uint8], block_size: int, seed: int, digests: NDArray[np.uint8]) -> None:
    """Write the XXH3-128 digest of each block of `data`, in the canonical big-endian form.

    data: uint8[n * block_size]. seed: 0 to 2**64 - 1. digests: uint8[n, 16]. Equal to
    `xxhash.xxh3_128_digest(block, seed)`, whichever HASH_KERNEL is in use. Without the compiled one
    the GIL is held between blocks.
    """

def zero_blocks(data: NDArray[np.uint8], block_size: int, flags: NDArray[np.uint8]) -> int:
    """Set flags[i] to 1 where block i of `data` is all zero bytes, else to 0.

    data: uint8[n * block_size]. flags: uint8[n]. Returns the number of zero blocks.
    """

def copy_ranges(
    source: NDArray[np.uint8],
    source_offsets: NDArray[np.int64],
    lengths: NDArray[np.int64],
    target: NDArray[np.uint8],
    target_offsets: NDArray[np.int64],
) -> int:
    """Copy ranges of bytes from one buffer to another, in order.

    source_offsets, lengths, target_offsets: int64[n], bytes. All ranges are checked before any is copied:
    one that is negative or not wholly inside its buffer raises ValueError. Source and target may overlap,
    each range is then copied as if through a third buffer; the target must not overlap the three columns.

    Returns the number of bytes copied.
    """

def _hash_with_package(
    data: NDArray[np.uint8], block_size: int, seed: int, digests: NDArray[np.uint8]
) -> None:
    """Do the work of `hash_blocks` without the compiled hash: for shapes already checked, n > 0."""
