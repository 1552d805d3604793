"""Kernels: loops over L2 entries, bitmap words and block bytes.

Each public function checks the shapes and ranges of what it was given, then releases the GIL and
runs one loop over borrowed buffers. Nothing is allocated and nothing is kept after the call.
Contracts: `_diff.pyi`.

L2 entries are compared as they lie in the file, big-endian, with constants swapped at compile time.
Groups of 64 clusters, counted from cluster 0, become one mask each, laid over the block bitmap.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memmove

cdef extern from *:
    """
    #include <stdint.h>

    #if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "bitmaps are little-endian words: island_fast needs a little-endian machine"
    #endif

    /* Bits of an L2 entry (qcow2 specification, "Cluster mapping"), swapped as in the file. */
    #define ENTRY_COPIED __builtin_bswap64(1ull << 63)
    #define ENTRY_COMPRESSED __builtin_bswap64(1ull << 62)
    #define ENTRY_ZERO __builtin_bswap64(1ull)
    #define ENTRY_OFFSET __builtin_bswap64(0x00fffffffffffe00ull)

    /* ISLAND_FAST_PYTHON_XXHASH builds the other path on a machine that has the header. */
    #if defined(__has_include) && !defined(ISLAND_FAST_PYTHON_XXHASH)
    #if __has_include(<xxhash.h>)
    #define XXH_INLINE_ALL
    #include <xxhash.h>
    #if XXH_VERSION_NUMBER >= 800
    #define ISLAND_LIBXXHASH
    #endif
    #endif
    #endif

    #define ISLAND_TEXT_(x) #x
    #define ISLAND_TEXT(x) ISLAND_TEXT_(x)
    #ifdef ISLAND_LIBXXHASH
    #define ISLAND_HASH_KERNEL "libxxhash " ISLAND_TEXT(XXH_VERSION_MAJOR) \\
        "." ISLAND_TEXT(XXH_VERSION_MINOR) "." ISLAND_TEXT(XXH_VERSION_RELEASE)
    #define ISLAND_NATIVE_HASH 1
    static void island_digest(const uint8_t *data, int64_t size, uint64_t seed, uint8_t *digest)
    {
        XXH128_canonicalFromHash((XXH128_canonical_t *)digest,
                                 XXH3_128bits_withSeed(data, (size_t)size, seed));
    }
    #else
    #define ISLAND_HASH_KERNEL "python-xxhash"
    #define ISLAND_NATIVE_HASH 0
    #define island_digest(data, size, seed, digest) \\
        ((void)(data), (void)(size), (void)(seed), (void)(digest))
    #endif
    """
    const uint64_t ENTRY_COPIED
    const uint64_t ENTRY_COMPRESSED
    const uint64_t ENTRY_ZERO
    const uint64_t ENTRY_OFFSET
    const char *ISLAND_HASH_KERNEL
    const bint ISLAND_NATIVE_HASH
    void island_digest(const uint8_t *data, int64_t size, uint64_t seed,
                       uint8_t *digest) noexcept nogil
    uint64_t bswap64 "__builtin_bswap64"(uint64_t value) noexcept nogil
    int lowest_bit "__builtin_ctzll"(uint64_t value) noexcept nogil
    int count_bits "__builtin_popcountll"(uint64_t value) noexcept nogil

HASH_KERNEL = ISLAND_HASH_KERNEL.decode("ascii")

cdef enum:
    BLOCK_BITS = 16
    MIN_CLUSTER_BITS = 9
    MAX_CLUSTER_BITS = 21
    DIGEST_SIZE = 16

# No volume is larger than 2**63 bytes; these keep every shift below inside int64.
cdef int64_t MAX_BLOCKS = 1ll << (63 - BLOCK_BITS)
cdef int64_t MAX_CLUSTERS = 1ll << (63 - MIN_CLUSTER_BITS)


# --- L2 tables ---


cdef int check_entries(int cluster_bits, int words_per_entry) except -1:
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise ValueError(
            f"cluster_bits is {cluster_bits}, not within {MIN_CLUSTER_BITS}..{MAX_CLUSTER_BITS}"
        )
    if words_per_entry != 1:
        raise ValueError(f"L2 entries of {words_per_entry} words (extended L2) are not read")
    return 0


cdef int check_map(int64_t first_cluster, int64_t words, int64_t blocks) except -1:
    if not 0 <= first_cluster <= MAX_CLUSTERS:
        raise ValueError(f"first_cluster is {first_cluster}, not within 0..{MAX_CLUSTERS}")
    if not 0 <= blocks <= MAX_BLOCKS:
        raise ValueError(f"blocks is {blocks}, not within 0..{MAX_BLOCKS}")
    if words < (blocks + 63) >> 6:
        raise ValueError(f"a bitmap of {words} words is too short for {blocks} blocks")
    return 0


cdef inline uint64_t allocated_mask(const uint64_t *entries, int count) noexcept nogil:
    """Bit i: entry i is NORMAL or compressed."""
    cdef uint64_t mask = 0, any_bit = 0, entry, stored
    cdef int i
    for i in range(count):
        any_bit |= entries[i]
    if not any_bit:
        return 0
    for i in range(count):
        entry = entries[i]
        stored = ((entry & ENTRY_ZERO) == 0) & ((entry & ENTRY_OFFSET) != 0)
        mask |= (stored | ((entry & ENTRY_COMPRESSED) != 0)) << i
    return mask


cdef inline uint64_t changed_mask(const uint64_t *a, const uint64_t *b, int count) noexcept nogil:
    """Bit i: entries i differ in more than COPIED."""
    cdef uint64_t mask = 0, any_bit = 0
    cdef int i
    for i in range(count):
        any_bit |= a[i] ^ b[i]
    if not any_bit & ~ENTRY_COPIED:
        return 0
    for i in range(count):
        mask |= <uint64_t>(((a[i] ^ b[i]) & ~ENTRY_COPIED) != 0) << i
    return mask


cdef inline void lay_small(uint64_t mask, int64_t group, int shift, uint64_t *words) noexcept nogil:
    """Clusters smaller than a block: 1 << shift of them, 2 to 128, share each bit."""
    cdef int64_t block = (group << 6) >> shift
    cdef uint64_t bits = 0
    cdef int step
    if shift >= 6:
        bits = 1
    else:
        for step in range(shift):
            mask |= mask >> (1 << step)
        mask &= (<uint64_t>-1) // (((<uint64_t>1) << (1 << shift)) - 1)
        while mask:
            bits |= (<uint64_t>1) << (lowest_bit(mask) >> shift)
            mask &= mask - 1
    words[block >> 6] |= bits << (block & 63)


cdef inline void lay_large(uint64_t mask, int64_t group, int shift, uint64_t *words) noexcept nogil:
    """Clusters larger than a block: each sets 1 << shift bits, 2 to 32, that lie in one word."""
    cdef uint64_t cluster = ((<uint64_t>1) << (1 << shift)) - 1
    cdef int64_t block, word
    if mask == <uint64_t>-1:
        for word in range(group << shift, (group + 1) << shift):
            words[word] = mask
        return
    while mask:
        block = ((group << 6) + lowest_bit(mask)) << shift
        words[block >> 6] |= cluster << (block & 63)
        mask &= mask - 1


cdef inline void lay(uint64_t mask, int64_t group, int cluster_bits,
                     uint64_t *words) noexcept nogil:
    """Set the bits of the blocks that the clusters in `mask` touch; bit i: cluster 64 group + i."""
    if cluster_bits == BLOCK_BITS:
        words[group] |= mask
    elif cluster_bits < BLOCK_BITS:
        lay_small(mask, group, BLOCK_BITS - cluster_bits, words)
    else:
        lay_large(mask, group, cluster_bits - BLOCK_BITS, words)


cdef int64_t clusters_of(int64_t blocks, int cluster_bits) noexcept nogil:
    """How many clusters begin within `blocks` blocks."""
    if cluster_bits <= BLOCK_BITS:
        return blocks << (BLOCK_BITS - cluster_bits)
    return (blocks + (1ll << (cluster_bits - BLOCK_BITS)) - 1) >> (cluster_bits - BLOCK_BITS)


cdef int64_t mark(const uint64_t *a, const uint64_t *b, int64_t count, int64_t first,
                  int cluster_bits, uint64_t *words, int64_t blocks) noexcept nogil:
    """Mark where `a` is allocated, or where it differs from `b` if that is not NULL."""
    cdef int64_t done = 0, found = 0, left = clusters_of(blocks, cluster_bits) - first
    cdef int position, size
    cdef uint64_t mask
    count = min(count, left)
    while done < count:
        position = (first + done) & 63
        size = <int>min(64 - position, count - done)
        if b == NULL:
            mask = allocated_mask(a + done, size)
        else:
            mask = changed_mask(a + done, b + done, size)
        if mask:
            found += count_bits(mask)
            lay(mask << position, (first + done) >> 6, cluster_bits, words)
        done += size
    # Only the last cluster, when larger than a block, can have gone past the end.
    if found and blocks & 63:
        words[blocks >> 6] &= ((<uint64_t>1) << (blocks & 63)) - 1
    return found


def mark_allocated(const uint64_t[::1] entries, int64_t first_cluster, int cluster_bits,
                   uint64_t[::1] words, int64_t blocks, int words_per_entry=1):
    cdef int64_t found
    check_entries(cluster_bits, words_per_entry)
    check_map(first_cluster, words.shape[0], blocks)
    if entries.shape[0] == 0 or blocks == 0:
        return 0
    with nogil:
        found = mark(
            &entries[0], NULL, entries.shape[0], first_cluster, cluster_bits, &words[0], blocks
        )
    return found


def mark_changed(const uint64_t[::1] a, const uint64_t[::1] b, int64_t first_cluster,
                 int cluster_bits, uint64_t[::1] words, int64_t blocks, int words_per_entry=1):
    cdef int64_t found
    check_entries(cluster_bits, words_per_entry)
    check_map(first_cluster, words.shape[0], blocks)
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"tables of {a.shape[0]} and {b.shape[0]} entries cannot be compared")
    if a.shape[0] == 0 or blocks == 0:
        return 0
    with nogil:
        found = mark(&a[0], &b[0], a.shape[0], first_cluster, cluster_bits, &words[0], blocks)
    return found


cdef struct Decoded:
    uint8_t kind
    uint64_t offset
    uint32_t length


cdef inline bint decode_entry(uint64_t raw, int cluster_bits, bint zero_allowed, uint64_t file_size,
                              Decoded *out) noexcept nogil:
    """Decode one entry, in the order of qemu's checks; false if it is invalid."""
    cdef uint64_t entry = bswap64(raw), in_cluster = ((<uint64_t>1) << cluster_bits) - 1
    cdef int offset_bits = 62 - (cluster_bits - 8)
    cdef bint zero, placed
    if raw & ENTRY_COMPRESSED:
        out.kind = 4
        out.offset = entry & (((<uint64_t>1) << offset_bits) - 1)
        entry = (entry >> offset_bits) & (((<uint64_t>1) << (cluster_bits - 8)) - 1)
        out.length = <uint32_t>((entry + 1) * 512 - (out.offset & 511))
        return out.offset < file_size
    # Without branches from here: which kind comes next cannot be predicted.
    out.offset = bswap64(raw & ENTRY_OFFSET)
    out.length = 0
    placed = out.offset != 0
    zero = (raw & ENTRY_ZERO) != 0
    out.kind = <uint8_t>(placed + 2 * zero)
    return (((out.offset & in_cluster) == 0) & ((out.offset < file_size) | (not placed))
            & (zero_allowed | (not zero)))


