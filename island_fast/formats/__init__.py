"""Objects as bytes, and back: packs, manifests, catalog records, and the columns and frames they are made of.

Normative text: docs/format.md; every name here is a term of it. Everything that is decoded is untrusted:
bounded, checked, and refused by name with DamagedObjectError or UnsupportedObjectError.

Imports: `dirtymap` and the ground floor. It does no I/O. Imported by `repository/`, `operations/` and
`images/`.
"""
