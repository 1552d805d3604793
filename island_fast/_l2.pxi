# Loops over L2 entries, a part of `_diff.pyx`. Nothing here checks its arguments or needs the GIL.
#
# An entry has `step` words: one, or two with extended L2. The second word says for each of the 32
# subclusters whether it is stored (low half) and whether it reads as zeros (high half).
# Each group of 64 clusters, counted from cluster 0, becomes one mask, which is then set in the bitmap
# of blocks.


cdef inline uint64_t top_if_any(uint64_t bits) noexcept nogil:
    """Return a number whose highest bit says whether `bits` is not 0; compilers vectorize this everywhere."""
    return bits | (0 - bits)


cdef inline uint64_t gathered(uint8_t *flags, int count) noexcept nogil:
    """Return a mask with flag i, 0 or 1, as bit i. `flags` has room for 64; `count` of them count."""
    cdef uint64_t mask = 0, eight
    cdef int i
    if count < 64:
        memset(flags + count, 0, 64 - count)
    for i in range(8):
        memcpy(&eight, flags + 8 * i, 8)
        mask |= eight * GATHER_EIGHT >> 56 << 8 * i
    return mask


cdef inline uint64_t allocated_mask(const uint64_t *entries, int count,
                                    uint64_t inside) noexcept nogil:
    """Return a mask: bit i if entry i is normal or compressed, or not aligned (see mark_allocated).

    inside: the offset bits that are 0 in an aligned entry.
    """
    cdef uint64_t any_bit = 0, placed = <uint64_t>-1, entry, stored
    cdef uint64_t special = ENTRY_COMPRESSED | inside
    cdef uint8_t flags[64]
    cdef int i
    for i in range(count):
        any_bit |= entries[i]
        placed &= top_if_any(entries[i] & ENTRY_OFFSET)
    if not any_bit:
        return 0
    # Most groups are all alike.
    if placed >> 63 and not any_bit & (special | ENTRY_ZERO):
        return (<uint64_t>-1) >> (64 - count)
    for i in range(count):
        entry = entries[i]
        stored = top_if_any(entry & ENTRY_OFFSET) & ~top_if_any(entry & ENTRY_ZERO)
        flags[i] = <uint8_t>((stored | top_if_any(entry & special)) >> 63)
    return gathered(flags, count)


cdef inline uint64_t allocated_mask_extended(const uint64_t *entries, int count,
                                             uint64_t inside) noexcept nogil:
    """Return a mask for extended entries: bit i if stored in part, compressed or not aligned."""
    cdef uint64_t mask = 0, stored
    cdef int i
    for i in range(count):
        stored = entries[2 * i + 1] & BITMAP_STORED
        mask |= <uint64_t>((stored | (entries[2 * i] & (ENTRY_COMPRESSED | inside))) != 0) << i
    return mask


cdef inline uint64_t changed_mask(const uint64_t *a, const uint64_t *b, int count,
                                  int step) noexcept nogil:
    """Return a mask: bit i if the entries i differ in more than COPIED."""
    cdef uint64_t any_bit = 0, differ
    cdef uint8_t flags[64]
    # In a bitmap of subclusters, the bit of COPIED means a subcluster.
    cdef uint64_t last = ~ENTRY_COPIED if step == 1 else <uint64_t>-1
    cdef int i
    for i in range(step * count):
        any_bit |= a[i] ^ b[i]
    if not any_bit & last:
        return 0
    for i in range(count):
        differ = (a[step * i] ^ b[step * i]) & ~ENTRY_COPIED
        if step == 2:
            differ |= a[2 * i + 1] ^ b[2 * i + 1]
        flags[i] = <uint8_t>(top_if_any(differ) >> 63)
    return gathered(flags, count)


cdef inline void lay_small(uint64_t mask, int64_t group, int shift, uint64_t *words) noexcept nogil:
    """Do it for clusters smaller than a block: 1 << shift of them, 2 to 128, share each bit."""
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
    """Do it for clusters larger than a block: each sets 1 << shift bits, 2 to 32, of one word."""
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
    """Set the bits of the blocks that overlap the clusters in `mask`, whose bit i is cluster 64 group + i."""
    if cluster_bits == BLOCK_BITS:
        words[group] |= mask
    elif cluster_bits < BLOCK_BITS:
        lay_small(mask, group, BLOCK_BITS - cluster_bits, words)
    else:
        lay_large(mask, group, cluster_bits - BLOCK_BITS, words)


