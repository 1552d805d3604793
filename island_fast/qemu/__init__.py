"""QEMU and libvirt on this host: who uses an image, internal snapshots, frozen guests, writing to an image.

Rules:

- An image that no process has open for writing gets its internal snapshots from `QemuImg`, which runs
  qemu-img. An image that a process has open gets them from that process, through its `Monitor`.
  `writer_present` shows which of the two applies; an `ImageLock` keeps two runs off one image, and can keep
  new writers away.
- Only qemu changes an existing qcow2 file. We only read those, and write new ones (`qcow2/`).
- An image is given to qemu as a whole node in JSON, so nothing is probed and no other file is opened; and as
  the descriptor that was locked, never by its name.
- Answers from qemu, from a guest's agent and from images are not trusted; they are limited in size and time.
- A guest that was frozen is thawed whatever happens.

| module | what it is |
|---|---|
| `image_lock.py` | our lock on an image, and qemu's locks that show its users |
| `open_files.py` | `refuse_held`: who else can write to a file or block device, in whatever way |
| `interrupts.py` | signals are postponed while a program is being started |
| `programs.py` | running a program to its end; `RunProgram`, which a caller can replace |
| `qemu_img.py` | internal snapshots by qemu-img |
| `monitor.py` | `Monitor`: internal snapshots by the qemu process that has the image open |
| `qmp.py` | the monitor over a QMP socket |
| `libvirt.py` | the monitor through libvirt, and the guest's disks and agent |
| `freeze.py` | work while a guest's file systems are frozen |
| `qemu_nbd.py` | writing to a qcow2 through qemu-nbd |
| `nbd_handshake.py` | the beginning of an NBD connection; root's programs use it |
| `block_nodes.py`, `sizing.py` | the nodes that we give to qemu; cluster and cache sizes |

Imports `errors` of this package, nothing else. Programs are started only here, in `cinder/` and in `bench/`;
libvirt is imported only here. Used by `images/`, `operations/`, `cinder/` and `bench/`. `nbd_handshake.py`
imports the standard library alone, because root runs it.
"""
