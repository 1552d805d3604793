"""A repository and its lineages: reading, writing and checking their objects, and this host's state of them.

Terms are those of docs/format.md: a *repository* holds *lineages*; a lineage has a *catalog* of records,
which name snapshots, whose *manifests* name slots of *packs*.

- `open.py` finds lineages and snapshots; `lineage.py` reads a catalog and appends to it.
- `liveness.py` computes which slots are live, dead or reclaimable.
- `streams.py` moves blocks between images and packs; `pack_reader.py`, `pack_writer.py`, `digests.py` and
  `workers.py` are its parts.
- `snapshot_writer.py` commits a snapshot.
- `integrity/` checks objects; `health.py` is what this host knows of them, and `local_state.py` all that it
  remembers.

Imports: `formats/`, `stores/` and the ground floor; it knows no images. Imported by `operations/` and
`api.py`.
"""
