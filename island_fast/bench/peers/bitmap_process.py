"""Copy what a dirty bitmap marks through qemu-nbd. `bitmap.DirtyBitmap` starts this as a whole process.

    python -S -m island_fast.bench.peers.bitmap_process IMAGE BITMAP TARGET

It hashes, compresses and flushes nothing, so that it costs the least that an incremental copy can. It prints
how many bytes it copied.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from island_fast.bench import nbd_client


def find_dirty_ranges(socket_path: Path, bitmap: str) -> list[tuple[int, int]]:
    """Return the marked (offset, length) ranges, from `qemu-img map`, as QEMU documents it.

    qemu-img shows what the bitmap marks as ranges without data.
    """
    options = {
        "driver": "nbd",
        "server.type": "unix",
        "server.path": str(socket_path),
        "x-dirty-bitmap": f"qemu:dirty-bitmap:{bitmap}",
    }
    command = ["qemu-img", "map", "--output=json", f"json:{json.dumps(options)}"]
    output = subprocess.run(command, capture_output=True, check=True).stdout
    return [(one["start"], one["length"]) for one in json.loads(output) if not one["data"]]


def main() -> None:
    """Copy the changes of the image that the command line names."""
    image, bitmap, target = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    socket_path = target.with_suffix(".nbd")
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with (
        nbd_client.serve_image(image, socket_path, "-r", "-B", bitmap, "-e", "2"),
        nbd_client.NbdClient(socket_path) as client,
    ):
        ranges = find_dirty_ranges(socket_path, bitmap)
        client.read(ranges, lambda offset, data: os.pwrite(out, data, offset))
    os.close(out)
    print(sum(length for _, length in ranges))


if __name__ == "__main__":
    main()