cdef int64_t decode(const uint64_t *entries, int64_t count, int cluster_bits, bint zero_allowed,
                    uint64_t file_size, uint8_t *kinds, uint64_t *offsets,
                    uint32_t *lengths) noexcept nogil:
    """Fill the columns; -1, or the index of the first invalid entry."""
    cdef int64_t i
    cdef Decoded entry
    for i in range(count):
        if not decode_entry(entries[i], cluster_bits, zero_allowed, file_size, &entry):
            return i
        kinds[i] = entry.kind
        offsets[i] = entry.offset
        lengths[i] = entry.length
    return -1


def decode_l2(const uint64_t[::1] entries, int cluster_bits, int version, int64_t file_size,
              uint8_t[::1] kinds, uint64_t[::1] offsets, uint32_t[::1] lengths,
              int words_per_entry=1):
    cdef int64_t count = entries.shape[0], invalid
    check_entries(cluster_bits, words_per_entry)
    if version not in (2, 3):
        raise ValueError(f"version is {version}, not 2 or 3")
    if file_size < 0:
        raise ValueError(f"file_size is {file_size}")
    if kinds.shape[0] != count or offsets.shape[0] != count or lengths.shape[0] != count:
        raise ValueError(f"kinds, offsets and lengths must have {count} rows, like entries")
    if count == 0:
        return -1
    with nogil:
        invalid = decode(&entries[0], count, cluster_bits, version == 3, file_size,
                         &kinds[0], &offsets[0], &lengths[0])
    return invalid


