"""qcow2 structures made field by field, for images that no program would write."""

import struct


def header(version=3, extensions=b"", length=112, **fields):
    """Return the bytes of a valid header for a 1 MiB file, with some fields replaced."""
    values = {
        "magic": b"QFI\xfb",
        "version": version,
        "backing_offset": 0,
        "backing_length": 0,
        "cluster_bits": 16,
        "size": 1 << 30,
        "crypt": 0,
        "l1_size": 2,
        "l1_offset": 0x30000,
        "refcount_offset": 0x10000,
        "refcount_clusters": 1,
        "snapshots": 0,
        "snapshots_offset": 0,
        "incompatible": 0,
        "compatible": 0,
        "autoclear": 0,
        "refcount_order": 4,
        "length": length,
        "compression": 0,
    }
    values |= fields
    if version == 2:
        kept = list(values.values())[:13]
        return (struct.pack(">4sIQIIQIIQQIIQ", *kept) + extensions).ljust(65536, b"\0")
    fixed = struct.pack(">4sIQIIQIIQQIIQQQQIIB", *values.values())[:length]
    return (fixed.ljust(length, b"\0") + extensions).ljust(65536, b"\0")


def extension(kind, data):
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
