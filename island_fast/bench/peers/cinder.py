"""Cinder's chunked backup driver (posix), which backs up the raw sparse file of a volume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, ClassVar

from island_fast.bench.peers.archivers import measure_files
from island_fast.bench.timing import Measurement
from island_fast.errors import IslandError

__all__ = ["Cinder"]

_PROCESS = Path(__file__).with_name("cinder_process.py")
_MAX_OUTPUT = 500


@dataclass(slots=True)
class Cinder:
    """An Archiver that keeps its backups in `folder`.

    It measures the driver's call in a process that keeps running, as cinder-backup does: `cinder_process`.
    The first call starts that process; it ends with `close`, or when this process ends.
    """

    folder: Path
    name: ClassVar[str] = "cinder"
    _taken: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _errors: IO[bytes] = field(default_factory=tempfile.TemporaryFile)

    def prepare(self) -> None:
        """See Archiver."""
        self.folder.mkdir()

    def back_up(self, raw: Path) -> Measurement:
        """See Archiver. The first backup is not compressed."""
        parent = f"{self._taken:08}" if self._taken else None
        self._taken += 1
        return self._request("back-up", f"{self._taken:08}", str(raw), parent)

    def restore(self, raw: Path, target: Path) -> Measurement:
        """See Archiver."""
        with open(target, "wb") as made:
            made.truncate(os.path.getsize(raw))
        return self._request("restore", f"{self._taken:08}", str(target))

    def measure_stored(self) -> int:
        """See Archiver."""
        return measure_files(self.folder / "objects")

    def close(self) -> None:
        """See Archiver."""
        if self._process:
            self._process.communicate()
            self._process = None
        self._errors.close()

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: that file is next to a module with the same name as the package.
        return subprocess.Popen(
            [sys.executable, "-P", str(_PROCESS), str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    def _request(self, *words: str | None) -> Measurement:
        """Send one request to the process; return what the driver's call cost."""
        self._process = process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(words).encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            process.wait()
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip()[-_MAX_OUTPUT:]
            raise IslandError(f"Cinder's driver failed, so there is no measurement; its last output: {last}")
        wall, processor, memory = answer.split()
        return Measurement(float(wall), float(processor), int(memory), answer)