# --- Bitmaps ---


cdef inline int64_t find_bit(const uint64_t *words, int64_t at, int64_t stop,
                             uint64_t flip) noexcept nogil:
    """First set bit of `words ^ flip` within [at, stop), or stop."""
    cdef int64_t word = at >> 6, last = (stop - 1) >> 6
    cdef uint64_t bits
    if at >= stop:
        return stop
    bits = (words[word] ^ flip) & (<uint64_t>-1 << (at & 63))
    while not bits:
        if word == last:
            return stop
        word += 1
        bits = words[word] ^ flip
    return min((word << 6) + lowest_bit(bits), stop)


cdef int64_t fill_runs(const uint64_t *words, int64_t first, int64_t stop, int64_t *runs,
                       int64_t rows, int64_t *reached) noexcept nogil:
    """Write at most `rows` runs; how many were written, and in `reached` the next bit to look at."""
    cdef int64_t row = 0, start
    while row < rows:
        start = find_bit(words, first, stop, 0)
        if start == stop:
            first = stop
            break
        first = find_bit(words, start, stop, <uint64_t>-1)
        runs[2 * row] = start
        runs[2 * row + 1] = first
        row += 1
    reached[0] = first
    return row


def bitmap_runs(const uint64_t[::1] words, int64_t first, int64_t stop, int64_t[:, ::1] runs):
    cdef int64_t rows, reached = stop
    if not 0 <= first <= stop or stop > words.shape[0] * 64:
        raise ValueError(f"[{first}, {stop}) is not within a bitmap of {words.shape[0]} words")
    if runs.shape[1] != 2 or runs.shape[0] == 0:
        raise ValueError(f"runs is {runs.shape[0]} x {runs.shape[1]}, not n x 2 with n > 0")
    if first == stop:
        return 0, stop
    with nogil:
        rows = fill_runs(&words[0], first, stop, &runs[0, 0], runs.shape[0], &reached)
    return rows, reached


