"""qcow2 images without qemu: headers, tables, snapshots, blocks, changed clusters, new images.

`image.py` opens one read-only, `changes.py` looks at its tables, `block_reader.py` reads blocks, `writer.py`
makes new images. The format is docs/interop/qcow2 of QEMU. Everything in an image is hostile: every offset
and size is checked before it is used.

Imports: `dirtymap`, the kernels in `_diff` and the ground floor. Imported by `images/`, `qemu/` and
`operations/`.
"""
