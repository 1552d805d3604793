"""What people would use instead, each as it is used: restic, borg, Cinder's own driver, qemu's tools."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from dataclasses import dataclass

__all__ = ["PEERS", "Known"]


@dataclass(frozen=True, slots=True)
class Known:
    """A peer: the program that asks for its version, or the Python package; and how one comes by it."""

    install: str
    command: tuple[str, ...] = ()
    package: str = ""

    def version(self) -> str:
        """Its version, "" if it is not there."""
        if self.package:
            try:
                return importlib.metadata.version(self.package)
            except importlib.metadata.PackageNotFoundError:
                return ""
        if not shutil.which(self.command[0]):
            return ""
        told = subprocess.run(self.command, capture_output=True, text=True, check=False).stdout
        return told.splitlines()[0] if told else ""


PEERS = {
    "restic": Known("apt-get install restic", ("restic", "version")),
    "borg": Known("apt-get install borgbackup", ("borg", "--version")),
    "qemu-img": Known("apt-get install qemu-utils", ("qemu-img", "--version")),
    "fio": Known("apt-get install fio", ("fio", "--version")),
    "cinder": Known("pip install 'cinder==29.*'", package="cinder"),
}
"""By the names that --peers takes."""
