"""Open a repository, and find the lineages and snapshots in it.

A repository is a store and a prefix, with an object `repository` that holds its id.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from island_fast.errors import (
    AccessDeniedError,
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
from island_fast.formats.frame import LIMITS, Kind, Section, json_bytes, open_frame, seal
from island_fast.formats.names import LINEAGE_PATTERN, SNAPSHOT_PATTERN, parse_claim
from island_fast.repository.claims import Claim
from island_fast.repository.clock import read_clock
from island_fast.repository.lineage import Lineage
from island_fast.repository.local_state import LocalState
from island_fast.stores.base import PROBE, Store
from island_fast.stores.checked_read import get_checked
from island_fast.stores.open import open_store

if TYPE_CHECKING:
    from island_fast.stores.rate_limit import RateLimiters

__all__ = ["FoundSnapshot", "Reference", "RepositoryBase"]

_NAME = "repository"
_META = 1
_PROBE = re.compile(re.escape(PROBE) + "[0-9a-f]{32}")
_RECORD = re.compile(r".*/catalog/[0-9]{6}-[0-9]{8}")


@dataclass(frozen=True, slots=True)
class FoundSnapshot:
    """A live snapshot, and its lineage, which was just refreshed."""

    lineage: Lineage
    row: SnapshotRow


class RepositoryBase:
    """An open repository, and what is found in it. Owns its store; a context manager. Not thread-safe.

    `state` is this host's local state. If there is no repository, that is a NotFoundError, or with `create`
    the first snapshot makes one. `left_out` holds one IslandError for each volume, or disk of a guest, that
    the last verb on all of them skipped; it is empty if none was skipped.
    """

    def __init__(
        self, store: Store, state: LocalState, *, create: bool = False, create_anew: bool = False
    ) -> None:
        self.store = store
        self.state = state
        self.left_out: list[IslandError] = []
        self._id = self._read_id()
        if store.known_to_refuse is None:
            store.on_answer = self._keep_answer
            if self._id is not None:
                known = state.repositories.refuses(self._id, store.place)
                store.known_to_refuse = None if known and store.seems_to_overwrite else known
        if self._id is None and self._has_volumes():
            raise DamagedError(
                f"the object 'repository' is missing from {store.location}, which holds volumes: without it "
                "nothing is read; put it back from a copy of the repository, and only that object"
            )
        if create and not create_anew:
            self._refuse_other_repository()
        if self._id is None and not create:
            raise NotFoundError(
                f"{store.location} is not an island repository; check the path, or take a first snapshot "
                "into an empty one"
            )
        if self._id is None and not self._is_empty():
            raise NotFoundError(
                f"{store.location} is not an island repository, and it is not empty; name an empty place, "
                f"such as {store.location}/PREFIX"
            )

    def _refuse_other_repository(self) -> None:
        """Raise RefusedError if this host knows a repository at this place, and it is not this one."""
        location, known = self.store.location, self.state.repositories.at(self.store.place)
        if not known or self._id in known:
            return
        if self._id is None:
            raise RefusedError(
                f"there is no repository in {location}, where this host has stored snapshots before; mount "
                "its disk or put it back, or give --create to begin another one there"
            )
        raise RefusedError(
            f"{location} holds a different repository from the one in which this host has stored snapshots "
            "before; mount the right disk, or give --create to use this one as well"
        )

    def remember(self) -> None:
        """Remember in local state that this repository is at its place."""
        self.state.remember_repository(self.id, self.store.place)

    def _keep_answer(self, refuses: bool) -> None:
        """Remember what was found out about the store, which each host asks once."""
        if self._id is not None:
            self.state.remember_repository(self._id, self.store.place, refuses)

    @property
    def refuses_overwrites(self) -> bool | None:
        """Whether the store itself keeps names from being overwritten; None if this host has not asked it."""
        return self.store.known_to_refuse

    @classmethod
    def open(
        cls,
        url: str | os.PathLike[str],
        *,
        state: LocalState | str | os.PathLike[str] | None = None,
        create: bool = False,
        create_anew: bool = False,
        shared: bool = False,
        variables: str = "",
        workers: int | None = None,
        meters: RateLimiters | None = None,
    ) -> Self:
        """Open the repository at `url`: a directory's path, or swift://CONTAINER/PREFIX.

        With `create`, a repository that does not exist yet is made by the first snapshot, or the first copy
        to it: in a new or empty directory, or at an empty prefix of a container. That is refused where this
        host has used another repository before, whose disk may not be mounted, unless `create_anew` is given,
        too. If it is a directory, `shared` lets its group read it. `state` is the folder of this host's local
        state (default: that of the command, see ISLAND_STATE). The credentials for Swift are in the usual
        environment variables (ST_*, OS_*, OS_CLOUD), whose names begin with `variables` if that is given. At
        most `workers` threads work on blocks at a time (default: automatic). No configuration file is read.
        `meters` is internal: the command limits its rates with it.

        NotFoundError if there is no repository, or no container; RefusedError if it is not the one that this
        host has used at that place; UsageError if `url` is not valid; StoreError
        if the store cannot be reached, or rejects the credentials; DamagedError if the object `repository` is
        missing or damaged; UnsupportedObjectError if a newer version made it.
        """
        store = open_store(os.fspath(url), create_ok=create, shared=shared, variables=variables)
        if workers is not None:
            store.use_workers(workers)
        if meters is not None:
            from island_fast.stores.rate_limit import RateLimitedStore

            store = RateLimitedStore(store, meters)
        try:
            if not isinstance(state, LocalState):
                state = LocalState(Path(state) if state is not None else None)
            return cls(store, state, create=create, create_anew=create_anew)
        except BaseException:
            store.close()
            raise

    def close(self) -> None:
        """Close the store, with its connections. The repository cannot be used afterwards."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def id(self) -> str:
        """The repository's random id, 32 hex digits. Asking for it makes the repository if needed."""
        if self._id is None:
            self._id = self._create()
        return self._id

    @property
    def exists(self) -> bool:
        """Whether the repository has been made already."""
        return self._id is not None

    def _read_id(self) -> str | None:
        def check(data: memoryview) -> dict[str, Any]:
            return open_frame(Kind.REPOSITORY, _NAME, data).json()

        try:
            limit = LIMITS[Kind.REPOSITORY].size
            meta = get_checked(self.store, _NAME, check, limit=limit, newest=True)
        except ObjectMissingError:
            return None
        except DamagedObjectError as error:
            raise DamagedObjectError(
                f"{self.store.location}: {error}; put it back from a copy of the repository, and only that "
                "object"
            ) from error
        if not SNAPSHOT_PATTERN.fullmatch(str(meta.get("id"))):
            raise DamagedObjectError(f"{self.store.location}: the object 'repository' is damaged")
        if meta.get("keys"):
            raise UnsupportedObjectError(
                f"{self.store.location} is encrypted, which this island does not know; use a newer one"
            )
        return str(meta["id"])

    def _is_empty(self) -> bool:
        """Return whether a listing shows nothing: a repository is not made among objects of others."""
        names = (info.name for info in self.store.list(""))
        found = (name for name in names if not _is_of_nobody(name))
        return next(found, None) is None and next(self.store.folders(""), None) is None

    def _has_volumes(self) -> bool:
        """Return whether a listing shows a catalog record, among whatever else is stored there."""
        listings = (self.store.list(f"{name}/catalog/") for name in self.store.folders(""))
        return any(_RECORD.fullmatch(info.name) for listing in listings for info in listing)

    def _create(self) -> str:
        """Write the object `repository`; the first of two creators wins."""
        asked = self.store.known_to_refuse is None

        def make() -> dict[str, Any]:
            return {"id": os.urandom(16).hex(), "created": read_clock()}

        if self.store.refuses_overwrites():
            self._put_repository(make())
        else:
            with self.state.repositories.begin(self.store.place, make) as begun:
                self._put_claimed(begun)
        winner = self._read_id()  # the store can report success to both of two simultaneous creators
        if winner is None:
            raise StoreError(f"{self.store.location} does not show what was just written; try again")
        if asked:
            self.state.remember_repository(winner, self.store.place, self.store.known_to_refuse)
        return winner

    def _put_claimed(self, begun: Mapping[str, Any]) -> None:
        """Write the object `repository` as the only creator, unless another was faster."""
        doing = f"making the repository {self.store.location}"
        claim = Claim(self.store, _NAME, begun["id"], doing)
        if self._read_id() is None and claim.win(lambda: self._read_id() is not None):
            with claim.use():
                self._put_repository(begun)
            claim.fulfil()

    def _put_repository(self, meta: Mapping[str, Any]) -> None:
        parts, _ = seal(Kind.REPOSITORY, _NAME, [Section(_META, [json_bytes({**meta, "keys": []})])])
        with contextlib.suppress(ConflictError):
            self.store.put(_NAME, parts)

    # Finding.

    def lineage(self, name: str) -> Lineage:
        """Return the lineage `name`, not yet read; UsageError if that is not a valid name."""
        if not LINEAGE_PATTERN.fullmatch(name) or name == _NAME:
            raise UsageError(
                f"{name!r} cannot name a volume; give a name with --volume, of at most 128 of the characters "
                "A-Z a-z 0-9 . _ -"
            )
        return Lineage(self.store, self.state, self.id, name)

    def lineages(self, volume: str | None = None) -> Iterator[Lineage]:
        """Yield lineages that exist, refreshed: that of `volume`, or all that a listing shows.

        If all are meant, those whose catalog is damaged, or cannot be read by this version or this user, are
        skipped: see `left_out`.
        """
        self.left_out = []
        if volume is not None:
            yield self.existing_lineage(volume)
            return
        for lineage, error in self.every_lineage():
            if error is not None:
                self.left_out.append(error)
            elif lineage.exists:
                yield lineage

    def every_lineage(self) -> Iterator[tuple[Lineage, IslandError | None]]:
        """Yield each folder that can be a lineage, refreshed, and the error if it cannot be read."""
        for name in sorted(filter(LINEAGE_PATTERN.fullmatch, self.store.folders(""))):
            lineage = self.lineage(name)
            try:
                lineage.refresh_to_read()
            except (DamagedError, RefusedError, AccessDeniedError) as error:
                yield lineage, error
            else:
                yield lineage, None

    def refreshed_lineage(self, name: str) -> Lineage:
        """Return the lineage `name`, refreshed; it need not exist."""
        lineage = self.lineage(name)
        lineage.refresh_to_read()
        return lineage

    def existing_lineage(self, volume: str) -> Lineage:
        """Return the lineage of `volume`, refreshed; NotFoundError if it does not exist."""
        lineage = self.refreshed_lineage(volume)
        if not lineage.exists:
            raise NotFoundError(
                f"volume {volume} has no snapshots in {self.store.location}; see 'island list'"
            )
        return lineage

    def find(self, reference: str) -> FoundSnapshot:
        """Return the snapshot that `reference` names.

        It is an id or a prefix of one, or VOLUME@ID, VOLUME@latest, VOLUME@label:TEXT or label:TEXT.
        """
        (found,) = self.find_all([reference])
        return found

    def find_all(self, references: Sequence[str]) -> list[FoundSnapshot]:
        """Return the snapshots that `references` name, in their order; see `find`.

        The catalog of a volume is read once, however many references name it, and volumes are listed once.
        Snapshots of one volume share its lineage.
        """
        asked = [Reference.parse(text) for text in references]
        found: dict[Reference, list[FoundSnapshot]] = {one: [] for one in asked}
        self.left_out = []
        volumes = dict.fromkeys(one.volume for one in asked if one.volume)
        named = {name: self.existing_lineage(name) for name in volumes}
        for one in asked:
            if one.volume:
                found[one] = one.select(named[one.volume])
        listed = set()
        if not all(one.volume for one in asked):
            for lineage in self.lineages():
                listed.add(lineage.name)
                for one in found:
                    if not one.volume:
                        found[one] += one.select(named.get(lineage.name, lineage))
        return [self._require_one(one, found[one], listed) for one in asked]

    def _require_one(
        self, reference: Reference, found: list[FoundSnapshot], listed: set[str]
    ) -> FoundSnapshot:
        """Return the only snapshot in `found`; raise an error, with the way out, if it is not one."""
        text, wanted = reference.text, reference.wanted
        if len(found) > 1:
            raise UsageError(_describe_ambiguity(text, found))
        if not reference.at and self.left_out and not (found and SNAPSHOT_PATTERN.fullmatch(wanted)):
            raise self.left_out[0]  # a volume that was skipped can hold it, or another that begins like it
        if not found:
            if not reference.at and wanted in listed:
                raise NotFoundError(f"{wanted} is a volume; write {wanted}@latest or {wanted}@ID")
            if text == "latest":
                raise NotFoundError("name the volume, as in VOLUME@latest; see 'island list'")
            label = "" if _HEX.fullmatch(wanted) or wanted.startswith(_LABEL) else _LABEL + wanted
            hint = f"; a label is written {reference.volume}@{label}" if reference.volume and label else ""
            raise NotFoundError(
                f"there is no snapshot {text} in {self.store.location}{hint}; see 'island list'"
            )
        return found[0]


