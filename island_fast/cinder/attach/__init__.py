"""A block device in front of a volume's image, made of a daemon and a device; and the test of that path.

Terms:

    daemon    a qemu-storage-daemon, the only process that opens the image. It outlives cinder-volume
    export    the volume as the daemon offers it: a VDUSE or an NBD export, or a file (FUSE). Internal
              snapshots need none
    device    a kernel block device over the export: a virtio disk, a kernel NBD device, or a loop device
    kind      "vduse", "nbd" or "loop"; a daemon keeps the kind that it was started for
    backing   the path by which the kernel knows what a device stands on, so devices are found by backing
              and never by their number, which the kernel reuses
    stand-in  a process that answers with errors in place of a daemon that died; VDUSE needs it
    link      a symlink to the device, which Nova is given

Where things are:

    exports.py        attach, detach, grow and stop a volume; `Exports` is what the rest of the package uses
    daemon.py         one volume's daemon; `process_lookup.py` finds it without waiting for it
    loop_devices.py   loop devices; `mounts.py` lists and removes FUSE mounts. The steps that need root are
                      in `loop_root.py`, the command `island-loop`, which opens exports by `fuse_export.py`
    vduse_devices.py  VDUSE disks. The steps that need root are in `vduse_root.py`, the command
                      `island-vduse`, which speaks to the kernel by `vduse_control.py` and `vdpa_netlink.py`,
                      and asks `openers.py` who has a disk open; `stand_in.py` is for daemons that die
    nbd_devices.py    kernel NBD devices. The steps that need root are in `nbd_root.py`, the command
                      `island-nbd`, which speaks to the kernel by `nbd_netlink.py`. Both netlinks are
                      made of `generic_netlink.py`
    selftest.py       does the path keep data right (written by root: `exercise.py`, `block_device.py`); is it
                      fast (`speed.py`); does the host's udev leave it alone (`udev.py`)

Rules:

- All state is in the kernel, in the daemons and in two folders. A process that starts anew finds it there.
- Root's rights are used only through `root=True`, and etc/rootwrap.d/island.filters pins every argument.
- `loop_root.py`, `nbd_root.py` and `vduse_root.py` run as root. They import only the standard library,
  `exercise.py`, `block_device.py`, `fuse_export.py`, `openers.py`, `vduse_control.py`, the three netlinks,
  `qemu/nbd_handshake.py`, `errors.py` and `files.py`.
  Never add another import to any of these.
- Root follows no link of another user's, and no user but root ever gets a device of the kernel's common pool:
  who once had one open could have the next file that root attaches.

It may import `qemu/`, `qcow2/` and the rooms below them; the room above and `bench/` import it.
"""
