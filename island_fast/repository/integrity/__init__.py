"""Checks of a repository's objects: which are damaged, and what of these can still be read.

`objects.py` checks one pack or manifest, `catalog.py` the records of a catalog, `lineage.py` a whole lineage.
They find and describe damage, and change nothing that is stored; `operations/heal.py` repairs it.
"""
