"""A block device in front of a volume's image, made of a daemon and a device; and the test of that path.

Terms:

    daemon    a qemu-storage-daemon, the only process that opens the image. It outlives cinder-volume
    export    the volume as the daemon offers it: a file (FUSE) or an NBD export. Internal snapshots need none
    device    a kernel block device over the export: a loop device over the file, or a kernel NBD device
    kind      "nbd" or "loop"; a daemon keeps the kind that it was started for
    backing   the path by which the kernel knows what a device stands on, so devices are found by backing
              and never by their number, which the kernel reuses
    link      a symlink to the device, which Nova is given

Where things are:

    exports.py        attach, detach, grow and stop a volume; `Exports` is what the rest of the package uses
    daemon.py         one volume's daemon; `process_lookup.py` finds it without waiting for it
    loop_devices.py   loop devices; `mounts.py` lists and removes FUSE mounts
    nbd_devices.py    kernel NBD devices. Its steps that need root are in `nbd_root.py`, the command
                      `island-nbd`, which speaks to the kernel by `nbd_netlink.py`
    selftest.py       does the path keep data right (written by `block_device.py`); is it fast (`speed.py`)

Rules:

- All state is in the kernel, in the daemons and in two folders. A process that starts anew finds it there.
- Root's rights are used only through `root=True`, and etc/rootwrap.d/island.filters pins every argument.
- `nbd_root.py` runs as root: it imports only the standard library, `nbd_netlink.py` and
  `qemu/nbd_handshake.py`. Never add another import to them.

It may import `qemu/`, `qcow2/` and the rooms below them; the room above and `bench/` import it.
"""
