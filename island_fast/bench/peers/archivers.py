"""restic and borg with their defaults, given the raw sparse file of a volume."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from island_fast.bench import timing
from island_fast.bench.timing import Measured

__all__ = ["Borg", "Keeper", "Restic", "size_on_disk"]


class Keeper(Protocol):
    """Something that keeps states of a volume in an empty folder of its own."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    def take(self, raw: Path) -> Measured:
        """Keep the volume as it is now; the first one is whole."""
        ...

    def give_back(self, raw: Path, target: Path) -> None:
        """Write what was kept last to the new raw file `target`; `raw` is what `take` was given."""
        ...

    def stored(self) -> int:
        """Bytes that everything kept takes on disk."""
        ...

    def finish(self) -> None:
        """End what still runs; the folder may go then."""
        ...


def size_on_disk(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@dataclass(slots=True)
class Restic:
    """`restic backup` of one file, with a cache of its own; keeps in `folder`."""

    folder: Path
    name: ClassVar[str] = "restic"

    def _run(self, *words: str | Path, cwd: Path | None = None) -> Measured:
        environment = {
            "RESTIC_PASSWORD": "island",
            "RESTIC_REPOSITORY": str(self.folder / "repository"),
            "RESTIC_CACHE_DIR": str(self.folder / "cache"),
        }
        return timing.run(["restic", "-q", *words], env=environment, cwd=cwd)

    def take(self, raw: Path) -> Measured:
        """See Keeper."""
        if not (self.folder / "repository").exists():
            self._run("init")
        return self._run("backup", raw)

    def give_back(self, raw: Path, target: Path) -> None:
        """See Keeper."""
        self._run("restore", "latest", "--target", self.folder / "back")
        os.rename(self.folder / "back" / raw.relative_to("/"), target)

    def stored(self) -> int:
        """See Keeper."""
        return size_on_disk(self.folder / "repository")

    def finish(self) -> None:
        """See Keeper; nothing runs."""


@dataclass(slots=True)
class Borg:
    """`borg create` of one file, without encryption; keeps in `folder`."""

    folder: Path
    name: ClassVar[str] = "borg"
    _taken: int = 0

    def _run(self, *words: str | Path, cwd: Path | None = None) -> Measured:
        environment = {
            "BORG_BASE_DIR": str(self.folder),
            "BORG_REPO": str(self.folder / "repository"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }
        return timing.run(["borg", *words], env=environment, cwd=cwd)

    def take(self, raw: Path) -> Measured:
        """See Keeper."""
        if not self._taken:
            self.folder.mkdir(exist_ok=True)
            self._run("init", "--encryption", "none")
        self._taken += 1
        return self._run("create", f"::{self._taken}", raw)

    def give_back(self, raw: Path, target: Path) -> None:
        """See Keeper."""
        back = self.folder / "back"
        back.mkdir()
        self._run("extract", "--sparse", f"::{self._taken}", cwd=back)
        os.rename(back / raw.relative_to("/"), target)

    def stored(self) -> int:
        """See Keeper."""
        return size_on_disk(self.folder / "repository")

    def finish(self) -> None:
        """See Keeper; nothing runs."""
