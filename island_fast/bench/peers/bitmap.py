"""A dirty bitmap in a qcow2, as libvirt's tools keep it: the least that an increment can cost."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from island_fast.bench import timing
from island_fast.bench.island_command import environment
from island_fast.bench.timing import Measured

__all__ = ["Bitmap"]

_NAME = "changes"


@dataclass(slots=True)
class Bitmap:
    """Copies what changed in `image` since the last time into files in `folder`.

    It owns the bitmap in the image, and `folder`. Making and clearing the bitmap is not measured.
    """

    image: Path
    folder: Path
    target: Path = field(init=False)
    copied: int = 0

    def begin(self) -> None:
        """Add the bitmap; changes are marked from now on."""
        self.folder.mkdir()
        self.target = self.folder / "increment"
        options = ["--add", "-g", "65536", "-f", "qcow2"]
        timing.run(["qemu-img", "bitmap", *options, self.image, _NAME])

    def take(self) -> Measured:
        """Copy what changed, and forget it."""
        self.target.unlink(missing_ok=True)
        program = [sys.executable, "-S", "-m", "island_fast.bench.peers.bitmap_process"]
        measured = timing.run([*program, self.image, _NAME, self.target], env=environment())
        self.copied = int(measured.output)
        timing.run(["qemu-img", "bitmap", "--clear", "-f", "qcow2", self.image, _NAME])
        return measured
