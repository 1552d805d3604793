"""A compute host's volumes, for the Cinder driver: their records, their images and their snapshots.

Terms:

    volume record   what this host knows of a volume (`records.py`): its size, its lineage, and the snapshot
                    that its image is to be made from. A file `volume.json` in the volume's own folder
    image           the qcow2 file of a volume. It is made when it is first needed, not with the record
    snapshot ref    the name of a snapshot in a repository: LINEAGE@SNAPSHOT, or REPOSITORY:LINEAGE@SNAPSHOT
    own repository  the one that this host writes to; any other one is only read
    in transit      said of a volume: a migration has stored its content in the repository, and no host has
                    made an image from it yet

Where things are:

    volumes.py         the life of a volume: create, attach, snapshot, revert, migrate, delete
    records.py         volume records on disk
    images.py          making, copying and resizing images with qemu-img
    manage.py          volumes, files and snapshots that Cinder can take over
    upkeep.py          what is done regularly: dead daemons, free space, sweeps
    island_command.py  the command `island`, one process for each call, and `child_process.py`, which runs it
    attach/            a block device in front of an image
    options.py errors.py database.py   options in cinder.conf, Cinder's exceptions, Cinder's database

Rules:

- Long work (snapshot, restore, delete, sweep) runs in a process of its own, the command `island`. So a
  service on eventlet keeps responding, and this room never imports `operations/` or `api.py`.
- Nothing here knows whether a service runs on eventlet or on native threads: locks, threads and regular calls
  are those of oslo, which knows.
- Every call can be repeated: it leaves alone what an earlier call has done.
- Only `options.py`, `errors.py`, `database.py` and `driver.py` import Cinder or oslo.

It may import `qemu/`, `images/` and the rooms below them; `driver.py` and `bench/` import it.
"""
