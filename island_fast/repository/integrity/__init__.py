"""Whether the objects of a repository are whole, and what is left of those that are not.

`objects.py` reads one pack or manifest, `catalog.py` the records of a catalog, `lineage.py` all of one
lineage. They find and describe damage; `operations/heal.py` repairs it.
"""
