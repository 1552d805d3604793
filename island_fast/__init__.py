"""Incremental snapshots of qcow2 volumes, kept whole in OpenStack Swift or a directory."""

__version__ = "0.1.0"
