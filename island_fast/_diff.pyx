"""Kernels: loops over L2 entries, bitmap words and block bytes.

Each public function checks the shapes and ranges of its arguments, then releases the GIL and runs
one loop over borrowed buffers. It allocates nothing and keeps nothing after the call. `_diff.pyi`
has the contracts.

L2 entries are compared as they are in the file, big-endian, with constants swapped at compile time;
the loops over them are in `_l2.pxi`.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memmove, memset

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
    /* The second word of an extended entry: a bit for each subcluster that is stored. */
    #define BITMAP_STORED __builtin_bswap64(0x00000000ffffffffull)

    /* Multiplied by eight bytes that are 0 or 1, it gathers them as the bits of the highest byte. */
    #define GATHER_EIGHT 0x0102040810204080ull

    /* Kinds of extents: 0 hole, 1 zero, 2 data. The index is the kind of an entry (see decode_l2). */
    #define EXTENT_CHANGED 4
    static const uint8_t EXTENT_OF_KIND[5] = {0, 2, 1, 1, 2};

    /* ISLAND_FAST_PYTHON_XXHASH selects the Python package even if the header exists. */
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
    const uint64_t BITMAP_STORED
    const uint64_t GATHER_EIGHT
    const int EXTENT_CHANGED
    const uint8_t *EXTENT_OF_KIND
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
    MIN_EXTENDED_BITS = 14
    DIGEST_SIZE = 16

# No volume is larger than 2**63 bytes. With these limits, no shift below overflows int64.
cdef int64_t MAX_BLOCKS = 1ll << (63 - BLOCK_BITS)
cdef int64_t MAX_CLUSTERS = 1ll << (63 - MIN_CLUSTER_BITS)


# --- L2 tables ---


cdef int64_t count_entries(int64_t words, int cluster_bits, int words_per_entry) except -1:
    cdef int lowest = MIN_CLUSTER_BITS if words_per_entry == 1 else MIN_EXTENDED_BITS
    if not 1 <= words_per_entry <= 2:
        raise ValueError(f"words_per_entry is {words_per_entry}, not 1 or 2")
    if not lowest <= cluster_bits <= MAX_CLUSTER_BITS:
        raise ValueError(f"cluster_bits is {cluster_bits}, not within {lowest}..{MAX_CLUSTER_BITS}")
    if words % words_per_entry:
        raise ValueError(f"{words} words are not a whole number of extended entries")
    return words // words_per_entry


cdef int check_map(int64_t first_cluster, int64_t words, int64_t blocks) except -1:
    if not 0 <= first_cluster <= MAX_CLUSTERS:
        raise ValueError(f"first_cluster is {first_cluster}, not within 0..{MAX_CLUSTERS}")
    if not 0 <= blocks <= MAX_BLOCKS:
        raise ValueError(f"blocks is {blocks}, not within 0..{MAX_BLOCKS}")
    if words < (blocks + 63) >> 6:
        raise ValueError(f"a bitmap of {words} words is too short for {blocks} blocks")
    return 0


include "_l2.pxi"


def mark_allocated(const uint64_t[::1] entries, int64_t first_cluster, int cluster_bits,
                   uint64_t[::1] words, int64_t blocks, int words_per_entry=1):
    cdef int64_t found, count = count_entries(entries.shape[0], cluster_bits, words_per_entry)
    check_map(first_cluster, words.shape[0], blocks)
    if count == 0 or blocks == 0:
        return 0
    with nogil:
        found = mark(&entries[0], NULL, count, words_per_entry, first_cluster, cluster_bits,
                     &words[0], blocks)
    return found


def mark_changed(const uint64_t[::1] a, const uint64_t[::1] b, int64_t first_cluster,
                 int cluster_bits, uint64_t[::1] words, int64_t blocks, int words_per_entry=1):
    cdef int64_t found, count = count_entries(a.shape[0], cluster_bits, words_per_entry)
    check_map(first_cluster, words.shape[0], blocks)
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"tables of {a.shape[0]} and {b.shape[0]} words cannot be compared")
    if count == 0 or blocks == 0:
        return 0
    with nogil:
        found = mark(&a[0], &b[0], count, words_per_entry, first_cluster, cluster_bits, &words[0],
                     blocks)
    return found


def decode_l2(const uint64_t[::1] entries, int cluster_bits, int version, int64_t file_size,
              uint8_t[::1] kinds, uint64_t[::1] offsets, uint32_t[::1] lengths,
              int words_per_entry=1):
    cdef int64_t invalid, count = count_entries(entries.shape[0], cluster_bits, words_per_entry)
    if version not in (2, 3):
        raise ValueError(f"version is {version}, not 2 or 3")
    if file_size < 0:
        raise ValueError(f"file_size is {file_size}")
    if kinds.shape[0] != count or offsets.shape[0] != count or lengths.shape[0] != count:
        raise ValueError(f"kinds, offsets and lengths must have {count} rows, like entries")
    if count == 0:
        return -1
    with nogil:
        invalid = decode(&entries[0], count, words_per_entry, cluster_bits, version == 3, file_size,
                         &kinds[0], &offsets[0], &lengths[0])
    return invalid


def map_l2(const uint64_t[::1] entries, const uint64_t[::1] other, int cluster_bits, int version,
           int64_t file_size, int64_t[::1] starts, uint8_t[::1] kinds, int words_per_entry=1):
    cdef int64_t rows, bad = -1, count = count_entries(entries.shape[0], cluster_bits, words_per_entry)
    cdef int64_t room = count if words_per_entry == 1 else 32 * count
    cdef const uint64_t *then = NULL
    if version not in (2, 3):
        raise ValueError(f"version is {version}, not 2 or 3")
    if file_size < 0:
        raise ValueError(f"file_size is {file_size}")
    if other is not None and other.shape[0] != entries.shape[0]:
        raise ValueError(f"tables of {entries.shape[0]} and {other.shape[0]} words cannot be compared")
    if starts.shape[0] < room or kinds.shape[0] < room:
        raise ValueError(f"starts and kinds must have room for {room} rows")
    if count == 0:
        return 0, -1
    if other is not None:
        then = &other[0]
    with nogil:
        rows = map_entries(&entries[0], then, count, words_per_entry, cluster_bits, version == 3,
                           file_size, &starts[0], &kinds[0], &bad)
    return rows, bad


# --- Bitmaps ---


cdef inline int64_t find_bit(const uint64_t *words, int64_t at, int64_t stop,
                             uint64_t flip) noexcept nogil:
    """Return the first set bit of `words ^ flip` within [at, stop), or stop."""
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
    """Write at most `rows` runs; return how many, and in `reached` the bit to continue at."""
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
    # hash_blocks has checked the arguments. This is the only loop over blocks in Python, for builds
    # without xxhash.h.
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
    """Return whether all bytes are 0: the first 16 are, and all others equal the byte 16 before."""
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
    """Return the index of the first range that is not within [0, size), or -1."""
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
