"""restic and Borg with their defaults, which back up the raw sparse file of a volume."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from island_fast.bench import timing
from island_fast.bench.timing import Measurement

__all__ = ["Archiver", "Borg", "Borg2", "Restic", "measure_files"]

_REMOTE_SHELL = Path(__file__).with_name("remote_shell.py")


class Archiver(Protocol):
    """A tool that backs up a volume repeatedly, in a folder that it owns and that does not exist at first."""

    @property
    def name(self) -> str:
        """Its name in the table."""
        ...

    def prepare(self) -> None:
        """Make the repository, empty. Called once, before anything else."""
        ...

    def back_up(self, raw: Path) -> Measurement:
        """Back up the raw file as it is now, fully the first time; return what that cost."""
        ...

    def restore(self, raw: Path, target: Path) -> Measurement:
        """Restore the last backup into the new raw file `target`; return what that cost.

        `raw` is the file that was backed up. The target is sparse if the tool can do that.
        """
        ...

    def measure_stored(self) -> int:
        """Return the bytes on disk of all backups together, which must be below the folder."""
        ...

    def close(self) -> None:
        """End what still runs. The folder can be removed after that."""
        ...


def measure_files(folder: Path) -> int:
    """Return the size in bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@dataclass(slots=True)
class Restic:
    """`restic backup` of one file; the cache is in `folder`, and the repository there or at `location`."""

    folder: Path
    program: str = "restic"
    location: str = ""
    name: ClassVar[str] = "restic"
    _sparse: Sequence[str] = ()

    def _run(self, *words: str | Path) -> Measurement:
        environment = {
            "RESTIC_PASSWORD": "island",
            "RESTIC_REPOSITORY": self.location or str(self.folder / "repository"),
            "RESTIC_CACHE_DIR": str(self.folder / "cache"),
        }
        return timing.run([self.program, "-q", *words], env=environment)

    def prepare(self) -> None:
        """See Archiver."""
        self.folder.mkdir()
        self._run("init")
        if b"--sparse" in self._run("restore", "--help").output:  # since 0.15
            self._sparse = ["--sparse"]

    def back_up(self, raw: Path) -> Measurement:
        """See Archiver."""
        return self._run("backup", raw)

    def restore(self, raw: Path, target: Path) -> Measurement:
        """See Archiver."""
        back = self.folder / "back"
        cost = self._run("restore", "latest", *self._sparse, "--target", back)
        os.rename(back / raw.relative_to("/"), target)
        return cost

    def measure_stored(self) -> int:
        """See Archiver."""
        return measure_files(self.folder / "repository")

    def close(self) -> None:
        """See Archiver. Nothing runs between calls."""


@dataclass(slots=True)
class _AnyBorg:
    """`borg create` of one file; the cache is in `folder`."""

    folder: Path
    program: str
    _archive: ClassVar[str]  # how its archives are named on the command line
    _taken: int = field(default=0, kw_only=True)

    def _variables(self) -> dict[str, str]:
        """Return what Borg needs in its environment, besides its folder."""
        raise NotImplementedError

    def _run(self, *words: str | Path, cwd: Path | None = None) -> Measurement:
        environment = {"BORG_BASE_DIR": str(self.folder), **self._variables()}
        return timing.run([self.program, *words], env=environment, cwd=cwd)

    def back_up(self, raw: Path) -> Measurement:
        """See Archiver."""
        self._taken += 1
        return self._run("create", self._archive.format(self._taken), raw)

    def restore(self, raw: Path, target: Path) -> Measurement:
        """See Archiver."""
        back = self.folder / "back"
        back.mkdir()
        cost = self._run("extract", "--sparse", self._archive.format(self._taken), cwd=back)
        os.rename(back / raw.relative_to("/"), target)
        shutil.rmtree(back)
        return cost

    def measure_stored(self) -> int:
        """See Archiver."""
        return measure_files(self.folder / "repository")

    def close(self) -> None:
        """See Archiver. Nothing runs between calls."""


@dataclass(slots=True)
class Borg(_AnyBorg):
    """Borg 1, without encryption; the repository is in `folder`, or at `path` of the server on `port`."""

    path: Path | None = None
    port: int = 0
    name: ClassVar[str] = "borg"
    _archive: ClassVar[str] = "::{}"

    def _variables(self) -> dict[str, str]:
        return {
            "BORG_REPO": f"ssh://loopback{self.path}" if self.path else str(self.folder / "repository"),
            "BORG_RSH": f"{sys.executable} -I -S {_REMOTE_SHELL} {self.port}",
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }

    def prepare(self) -> None:
        """See Archiver."""
        self.folder.mkdir()
        self._run("init", "--encryption", "none")


@dataclass(slots=True)
class Borg2(_AnyBorg):
    """Borg 2, without encryption; the repository is in `folder`, or at the URL `location`.

    From 2.0.0b23 on, the mode without encryption authenticates, here with BLAKE3.
    """

    location: str = ""
    name: ClassVar[str] = "borg2"
    _archive: ClassVar[str] = "archive-{}"

    def _variables(self) -> dict[str, str]:
        return {
            "BORG_REPO": self.location or str(self.folder / "repository"),
            "BORG_PASSPHRASE": "island",
        }

    def prepare(self) -> None:
        """See Archiver."""
        self.folder.mkdir()
        self._run("repo-create", "--encryption", "authenticated-blake3")
