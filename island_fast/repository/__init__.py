"""A repository and its lineages: reading, writing and checking their objects, and this host's state of them.

Terms are those of docs/format.md: a *repository* holds *lineages*; a lineage is a *catalog* of records, which
name snapshots, whose *manifests* name slots of *packs*. `open.py` finds lineages and snapshots, `lineage.py`
follows and appends to a catalog, `liveness.py` computes which slots are live, dead or reclaimable,
`streams.py` moves blocks, `snapshot_writer.py` commits a snapshot, `integrity/` checks objects,
`local_state.py` is what this host remembers.

Imports: `formats/`, `stores/` and the ground floor; it knows no images. Imported by `operations/` and
`api.py`.
"""
