"""QEMU and libvirt on this host: who has an image open, pins, freezing, writing through qemu-nbd.

An image that no process has open for writing takes its internal snapshots from `qemu_img`; one that a process
has open takes them from that process, over `qmp`; `image_lock` shows which of the two it is, and keeps two
runs off one image.

Starts programs (`programs.py`); so do only `cinder/` and `bench/` beside it. Imports: `qcow2/` and the ground
floor. Imported by `images/`, `operations/`, `cinder/`.
"""
