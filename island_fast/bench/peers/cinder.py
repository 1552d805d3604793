"""Cinder's chunked backup driver, posix, given the raw sparse file of a volume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, ClassVar

from island_fast.bench.peers.archivers import size_on_disk
from island_fast.bench.timing import Measured
from island_fast.errors import IslandError

__all__ = ["Cinder"]

_PROCESS = Path(__file__).with_name("cinder_process.py")
_MAX_SAID = 500


@dataclass(slots=True)
class Cinder:
    """Keeps in `folder`. What is measured is the driver's call in a process that goes on: `cinder_process`.

    The process is started by the first call, and ends with `finish`, or with this one.
    """

    folder: Path
    name: ClassVar[str] = "cinder"
    _taken: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _said: IO[bytes] = field(default_factory=tempfile.TemporaryFile)

    def take(self, raw: Path) -> Measured:
        """See Keeper. The first one is not compressed."""
        parent = f"{self._taken:08}" if self._taken else None
        self._taken += 1
        return self._ask("back-up", f"{self._taken:08}", str(raw), parent)

    def give_back(self, raw: Path, target: Path) -> None:
        """See Keeper."""
        with open(target, "wb") as made:
            made.truncate(os.path.getsize(raw))
        self._ask("restore", f"{self._taken:08}", str(target))

    def stored(self) -> int:
        """See Keeper."""
        return size_on_disk(self.folder / "objects")

    def finish(self) -> None:
        """See Keeper."""
        if self._process:
            self._process.communicate()
            self._process = None
        self._said.close()

    def _start(self) -> subprocess.Popen[bytes]:
        self.folder.mkdir()
        # -P: beside that file lies a module of the same name as the package.
        return subprocess.Popen(
            [sys.executable, "-P", str(_PROCESS), str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
        )

    def _ask(self, *words: str | None) -> Measured:
        """Have the process do something; what the driver's call cost."""
        self._process = process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(words).encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            process.wait()
            self._said.seek(0)
            last = self._said.read().decode(errors="replace").strip()[-_MAX_SAID:]
            raise IslandError(f"Cinder's driver failed, and the measurement with it; it said: {last}")
        wall, processor, memory = answer.split()
        return Measured(float(wall), float(processor), int(memory), answer)
