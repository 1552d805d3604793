"""All peers by name, and which of them are installed."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PEERS", "PROGRAMS", "Found", "Peer"]

PROGRAMS = Path(__file__).parents[3] / "build/peers/bin"
"""The folder of a checkout into which `python -m scripts.peers` puts programs; it goes before PATH."""


@dataclass(frozen=True, slots=True)
class Found:
    """An installed peer: its version, such as 0.19.1, and its program ("" for a Python package)."""

    version: str
    program: str = ""


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer: the command that installs it, and its Python package or its possible programs.

    `asking` are the words after which a program prints its version; `pattern` matches the output of the right
    program, with the version as its first group.
    """

    install: str
    programs: tuple[str, ...] = ()
    asking: str = "--version"
    pattern: str = ""
    package: str = ""

    def find(self) -> Found | None:
        """Return what is installed; None if nothing is."""
        if self.package:
            try:
                return Found(importlib.metadata.version(self.package))
            except importlib.metadata.PackageNotFoundError:
                return None
        places = (str(PROGRAMS), None)
        candidates = (shutil.which(name, path=place) for place in places for name in self.programs)
        return next(filter(None, map(self._examine, filter(None, candidates))), None)

    def _examine(self, program: str) -> Found | None:
        """Return this program with its version; None if it is another one, or does not run here."""
        try:
            done = subprocess.run([program, self.asking], capture_output=True, text=True, check=False)
        except OSError:
            return None
        match = re.match(self.pattern, done.stdout)
        return Found(match[1], program) if match else None


_TODAY = "python -m scripts.peers, or apt-get install"

# Its betas before 2.0.0b23 name the mode without encryption in another way.
_BORG_2 = r"borg\S* (?!2\.0\.0(?:a\d+|b1?\d|b2[0-2])\s)(2\.\S+)"

PEERS = {
    "restic": Peer(f"{_TODAY} restic", ("restic",), "version", r"restic (\S+)"),
    "borg": Peer(f"{_TODAY} borgbackup", ("borg",), pattern=r"borg\S* (1\.\S+)"),
    "borg2": Peer(f"{_TODAY} borgbackup2", ("borg2", "borg"), pattern=_BORG_2),
    "qemu-img": Peer("apt-get install qemu-utils", ("qemu-img",), pattern=r"qemu-img version (\S+)"),
    "fio": Peer("apt-get install fio", ("fio",), pattern=r"fio-(\S+)"),
    "cinder": Peer("pip install 'cinder==29.*'", package="cinder"),
}
"""By the names that --peers accepts."""
