"""All peers by name, and which of them are installed."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from dataclasses import dataclass

__all__ = ["PEERS", "Peer"]


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer: the command that installs it, and the command that prints its version or its Python package."""

    install: str
    command: tuple[str, ...] = ()
    package: str = ""

    def find_version(self) -> str:
        """Return its version; "" if it is not installed."""
        if self.package:
            try:
                return importlib.metadata.version(self.package)
            except importlib.metadata.PackageNotFoundError:
                return ""
        if not shutil.which(self.command[0]):
            return ""
        output = subprocess.run(self.command, capture_output=True, text=True, check=False).stdout
        return output.splitlines()[0] if output else ""


PEERS = {
    "restic": Peer("apt-get install restic", ("restic", "version")),
    "borg": Peer("apt-get install borgbackup", ("borg", "--version")),
    "qemu-img": Peer("apt-get install qemu-utils", ("qemu-img", "--version")),
    "fio": Peer("apt-get install fio", ("fio", "--version")),
    "cinder": Peer("pip install 'cinder==29.*'", package="cinder"),
}
"""By the names that --peers accepts."""
