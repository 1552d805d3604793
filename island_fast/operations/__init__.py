"""What the verbs do: one file for each verb, named after it.

The order in which objects become durable (packs, then the manifest, then the record) is the protocol of
docs/format.md, and it is decided here: in snapshot, copy, delete, sweep and heal. Five files are not verbs:
`parent.py` decides which lineage and parent a new snapshot gets and whether a table diff is sound,
`image_of_volume.py` whether an image is the one that a volume belongs to, `sample.py` tests a table diff,
`compare.py` compares a snapshot with its pin in an image, `heal.py` repairs damage, for verify and before
snapshots.

This room imports `repository/`, `images/` and what is below them. Only `api.py` and `cli/` import it, each
function in the method that needs it, to keep start-up short.
"""
