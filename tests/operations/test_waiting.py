"""What a guest waits for while its volume is snapshotted: tables read from the disk, holes punched.

Not how long: scripts/pause.py measures that. Here a real qemu-storage-daemon's reads are counted.
"""

import os
import re
from pathlib import Path

import pytest

from island_fast.qemu.qmp import Qmp
from island_fast.qemu.sizing import cluster_size, node_options
from tests.support.daemon import StorageDaemon, create_qcow2, needs_qemu, needs_storage_daemon, qemu_io

pytestmark = [needs_qemu, needs_storage_daemon]

GIB, TIB = 1 << 30, 1 << 40
CLUSTER = 64 << 10


def bytes_read(pid):
    """Bytes that a process has read from files so far, from the page cache or not."""
    return int(re.search(r"rchar: (\d+)", Path(f"/proc/{pid}/io").read_text()).group(1))


def read_by_each_step(image, options):
    """Take a first snapshot, take a second, drop the first: bytes that the daemon read for each."""
    found = []
    with StorageDaemon(image, node_options=options) as daemon, Qmp(daemon.qmp_socket) as qmp:
        for step in (
            lambda: qmp.snapshot_create("disk", "first"),
            lambda: qmp.snapshot_create("disk", "second"),
            lambda: qmp.snapshot_delete("disk", "1", "first"),
        ):
            before = bytes_read(daemon.pid)
            step()
            found.append(bytes_read(daemon.pid) - before)
    return found


def test_a_mapped_tebibyte_is_snapshotted_from_memory(tmp_path):
    """Every table is read once, for the first snapshot; with qemu's own caches it is read again and again."""
    cluster = cluster_size(TIB)
    image = create_qcow2(tmp_path / "disk", TIB, cluster_size=cluster, preallocation="metadata")
    tables = TIB // cluster * 8
    first, second, drop = read_by_each_step(image, node_options(TIB, cluster))
    assert first < 2 * tables
    assert second < cluster
    assert drop < cluster
    image.unlink()
    create_qcow2(image, TIB, cluster_size=cluster, preallocation="metadata")
    _, second, drop = read_by_each_step(image, {})
    assert min(second, drop) > 2 * cluster


@pytest.mark.parametrize("punched", [False, True])
def test_the_space_of_a_dropped_snapshot_stays_in_the_file_and_is_used_again(tmp_path, punched):
    """Holes would be punched while the guest waits; without them the file keeps the space and fills it."""
    image = create_qcow2(tmp_path / "disk", GIB)
    options = {**node_options(GIB, CLUSTER), "discard": "unmap", "file.discard": "unmap"}
    if punched:
        options["pass-discard-snapshot"] = True
    length = 64 * CLUSTER
    with StorageDaemon(image, node_options=options) as daemon, Qmp(daemon.qmp_socket) as qmp:
        daemon.write(0, length, 1)
        qmp.snapshot_create("disk", "pin")
        daemon.write(0, length, 2)
        before = os.stat(image)
        qmp.snapshot_delete("disk", "1", "pin")
        after = os.stat(image)
        assert (before.st_blocks - after.st_blocks >= length // 512) is punched
        daemon.write(GIB // 2, length, 3)
        assert os.stat(image).st_size <= before.st_size + CLUSTER  # one more table
    qemu_io(image, f"read -P 2 0 {length}", f"read -P 3 {GIB // 2} {length}")
