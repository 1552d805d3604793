"""Images on this host: who has one open, and internal snapshots in it, by qemu-img or over QMP.

The only layer that starts qemu programs or talks to them. An image that no process has open for writing
takes its internal snapshots from `qemu_img`; one that a process has open takes them from that process,
over `qmp`; `imagelock` tells which it is and keeps snapshots of one image apart.
"""