cdef int64_t clusters_of(int64_t blocks, int cluster_bits) noexcept nogil:
    """Return how many clusters begin within `blocks` blocks."""
    if cluster_bits <= BLOCK_BITS:
        return blocks << (BLOCK_BITS - cluster_bits)
    return (blocks + (1ll << (cluster_bits - BLOCK_BITS)) - 1) >> (cluster_bits - BLOCK_BITS)


cdef inline uint64_t allocated_group(const uint64_t *a, int count, int step,
                                     uint64_t inside) noexcept nogil:
    if step == 1:
        return allocated_mask(a, count, inside)
    return allocated_mask_extended(a, count, inside)


cdef inline uint64_t changed_group(const uint64_t *a, const uint64_t *b, int count,
                                   int step) noexcept nogil:
    # Two calls, so that the compiler knows the step in each.
    if step == 1:
        return changed_mask(a, b, count, 1)
    return changed_mask(a, b, count, 2)


cdef int64_t mark(const uint64_t *a, const uint64_t *b, int64_t count, int step, int64_t first,
                  int cluster_bits, uint64_t *words, int64_t blocks) noexcept nogil:
    """Mark where `a` is allocated, or where it differs from `b` if that is not NULL."""
    cdef int64_t done = 0, found = 0, left = clusters_of(blocks, cluster_bits) - first
    cdef int position, size
    cdef uint64_t mask, inside = ENTRY_OFFSET & bswap64(((<uint64_t>1) << cluster_bits) - 1)
    count = min(count, left)
    while done < count:
        position = (first + done) & 63
        size = <int>min(64 - position, count - done)
        if b == NULL:
            mask = allocated_group(a + step * done, size, step, inside)
        else:
            mask = changed_group(a + step * done, b + step * done, size, step)
        if mask:
            found += count_bits(mask)
            lay(mask << position, (first + done) >> 6, cluster_bits, words)
        done += size
    # Only the last cluster, if larger than a block, can have set bits past the end.
    if found and blocks & 63:
        words[blocks >> 6] &= ((<uint64_t>1) << (blocks & 63)) - 1
    return found


cdef struct Decoded:
    uint8_t kind
    uint64_t offset
    uint32_t length


cdef inline bint decode_entry(uint64_t raw, int cluster_bits, bint zero_allowed, uint64_t file_size,
                              Decoded *out) noexcept nogil:
    """Decode one entry, with checks in QEMU's order; return whether it is valid."""
    cdef uint64_t entry = bswap64(raw), in_cluster = ((<uint64_t>1) << cluster_bits) - 1
    cdef int offset_bits = 62 - (cluster_bits - 8)
    cdef bint zero, placed
    if raw & ENTRY_COMPRESSED:
        out.kind = 4
        out.offset = entry & (((<uint64_t>1) << offset_bits) - 1)
        entry = (entry >> offset_bits) & (((<uint64_t>1) << (cluster_bits - 8)) - 1)
        out.length = <uint32_t>((entry + 1) * 512 - (out.offset & 511))
        return out.offset < file_size
    # No branches from here on, because the kinds of entries cannot be predicted.
    out.offset = bswap64(raw & ENTRY_OFFSET)
    out.length = 0
    placed = out.offset != 0
    zero = (raw & ENTRY_ZERO) != 0
    out.kind = <uint8_t>(placed + 2 * zero)
    return (((out.offset & in_cluster) == 0) & ((out.offset < file_size) | (not placed))
            & (zero_allowed | (not zero)))


