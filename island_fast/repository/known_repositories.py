"""Which repositories this host has written to, and at which places they were.

A place at which a repository was, and where none is now, is most likely a disk that is not mounted. A place
that holds another repository is most likely another disk, or what somebody began in an empty mount point.
Both are for the user to decide. One repository can have several places, such as a disk's mount points, and
one place several repositories: disks that are used in turn. Format, for each repository:

    <repository id>/repository     {"places": [the places, the newest last]}
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from island_fast.files import make_folders, write_durably
from island_fast.formats.names import SNAPSHOT_PATTERN

__all__ = ["KnownRepositories"]

_MOST = 16  # places of a repository


class KnownRepositories:
    """The repositories known in the folder of local state `root`, by id. A place is a `Store.place`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def at(self, place: str) -> list[str]:
        """Return the ids of the repositories that were at `place`."""
        with contextlib.suppress(OSError):
            names = sorted(filter(SNAPSHOT_PATTERN.fullmatch, os.listdir(self._root)))
            return [name for name in names if place in self._places(name)]
        return []

    def remember(self, repository: str, place: str) -> None:
        """Remember that the repository with this id is at `place`."""
        places = self._places(repository)
        if place not in places:
            folder = self._root / repository
            make_folders(folder)
            text = json.dumps({"places": [*places, place][-_MOST:]})
            write_durably(folder / "repository", text.encode())

    def _places(self, repository: str) -> list[str]:
        try:
            text = (self._root / repository / "repository").read_bytes()
            return [str(place) for place in json.loads(text)["places"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []
