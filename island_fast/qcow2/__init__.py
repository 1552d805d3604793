"""qcow2 images read and written without QEMU.

Terms, for readers of this room (the format is QEMU's docs/interop/qcow2, "the qcow2 specification"):

- A *cluster* is the file's unit of allocation, 512 B to 2 MiB. A *block* is ours: 64 KiB of the volume.
- An *L1 table* points to *L2 tables*; an *entry* of an L2 table says where one cluster of the volume is
  stored: nowhere, as zeros, in a cluster of the file, or compressed. With extended L2 an entry also has a
  bitmap of 32 subclusters.
- *COPIED* is the flag of an entry whose cluster has one reference, so that it may be written in place.
- An *internal snapshot* is a second L1 table in the same file. A *point* (`image.Point`) is one such tree of
  tables: the active one, or an internal snapshot's.
- A *pinned base* (`snapshots.PinnedBase`) is the identity of the internal snapshot that a table diff starts
  from.

Where to begin: `image.py` opens an image read-only and hands out points. `changes.py` finds the blocks that
hold data or differ between two points, from tables alone. `block_reader.py` reads blocks, with
`compressed.py` and `codecs.py` for compressed clusters. `extents.py` shows what a volume is made of.
`writer.py` writes new images, as `layout.py` plans them. `header.py`, `snapshots.py` and `bitmaps.py` parse
what their names say; `overlap.py` and `vectored_io.py` are shared by several of them.

Rules:

- Every byte of an image is hostile: a guest or a tenant may have written it. Each offset and size is checked
  before use, no number from an image decides an allocation without a limit, and work is bounded by the size
  of the file on disk.
- No file name inside an image is followed, and no program is started.
- `DamagedImageError` is for what contradicts the format or QEMU's limits, `UnsupportedImageError` for a
  feature that is not supported. Names from an image are escaped (`names.py`) before they are shown.

Imports: `dirtymap`, the kernels in `_diff` and the ground floor; so the room can be used alone. Any room
above may import it.
"""
