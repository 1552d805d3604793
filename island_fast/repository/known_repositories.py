"""Which repositories this host has written to, and at which places they were.

A place at which a repository was, and where none is now, is most likely a disk that is not mounted. A place
that holds another repository is most likely another disk, or what somebody began in an empty mount point.
Both are for the user to decide. One repository can have several places, such as a disk's mount points, and
one place several repositories: disks that are used in turn. Format, for each repository:

    <repository id>/repository     {"places": [the places, the newest last], "refuses": {place: bool}}
    begun/<digest of the place>    {"id", "created"} of a repository that is being made there

`refuses` says whether the store at a place refuses to overwrite, as far as this host has asked it. `begun`
is only for stores that do not: what may have been sent of the object `repository` is sent again as it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from island_fast.files import make_folders, open_private, write_durably
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

    def remember(self, repository: str, place: str, refuses: bool | None = None) -> None:
        """Remember that the repository with this id is at `place`, and if known, what the store `refuses`."""
        places, known = self._places(repository), self._refusals(repository)
        places = places if place in places else [*places, place][-_MOST:]
        if refuses is not None:
            known[place] = refuses
        known = {one: known[one] for one in places if one in known}
        with contextlib.suppress(OSError):
            self._begun(place).unlink()
        if (places, known) != (self._places(repository), self._refusals(repository)):
            folder = self._root / repository
            make_folders(folder)
            text = json.dumps({"places": places} | ({"refuses": known} if known else {}))
            write_durably(folder / "repository", text.encode())

    def refuses(self, repository: str, place: str) -> bool | None:
        """Return whether the store at `place` refuses to overwrite, if this host has asked it; else None."""
        return self._refusals(repository).get(place)

    def _places(self, repository: str) -> list[str]:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return [str(place) for place in self._read(self._root / repository / "repository")["places"]]
        return []

    def _refusals(self, repository: str) -> dict[str, bool]:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            found = self._read(self._root / repository / "repository")["refuses"]
            return {place: known for place, known in found.items() if isinstance(known, bool)}
        return {}

    def _read(self, path: Path) -> dict[str, Any]:
        """Return the JSON of a file; KeyError, ValueError or TypeError for whatever else is there."""
        try:
            return dict(json.loads(path.read_bytes()))
        except OSError:
            return {}

    @contextlib.contextmanager
    def begin(self, place: str, make: Callable[[], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Begin a repository at `place`, with a lock held; yield what an earlier try began, or `make` makes.

        It is kept on disk, unless the body ends well.
        """
        path = self._begun(place)
        make_folders(path.parent)
        with open(path.parent / "lock", "ab", opener=open_private) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = None
            with contextlib.suppress(ValueError, KeyError, TypeError):
                read = self._read(path)
                found = {"id": str(read["id"]), "created": int(read["created"])}
            if found is None:
                found = make()
                write_durably(path, json.dumps(found).encode())
            yield found
            path.unlink(missing_ok=True)

    def _begun(self, place: str) -> Path:
        return self._root / "begun" / xxhash.xxh3_128_hexdigest(place.encode())