# --- Blocks ---


cdef int64_t count_blocks(int64_t size, int64_t block_size) except -1:
    if block_size <= 0 or size % block_size:
        raise ValueError(f"{size} bytes are not a whole number of blocks of {block_size} bytes")
    return size // block_size


def _hash_with_package(data, block_size, seed, digests):
    # Takes what hash_blocks has checked. The one loop over blocks in Python, for want of xxhash.h.
    from xxhash import xxh3_128_digest

    view = memoryview(data)
    rows = memoryview(digests).cast("B")
    for row in range(len(digests)):
        digest = xxh3_128_digest(view[row * block_size:(row + 1) * block_size], seed)
        rows[row * DIGEST_SIZE:(row + 1) * DIGEST_SIZE] = digest


def hash_blocks(const uint8_t[::1] data, int64_t block_size, uint64_t seed,
                uint8_t[:, ::1] digests):
    cdef int64_t row, count = count_blocks(data.shape[0], block_size)
    if digests.shape[0] != count or digests.shape[1] != DIGEST_SIZE:
        raise ValueError(
            f"digests is {digests.shape[0]} x {digests.shape[1]}, not {count} x {DIGEST_SIZE}"
        )
    if count == 0:
        return
    if not ISLAND_NATIVE_HASH:
        _hash_with_package(data, block_size, seed, digests)
        return
    with nogil:
        for row in range(count):
            island_digest(&data[row * block_size], block_size, seed, &digests[row, 0])


cdef inline bint is_zero(const uint8_t *data, int64_t size) noexcept nogil:
    """Compare the bytes with themselves 16 further on, behind 16 that are looked at one by one."""
    cdef int64_t i, head = min(size, 16)
    for i in range(head):
        if data[i]:
            return False
    return size == head or memcmp(data, data + head, size - head) == 0


def zero_blocks(const uint8_t[::1] data, int64_t block_size, uint8_t[::1] flags):
    cdef int64_t row, found = 0, count = count_blocks(data.shape[0], block_size)
    if flags.shape[0] != count:
        raise ValueError(f"flags has {flags.shape[0]} rows for {count} blocks")
    if count == 0:
        return 0
    with nogil:
        for row in range(count):
            flags[row] = is_zero(&data[row * block_size], block_size)
            found += flags[row]
    return found


cdef int64_t outside(const int64_t *offsets, const int64_t *lengths, int64_t count,
                     int64_t size) noexcept nogil:
    """Index of the first range that is not within [0, size), or -1."""
    cdef int64_t i
    for i in range(count):
        if lengths[i] < 0 or offsets[i] < 0 or lengths[i] > size or offsets[i] > size - lengths[i]:
            return i
    return -1


cdef int check_ranges(const int64_t[::1] offsets, const int64_t[::1] lengths,
                      int64_t size) except -1:
    cdef int64_t bad
    if offsets.shape[0] != lengths.shape[0]:
        raise ValueError(f"{offsets.shape[0]} offsets for {lengths.shape[0]} lengths")
    if lengths.shape[0] == 0:
        return 0
    with nogil:
        bad = outside(&offsets[0], &lengths[0], lengths.shape[0], size)
    if bad >= 0:
        raise ValueError(
            f"range {bad}, {lengths[bad]} bytes at {offsets[bad]}, is not within {size} bytes"
        )
    return 0


def copy_ranges(const uint8_t[::1] source, const int64_t[::1] source_offsets,
                const int64_t[::1] lengths, uint8_t[::1] target,
                const int64_t[::1] target_offsets):
    cdef int64_t row, copied = 0
    check_ranges(source_offsets, lengths, source.shape[0])
    check_ranges(target_offsets, lengths, target.shape[0])
    with nogil:
        for row in range(lengths.shape[0]):
            if lengths[row]:
                memmove(&target[target_offsets[row]], &source[source_offsets[row]], lengths[row])
                copied += lengths[row]
    return copied
