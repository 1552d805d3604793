"""Images as the source and the target of blocks: held, pinned, asked what changed, written.

A *source* is what a snapshot reads (`source.py`): a qcow2 file, a raw file or a block device, with its
backing files under it. A *view* is one moment of it, a *change* what may differ since a base. `target.py`
writes onto an existing image, `new_file.py` makes a new one, `pins.py` names the internal snapshots that are
bases of table diffs.

Imports: `qcow2/`, `qemu/`, `formats/` for names, and the ground floor; it knows no repository. Imported by
`operations/`.
"""