def _is_of_nobody(name: str) -> bool:
    """Return whether an object is what somebody left who found out about the store, or did not go on."""
    return parse_claim(name) is not None or bool(_PROBE.fullmatch(name))


_LABEL = "label:"
_HEX = re.compile("[0-9a-f]*")
_SHOWN = 3  # of several snapshots that a label could mean, the newest


@dataclass(frozen=True, slots=True)
class Reference:
    """What a user wrote to name a snapshot: `wanted` in `volume`, or anywhere if that is empty."""

    text: str
    volume: str
    at: bool  # it has an @
    wanted: str  # an id, the beginning of one, "latest", or "label:" and a label

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse a reference; UsageError for an empty one."""
        volume, at, wanted = text.rpartition("@")
        if text.startswith(_LABEL):
            volume, at, wanted = "", "", text
        elif (found := text.find(f"@{_LABEL}")) >= 0:  # a label can have an @, a volume cannot
            volume, at, wanted = text[:found], "@", text[found + 1 :]
        if not at and not wanted:
            raise UsageError("name a snapshot: an id, or VOLUME@ID, VOLUME@latest or VOLUME@label:TEXT")
        return cls(text, volume, bool(at), wanted)

    def select(self, lineage: Lineage) -> list[FoundSnapshot]:
        """Return the snapshots of `lineage` that it can mean."""
        if not self.wanted:
            return []
        if self.wanted.startswith(_LABEL):
            label = self.wanted.removeprefix(_LABEL)
            rows = [row for row in lineage.state.live.values() if label and row.label == label]
        elif self.at and self.wanted == "latest":
            rows = [row for row in (lineage.state.newest(),) if row]
        else:
            rows = [row for key, row in lineage.state.live.items() if key.startswith(self.wanted)]
        return [FoundSnapshot(lineage, row) for row in rows]


def _describe_ambiguity(text: str, found: Sequence[FoundSnapshot]) -> str:
    """Return that a reference fits several snapshots, and how to name one of them."""
    if _LABEL not in text:
        return f"{text} could be {len(found)} snapshots; give more of the id"
    first = ", ".join(f"{one.lineage.name}@{one.row.id[:12]}" for one in found[-_SHOWN:])
    return f"{len(found)} snapshots have that label; name one by its id, such as {first}"
