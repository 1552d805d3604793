"""Images that snapshots are taken of and restored to: locked, pinned, compared, read and written.

Terms, for readers of this room:

- An *image* is what holds a volume: a qcow2 file, or a raw file or block device (*raw*). Its *backing files*
  hold what it has not.
- A *source* (`source.Source`) is an image held for one snapshot; `open.open_source` opens one. It stays
  locked until it is closed.
- A *view* (`source.View`) is the volume at one point: as it is now, or at an internal snapshot.
- A *change* (`source.Change`) says which blocks of a view may differ from the parent snapshot, and by which
  rule: a *table diff* against a base, or a *full scan*.
- A *pin* is the internal snapshot that a snapshot leaves in a qcow2 image, as the base of the next table
  diff. `pins.py` makes and reads its name.
- A *target* is what a restore writes: a new file (`new_file.create_file`) or an existing image
  (`target.open_target`).

Which file has what: `qcow2_source.py` and `raw_source.py` are the two sources, `backing.py` opens the chain
of backing files, `unchanged.py` asks after the last read whether a file was changed, `device_names.py` knows
block devices again, `inspect.py` shows an image without locking it.

Rules:

- The caller names formats and backing files. Nothing is probed, and no name inside an image is followed.
- What is read of an image in use is read from an internal snapshot only: the active tables are not all on
  disk then.
- A source never writes to the image file itself. QEMU takes and deletes internal snapshots, and QEMU writes
  to existing qcow2 targets (qemu-nbd).
- A table diff is used only where it is sound (docs/format.md, "Pinned base"). In every other case all
  allocated blocks are read and compared by digest, and the reason is kept with the snapshot.

Imports: `qcow2`, `qemu`, `results`, `dirtymap` and the ground floor; it knows no repository and no store.
Imported by `operations`, `cinder`, `api`, `cli` and `bench`; not by `repository`, because an operation brings
images and repositories together.
"""
