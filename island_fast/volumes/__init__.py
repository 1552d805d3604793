"""Volumes of a host: what it knows of each, their images, made when first needed, and their snapshots.

A volume is a record until its image is needed. Whatever takes long (a snapshot, a restore, a delete, a sweep)
runs as a process of its own, the command `island`, so that a service may go on meanwhile.
"""

from island_fast.volumes.commands import Commands
from island_fast.volumes.records import Origin, Record, Records
from island_fast.volumes.volumes import Volumes

__all__ = ["Commands", "Origin", "Record", "Records", "Volumes"]
