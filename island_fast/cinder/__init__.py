"""What the Cinder driver stands on: a host's volumes, their images and their snapshots.

A volume is a record until its image is needed. Whatever takes long (a snapshot, a restore, a delete, a sweep)
runs as a process of its own, the command `island`, so that a service can go on meanwhile. `attach/` makes
block devices of images. Only `options.py`, `errors.py`, `database.py` and `driver.py` import Cinder or oslo.

Imports: `qemu/`, `images/` and below, never `operations/` or `api.py`. Imported by `driver.py`.
"""
