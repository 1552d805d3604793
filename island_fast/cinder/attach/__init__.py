"""Attached volumes: the daemon that serves an image, the block device over it, and their self-test.

An *export* is one volume's daemon (`daemon.py`) with its device: a loop device over a FUSE file
(`loop_devices.py`) or a kernel NBD device (`nbd_devices.py`, whose root part `nbd_root.py` is the command
`island-nbd` and imports the standard library and `nbd_netlink.py` alone).
"""
