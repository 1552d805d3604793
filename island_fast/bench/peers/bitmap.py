"""A dirty bitmap in a qcow2, as libvirt's tools use it: the least that an increment can cost."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from island_fast.bench import timing
from island_fast.bench.island_command import make_child_environment
from island_fast.bench.timing import Measurement

__all__ = ["DirtyBitmap"]

_NAME = "changes"


@dataclass(slots=True)
class DirtyBitmap:
    """Copies what changed in `image` since the last copy into the file `target` in `folder`.

    It owns the bitmap in the image, and `folder`. `copied` is the size of the last copy in bytes. Making and
    clearing the bitmap is not measured.
    """

    image: Path
    folder: Path
    target: Path = field(init=False)
    copied: int = 0

    def start(self) -> None:
        """Add the bitmap, which marks changes from now on."""
        self.folder.mkdir()
        self.target = self.folder / "increment"
        options = ["--add", "-g", "65536", "-f", "qcow2"]
        timing.run(["qemu-img", "bitmap", *options, self.image, _NAME])

    def copy_changes(self) -> Measurement:
        """Copy what changed, and clear the bitmap."""
        self.target.unlink(missing_ok=True)
        program = [sys.executable, "-S", "-m", "island_fast.bench.peers.bitmap_process"]
        measured = timing.run([*program, self.image, _NAME, self.target], env=make_child_environment())
        self.copied = int(measured.output)
        timing.run(["qemu-img", "bitmap", "--clear", "-f", "qcow2", self.image, _NAME])
        return measured
