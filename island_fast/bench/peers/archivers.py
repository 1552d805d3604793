"""restic and borg with their defaults, which back up the raw sparse file of a volume."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from island_fast.bench import timing
from island_fast.bench.timing import Measurement

__all__ = ["Archiver", "Borg", "Restic", "measure_files"]


class Archiver(Protocol):
    """A tool that backs up a volume repeatedly, into a folder that it owns and that is empty at first."""

    @property
    def name(self) -> str:
        """Its name in the table."""
        ...

    def back_up(self, raw: Path) -> Measurement:
        """Back up the raw file as it is now, fully the first time; return what that cost."""
        ...

    def restore(self, raw: Path, target: Path) -> None:
        """Restore the last backup into the new raw file `target`; `raw` is the file that was backed up."""
        ...

    def measure_stored(self) -> int:
        """Return the bytes on disk of all backups together."""
        ...

    def close(self) -> None:
        """End what still runs. The folder can be removed after that."""
        ...


def measure_files(folder: Path) -> int:
    """Return the size in bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@dataclass(slots=True)
class Restic:
    """`restic backup` of one file; repository and cache are in `folder`."""

    folder: Path
    name: ClassVar[str] = "restic"

    def _run(self, *words: str | Path, cwd: Path | None = None) -> Measurement:
        environment = {
            "RESTIC_PASSWORD": "island",
            "RESTIC_REPOSITORY": str(self.folder / "repository"),
            "RESTIC_CACHE_DIR": str(self.folder / "cache"),
        }
        return timing.run(["restic", "-q", *words], env=environment, cwd=cwd)

    def back_up(self, raw: Path) -> Measurement:
        """See Archiver."""
        if not (self.folder / "repository").exists():
            self._run("init")
        return self._run("backup", raw)

    def restore(self, raw: Path, target: Path) -> None:
        """See Archiver."""
        self._run("restore", "latest", "--target", self.folder / "back")
        os.rename(self.folder / "back" / raw.relative_to("/"), target)

    def measure_stored(self) -> int:
        """See Archiver."""
        return measure_files(self.folder / "repository")

    def close(self) -> None:
        """See Archiver. Nothing runs between calls."""


@dataclass(slots=True)
class Borg:
    """`borg create` of one file, without encryption; the repository is in `folder`."""

    folder: Path
    name: ClassVar[str] = "borg"
    _taken: int = 0

    def _run(self, *words: str | Path, cwd: Path | None = None) -> Measurement:
        environment = {
            "BORG_BASE_DIR": str(self.folder),
            "BORG_REPO": str(self.folder / "repository"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }
        return timing.run(["borg", *words], env=environment, cwd=cwd)

    def back_up(self, raw: Path) -> Measurement:
        """See Archiver."""
        if not self._taken:
            self.folder.mkdir(exist_ok=True)
            self._run("init", "--encryption", "none")
        self._taken += 1
        return self._run("create", f"::{self._taken}", raw)

    def restore(self, raw: Path, target: Path) -> None:
        """See Archiver."""
        back = self.folder / "back"
        back.mkdir()
        self._run("extract", "--sparse", f"::{self._taken}", cwd=back)
        os.rename(back / raw.relative_to("/"), target)

    def measure_stored(self) -> int:
        """See Archiver."""
        return measure_files(self.folder / "repository")

    def close(self) -> None:
        """See Archiver. Nothing runs between calls."""