cdef inline bint decode_extended(const uint64_t *raw, int cluster_bits, uint64_t file_size,
                                 Decoded *out) noexcept nogil:
    """Decode an entry of two words, where the bitmap counts and the zero flag does not."""
    cdef uint64_t bitmap = bswap64(raw[1])
    cdef uint32_t stored = <uint32_t>bitmap, zero = <uint32_t>(bitmap >> 32)
    if not decode_entry(raw[0], cluster_bits, True, file_size, out):
        return False
    if out.kind == 4:
        return True
    if stored == <uint32_t>-1:
        out.kind = 1
    elif zero == <uint32_t>-1:
        out.kind = <uint8_t>(2 + (out.offset != 0))
    else:
        out.kind = 5 if stored | zero else 0
    return (stored & zero) == 0 and (stored == 0 or out.offset != 0)


cdef int64_t decode(const uint64_t *entries, int64_t count, int step, int cluster_bits,
                    bint zero_allowed, uint64_t file_size, uint8_t *kinds, uint64_t *offsets,
                    uint32_t *lengths) noexcept nogil:
    """Fill the columns; return -1, or the index of the first invalid entry."""
    cdef int64_t i
    cdef Decoded entry
    cdef bint valid
    for i in range(count):
        if step == 1:
            valid = decode_entry(entries[i], cluster_bits, zero_allowed, file_size, &entry)
        else:
            valid = decode_extended(entries + 2 * i, cluster_bits, file_size, &entry)
        if not valid:
            return i
        kinds[i] = entry.kind
        offsets[i] = entry.offset
        lengths[i] = entry.length
    return -1


cdef inline bint are_blank(const uint64_t *a, const uint64_t *b, int64_t at,
                           int words) noexcept nogil:
    """Return whether `words` words from `at` on are 0, in both tables if there are two."""
    cdef uint64_t bits = 0
    cdef int i
    for i in range(words):
        bits |= a[at + i]
    if b != NULL:
        for i in range(words):
            bits |= b[at + i]
    return bits == 0


cdef inline int64_t skip_blank(const uint64_t *a, const uint64_t *b, int64_t i, int64_t count,
                               int step) noexcept nogil:
    """Return the first entry from i on that is not 0 in both tables (or the only one); else count."""
    while i + 32 <= count and are_blank(a, b, step * i, 32 * step):
        i += 32
    while i < count and are_blank(a, b, step * i, step):
        i += 1
    return i


cdef inline int change_of(const uint64_t *a, const uint64_t *b, int64_t i, int step) noexcept nogil:
    """Return EXTENT_CHANGED if the entries i differ in more than COPIED, else 0."""
    if b == NULL or not changed_mask(a + step * i, b + step * i, 1, step):
        return 0
    return EXTENT_CHANGED


cdef inline int part_of(uint64_t bitmap, int i) noexcept nogil:
    """Return the kind of extent that subcluster i of a valid entry is."""
    return 2 * <int>(bitmap >> i & 1) + <int>(bitmap >> (32 + i) & 1)


cdef int64_t map_entries(const uint64_t *a, const uint64_t *b, int64_t count, int step,
                         int cluster_bits, bint zero_allowed, uint64_t file_size, int64_t *starts,
                         uint8_t *kinds, int64_t *bad) noexcept nogil:
    """Write a row where each extent begins; return how many, and in `bad` -1 or the first invalid entry."""
    cdef int64_t i = 0, rows = 0
    cdef int part, parts = 1 if step == 1 else 32, last = -1, kind, change
    cdef Decoded entry
    cdef bint valid
    bad[0] = -1
    while i < count:
        if last == 0:
            i = skip_blank(a, b, i, count, step)
            if i == count:
                break
        if step == 1:
            valid = decode_entry(a[i], cluster_bits, zero_allowed, file_size, &entry)
        else:
            valid = decode_extended(a + 2 * i, cluster_bits, file_size, &entry)
        if not valid:
            bad[0] = i
            break
        change = change_of(a, b, i, step)
        for part in range(parts if entry.kind == 5 else 1):
            if entry.kind == 5:
                kind = part_of(bswap64(a[2 * i + 1]), part) | change
            else:
                kind = EXTENT_OF_KIND[entry.kind] | change
            if kind != last:
                starts[rows] = i * parts + part
                kinds[rows] = <uint8_t>kind
                last = kind
                rows += 1
        i += 1
    return rows
