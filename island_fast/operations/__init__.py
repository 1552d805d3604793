"""What the verbs do: one file for each verb, named like it; each brings the rooms below into their order.

The order in which objects become durable (packs, manifest, record) is the protocol of docs/format.md, and it
is decided here: snapshot, copy, delete, sweep, heal. Beside the verbs: `parent.py` decides which snapshot a
new one follows and whether a table diff is sound, `compare.py` compares a snapshot with an image, `heal.py`
repairs damage.

Imports: `repository/`, `images/` and below. Imported by `api.py` alone (and by nothing that is below);
functions are imported by the verb that needs them, for start-up time.
"""
