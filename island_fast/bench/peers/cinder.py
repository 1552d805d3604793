"""Cinder's chunked backup driver, posix, given the raw sparse file of a volume."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from island_fast.bench import measuring
from island_fast.bench.measuring import Measured
from island_fast.bench.peers.archivers import size_on_disk

__all__ = ["Cinder"]

_PROCESS = Path(__file__).with_name("cinder_process.py")


@dataclass(slots=True)
class Cinder:
    """Keeps in `folder`. What is measured is the driver's call in its process; see `cinder_process`."""

    folder: Path
    name: ClassVar[str] = "cinder"
    _taken: int = 0

    def take(self, raw: Path) -> Measured:
        """See Keeper. The first one is not compressed."""
        self.folder.mkdir(exist_ok=True)
        parent = [str(self._taken)] if self._taken else []
        self._taken += 1
        return self._run("back-up", raw, *parent)

    def _run(self, verb: str, path: Path, *parent: str) -> Measured:
        # -P: beside that file lies a module of the same name as the package.
        command: list[str | Path] = [sys.executable, "-P", _PROCESS, verb, self.folder]
        command += [f"{self._taken:08}", path]
        measured = measuring.run([*command, *(f"{int(one):08}" for one in parent)])
        wall, processor = measured.output.split()
        return replace(measured, wall=float(wall), processor=float(processor))

    def give_back(self, raw: Path, target: Path) -> None:
        """See Keeper."""
        with open(target, "wb") as made:
            made.truncate(os.path.getsize(raw))
        self._run("restore", target)

    def stored(self) -> int:
        """See Keeper."""
        return size_on_disk(self.folder / "objects")
