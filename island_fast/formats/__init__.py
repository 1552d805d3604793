"""Objects as bytes, and back: packs, manifests, catalog records, and the columns and frames they are made of.

docs/format.md specifies them, and names here are terms of it. What is decoded is not trusted: every field is
bounded and checked, and a wrong object is refused by name with DamagedObjectError or UnsupportedObjectError.

Imports: `dirtymap` and the ground floor. It does no I/O. Imported by `repository/`, `operations/` and
`images/`.
"""
