"""Opening a repository, and finding the snapshots in it.

A repository is a store plus a prefix, holding an object `repository` with its id.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from island_fast.errors import (
    ConflictError,
    DamagedError,
    DamagedObjectError,
    IslandError,
    NotFoundError,
    ObjectMissingError,
    RefusedError,
    StoreError,
    UnsupportedObjectError,
    UsageError,
)
from island_fast.formats.catalog import SnapshotRow
from island_fast.formats.frame import Kind, Section, json_bytes, open_frame, read_json, seal
from island_fast.formats.names import LINEAGE_PATTERN, SNAPSHOT_PATTERN
from island_fast.images.pins import pinned_lineage
from island_fast.images.source import Source
from island_fast.repository.lineage import Lineage
from island_fast.repository.local_state import LocalState
from island_fast.stores.base import Store
from island_fast.stores.checked_read import get_checked
from island_fast.stores.open import open_store

if TYPE_CHECKING:
    from island_fast.stores.rate_limit import RateLimiters

__all__ = ["Found", "OpenRepository"]

_NAME = "repository"
_META = 1
_RECORD = re.compile(r".*/catalog/[0-9]{6}-[0-9]{8}")


@dataclass(frozen=True, slots=True)
class Found:
    """A live snapshot and the lineage, just refreshed, that it is in."""

    lineage: Lineage
    row: SnapshotRow


class OpenRepository:
    """An open repository, and what is found in it. Owns its store; a context manager. Not thread-safe.

    `state` is this host's local state. With `create`, a repository that is not there is made by the first
    snapshot; without, it is a NotFoundError. `left_out` tells why the last verb on all volumes, or all disks
    of a guest, passed over some of them: one IslandError for each, empty if none was.
    """

    def __init__(self, store: Store, state: LocalState, *, create: bool = False) -> None:
        self.store = store
        self.state = state
        self.left_out: list[IslandError] = []
        self._id = self._read_id()
        if self._id is None and self._has_volumes():
            raise DamagedError(
                f"the object 'repository' is missing from {store.location}, which holds volumes: without it "
                "nothing is read; put it back from a copy of the repository, and only that object"
            )
        if self._id is None and not (create and self._is_empty()):
            raise NotFoundError(
                f"{store.location} is not an island repository; check the path, or take a first snapshot "
                "into an empty one"
            )

    @classmethod
    def open(
        cls,
        url: str | os.PathLike[str],
        *,
        state: LocalState | None = None,
        create: bool = False,
        variables: str = "",
        workers: int | None = None,
        meters: RateLimiters | None = None,
    ) -> Self:
        """Open the repository at `url`: a directory's path, or swift://CONTAINER/PREFIX.

        With `create` one that is not there yet is made by the first snapshot, or copy to it: in an empty or
        new directory, or an empty place in a container. `state` is this host's local state (default: that of
        the command, see ISLAND_STATE). Swift's credentials are in the usual variables (ST_*, OS_*, OS_CLOUD),
        with `variables` in front of their names. `workers` is the most threads that work on blocks at a time
        (default: as many as help); `meters` limit how fast objects go and come, and repositories that share
        them share the rates. No configuration file is read.

        NotFoundError if there is no repository, or no container; UsageError if `url` can be none; StoreError
        if the store cannot be reached, or does not accept the credentials; DamagedError if the object
        `repository` is missing or damaged; UnsupportedObjectError if a newer version made it.
        """
        store = open_store(os.fspath(url), create_ok=create, variables=variables)
        if workers is not None:
            store.use_workers(workers)
        if meters is not None:
            from island_fast.stores.rate_limit import RateLimitedStore

            store = RateLimitedStore(store, meters)
        try:
            return cls(store, state or LocalState(), create=create)
        except BaseException:
            store.close()
            raise

    def close(self) -> None:
        """Release what the store holds, such as connections. Nothing else may follow."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def id(self) -> str:
        """The repository's random id, 32 hex digits; asking for it makes a repository that is yet to be."""
        if self._id is None:
            self._id = self._create()
        return self._id

    def _read_id(self) -> str | None:
        def check(data: memoryview) -> dict[str, Any]:
            return read_json(_NAME, open_frame(Kind.REPOSITORY, _NAME, data).section(_META, 1 << 20))

        try:
            meta = get_checked(self.store, _NAME, check, newest=True)
        except ObjectMissingError:
            return None
        if not SNAPSHOT_PATTERN.fullmatch(str(meta.get("id"))):
            raise DamagedObjectError(f"{self.store.location}: the object 'repository' is damaged")
        if meta.get("keys"):
            raise UnsupportedObjectError(
                f"{self.store.location} is encrypted, which this island does not know; use a newer one"
            )
        return str(meta["id"])

    def _is_empty(self) -> bool:
        """Whether a listing shows nothing: what others keep there stays theirs."""
        return not any(next(found, None) for found in (self.store.list(""), self.store.folders("")))

    def _has_volumes(self) -> bool:
        """Whether a listing shows a record of a volume's catalog; what others keep there may be anything."""
        listings = (self.store.list(f"{name}/catalog/") for name in self.store.folders(""))
        return any(_RECORD.fullmatch(info.name) for listing in listings for info in listing)

    def _create(self) -> str:
        """Write the object `repository`; the first of two creators wins."""
        meta = {"id": os.urandom(16).hex(), "created": time.time_ns(), "keys": []}
        parts, _ = seal(Kind.REPOSITORY, _NAME, [Section(_META, [json_bytes(meta)])])
        with contextlib.suppress(ConflictError):
            self.store.put(_NAME, parts)
        winner = self._read_id()  # of two creators at one moment both may be told that they succeeded
        if winner is None:
            raise StoreError(f"{self.store.location} does not show what was just written; try again")
        return winner

    # Finding.

    def lineage(self, name: str) -> Lineage:
        """The lineage `name`, not yet read; UsageError if that cannot be one's name."""
        if not LINEAGE_PATTERN.fullmatch(name) or name == _NAME:
            raise UsageError(
                f"{name!r} cannot name a volume; use at most 128 of A-Z a-z 0-9 . _ - with --volume"
            )
        return Lineage(self.store, self.state.lineage(self.id, name), name)

    def lineages(self, volume: str | None = None) -> Iterator[Lineage]:
        """Lineages with a catalog, refreshed: that of `volume`, or all that a listing shows.

        Of all, those whose catalog is damaged or refused are passed over, and are in `left_out` afterwards.
        """
        self.left_out = []
        if volume is not None:
            yield self._existing(volume)
            return
        for lineage, error in self.every_lineage():
            if error is not None:
                self.left_out.append(error)
            elif lineage.exists:
                yield lineage

    def every_lineage(self) -> Iterator[tuple[Lineage, DamagedError | RefusedError | None]]:
        """Whatever a listing shows that could be a lineage, refreshed, and why it cannot be read if so."""
        for name in sorted(filter(LINEAGE_PATTERN.fullmatch, self.store.folders(""))):
            lineage = self.lineage(name)
            try:
                self._refresh(lineage)
            except (DamagedError, RefusedError) as error:
                yield lineage, error
            else:
                yield lineage, None

    def _existing(self, volume: str) -> Lineage:
        """The lineage of `volume`, refreshed; NotFoundError if there is none."""
        lineage = self.lineage(volume)
        self._refresh(lineage)
        if not lineage.exists:
            raise NotFoundError(
                f"volume {volume} has no snapshots in {self.store.location}; see 'island list'"
            )
        return lineage

    def lineage_for(self, source: Source, volume: str | None) -> Lineage:
        """The lineage that a snapshot of `source` goes to, refreshed; RefusedError if it is another image's.

        It is that of `volume` if that is given, else of the image's pin, else of what this host remembers.
        """
        name = volume
        if name is None and self._id is not None:
            if pinned := self._pinned_lineage(source):
                return pinned
            name = self.state.lineage_of(self.id, source.path)
        lineage = self.lineage(name or source.path.stem)
        self._refresh(lineage)
        if lineage.exists:
            lineage.require_owner(self.state.writer)
            known = lineage.files.image() in (None, str(source.path))
            if not known and not _holds_pin(source, lineage):
                raise RefusedError(
                    f"{self.store.location} already has a volume {lineage.name}, and {source.path} neither "
                    f"has its pin nor is it known as its image; give another name with --volume, or run "
                    f"'island adopt {lineage.name}' if it is that volume"
                )
        return lineage

    def _pinned_lineage(self, source: Source) -> Lineage | None:
        """The lineage, refreshed and owned by this host, that the image holds a valid pin of."""
        pinned = [pinned_lineage(self.id, s.name) for s in reversed(source.internal_snapshots)]
        for name in dict.fromkeys(filter(None, pinned)):
            lineage = self.lineage(name)
            self._refresh(lineage)
            if lineage.exists and lineage.owner == self.state.writer and _holds_pin(source, lineage):
                return lineage
        return None

    def _refresh(self, lineage: Lineage) -> None:
        """Read the catalog; a record of unknown outcome of this host's is settled first."""
        if lineage.files.pending():
            with lineage.locked():
                return
        lineage.refresh()

    def find(self, reference: str) -> Found:
        """The snapshot that `reference` names: an id, a prefix of one, VOLUME@ID or VOLUME@latest."""
        volume, at, wanted = reference.rpartition("@")
        if not at and not wanted:
            raise UsageError("name a snapshot: an id, or VOLUME@ID, or VOLUME@latest")
        found, volumes = [], set()
        for lineage in self.lineages(volume or None):
            volumes.add(lineage.name)
            if at and wanted == "latest":
                rows = [row for row in (lineage.state.newest(),) if row]
            else:
                rows = [row for key, row in lineage.state.live.items() if key.startswith(wanted)]
            found += [Found(lineage, row) for row in rows if wanted]
        if len(found) > 1:
            raise UsageError(f"{reference} could be {len(found)} snapshots; give more of the id")
        if not at and self.left_out and not (found and SNAPSHOT_PATTERN.fullmatch(wanted)):
            raise self.left_out[0]  # what is left out may hold it, or another that begins like it
        if not found:
            if not at and wanted in volumes:
                raise NotFoundError(f"{wanted} is a volume; write {wanted}@latest or {wanted}@ID")
            raise NotFoundError(
                f"there is no snapshot {reference} in {self.store.location}; see 'island list'"
            )
        return found[0]


def _holds_pin(source: Source, lineage: Lineage) -> bool:
    """Whether the image holds the pin of a snapshot of the lineage, by its whole identity."""
    pins = [row.pin for row in lineage.state.live.values()]
    for retired in lineage.files.retired():
        manifest = lineage.cached_manifest(retired.snapshot, retired.attempt)
        pins += [manifest.pin] if manifest else []
    return any(source.find_pinned(pin) for pin in pins)
