"""Copy what a dirty bitmap marks through qemu-nbd: `bitmap.Bitmap` starts this as a whole process.

    python -S -m island_fast.bench.peers.bitmap_process IMAGE BITMAP TARGET

Nothing is hashed, compressed or flushed to disk: the least that an incremental copy can cost. Prints how many
bytes were copied.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from island_fast.bench import nbd_client


def dirty(where: Path, bitmap: str) -> list[tuple[int, int]]:
    """The marked (offset, length) ranges, by `qemu-img map`, as QEMU documents it."""
    options = {
        "driver": "nbd",
        "server.type": "unix",
        "server.path": str(where),
        "x-dirty-bitmap": f"qemu:dirty-bitmap:{bitmap}",
    }
    command = ["qemu-img", "map", "--output=json", f"json:{json.dumps(options)}"]
    told = subprocess.run(command, capture_output=True, check=True).stdout
    return [(one["start"], one["length"]) for one in json.loads(told) if not one["data"]]


def main() -> None:
    """Copy as the command line says."""
    image, bitmap, target = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    where = target.with_suffix(".nbd")
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with nbd_client.serving(image, where, "-r", "-B", bitmap, "-e", "2"), nbd_client.Client(where) as client:
        ranges = dirty(where, bitmap)
        client.read(ranges, lambda offset, data: os.pwrite(out, data, offset))
    os.close(out)
    print(sum(length for _, length in ranges))


if __name__ == "__main__":
    main()
