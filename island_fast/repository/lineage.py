"""Read one lineage's catalog, and append to it.

Reading: records are fetched by exact name, beginning at the newest known checkpoint. An epoch is over if its
stop object is there, or record 0 of the next one: no store is believed on the absence of one object alone.
Appending: only the lineage's owner does it, under its local lock, on a newest record that the store still
holds; the bytes are on local disk before they are sent, are read back afterwards, and count only if the epoch
has not ended meanwhile. Protocol: docs/format.md, "Catalog".
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from island_fast.arrays import Buffer
from island_fast.errors import (
    UNREADABLE,
    ConflictError,
    DamagedError,
    DamagedObjectError,
    IslandError,
    NotFoundError,
    ObjectMissingError,
    StoreError,
    StoreRefusedError,
    UnsupportedObjectError,
)
from island_fast.formats.catalog import (
    CHECKPOINT_EVERY,
    CLAIMED,
    KNOWN_WRITE_FEATURES,
    Event,
    ObjectsSwept,
    OwnerChanged,
    Packs,
    Record,
    SnapshotAdded,
    SnapshotRow,
    SnapshotsDeleted,
    State,
    decode_record,
    encode_record,
)
from island_fast.formats.frame import LIMITS, Kind, Section, json_bytes, open_frame, seal
from island_fast.formats.keys import SnapshotNumbers, split_pack_key
from island_fast.formats.manifest import Manifest, decode
from island_fast.formats.names import catalog_name, epoch_stem, manifest_name, pack_name, stop_name
from island_fast.formats.runs import Runs
from island_fast.repository.claims import Claim
from island_fast.repository.clock import read_clock
from island_fast.repository.local_state import LocalState, StandingOn
from island_fast.stores.base import ObjectInfo, Store
from island_fast.stores.checked_read import get_checked

__all__ = ["Lineage"]


_LOG = logging.getLogger(__name__)
_RECORD = re.compile(r"[0-9]{6}-[0-9]{8}")
_STOP = re.compile(r"([0-9]{6})-stop")
_LAST = 10**8  # comes after every number of a record
_EPOCHS_BELIEVED = 16  # ends that are believed without being read

_Look = Callable[[str], ObjectInfo | None]
"""How the store is asked whether there is an object: `Store.peek`, or `Store.head` where absence decides."""


@dataclass(frozen=True, slots=True)
class _Fetched:
    """A record, its checksum, and whether it came from the store or out of the cache."""

    record: Record
    checksum: str
    stored: bool


@dataclass(frozen=True, slots=True)
class _CatalogPosition:
    """A position in the catalog: the record applied last. `stored`: the store is known to hold it."""

    epoch: int
    number: int
    checksum: str
    owner: str
    host: str
    seed: int
    write_features: int
    stored: bool

    @property
    def place(self) -> tuple[int, int]:
        """Epoch and number."""
        return self.epoch, self.number


class Lineage:
    """One lineage of a repository. Not thread-safe; `refresh` before use.

    `state`, `owner` and `seed` are what the newest record says. `files` is what this host keeps of the
    lineage. `numbers` is the numbering that every pack key and slot key of this object is in.
    """

    def __init__(self, store: Store, local_state: LocalState, repository_id: str, name: str) -> None:
        self.store = store
        self.files = local_state.lineage(repository_id, name)
        self.name = name
        self.numbers = SnapshotNumbers()
        self.state = State()
        self._local_state = local_state
        self._position: _CatalogPosition | None = None
        self._claim: Claim | None = None  # on the epoch that is being begun
        self._stopped: dict[int, bool] = {}  # by epoch: whether its stop was there when it was asked for

    @property
    def exists(self) -> bool:
        """Whether the lineage has a catalog."""
        return self._position is not None

    @property
    def owner(self) -> str:
        """Writer id of the owner."""
        return self._at.owner

    @property
    def writer(self) -> str:
        """Writer id of this host. Asking for it the first time makes a file in local state."""
        return self._local_state.writer

    @property
    def owned_here(self) -> bool:
        """Whether this host owns the lineage."""
        return self.owner == self.writer

    @property
    def owner_hostname(self) -> str:
        """Name of the host that took ownership."""
        return self._at.host

    @property
    def owner_described(self) -> str:
        """The owner, which is not this host, for messages."""
        if self.owner_hostname != os.uname().nodename:
            return f"host {self.owner_hostname}"
        return f"host {self.owner_hostname} (another user, or another ISLAND_STATE)"

    @property
    def epoch(self) -> int:
        """How often the lineage was adopted."""
        return self._at.epoch

    @property
    def newest_number(self) -> int:
        """The number of the newest record, in its epoch."""
        return self._at.number

    @property
    def seed(self) -> int:
        """Seed of the digests of the lineage's blocks."""
        return self._at.seed

    @property
    def current_record_names(self) -> list[str]:
        """Names of the records that a host without a cache reads: from the newest checkpoint to the end."""
        at = self._at
        first = at.number - at.number % CHECKPOINT_EVERY
        return [catalog_name(self.name, at.epoch, number) for number in range(first, at.number + 1)]

    @property
    def stop_names(self) -> list[str]:
        """Names of the objects that end the epochs before the present one."""
        return [stop_name(self.name, epoch) for epoch in range(self._at.epoch)]

    @property
    def _at(self) -> _CatalogPosition:
        if self._position is None:
            raise NotFoundError(f"volume {self.name} has no snapshots in {self.store.location}")
        return self._position

    @contextlib.contextmanager
    def hold_lock(
        self, *, just_read: bool = False, sure: bool = False, give_up: bool = False
    ) -> Iterator[None]:
        """Hold the lineage's local lock; first settle a record of unknown outcome, and read the catalog.

        If it was `just_read`, only what other processes of this host appended since is read, from the cache.
        If `sure`, the store must confirm that nothing comes after what was read. With `give_up`, for those
        who adopt the lineage, a record of unknown outcome is forgotten if what it follows is gone.
        """
        with self.files.lock():
            self._settle(give_up)
            if just_read and self.exists:
                self._read_on(lambda name: None)
            else:
                self._read_on(self.store.head if sure else self.store.peek)
            self._check_local_state()
            yield

    def refresh_to_read(self) -> None:
        """Refresh; first settle a record of unknown outcome, if that can be done now.

        Reading needs no writing: if the store does not take the record within seconds, or local state cannot
        be written, a warning says which change it is. It needs no local state either: what another user keeps
        there is not this one's to settle.
        """
        try:
            pending = self.files.pending.all()
        except OSError:
            pending = []
        if not pending:
            self.refresh()
            return
        try:
            with self.files.lock(), self.store.hurry():
                self._settle()
        except (IslandError, OSError):
            self.refresh()
            self._warn_of_pending()
        else:
            self.refresh()

    def _warn_of_pending(self) -> None:
        """Log the changes that the catalog does not show, and that may be made yet."""
        at = (self._position.epoch, self._position.number) if self._position else (0, -1)
        for last, data in self.files.pending.all():
            with contextlib.suppress(DamagedObjectError):
                record, _ = decode_record(f"{self.name}/catalog/{last}", data, SnapshotNumbers())
                if record.epoch == at[0] and record.number > at[1]:
                    _LOG.warning(
                        "volume %s: the outcome of %s is unknown; it is not shown, and may be carried out by "
                        "the next command of this host that can write to %s",
                        self.name, _describe(record.event), self.store.location,
                    )  # fmt: skip

    # Names of objects.

    def manifest_name(self, row: SnapshotRow) -> str:
        """Return the name of the manifest of a snapshot, live or dropped."""
        return manifest_name(self.name, row.id, row.attempt)

    def pack_name(self, packs: Packs, row: int) -> str:
        """Return the current name of the pack in `row` of `packs`."""
        owner, number = split_pack_key(int(packs.key[row]))
        attempt, suffix = int(packs.attempt[row]), int(packs.suffix[row])
        return pack_name(self.name, self.numbers.id(owner), number, attempt, suffix)

    def pack_names(self, packs: Packs) -> list[str]:
        """Return the current names of all of `packs`."""
        return [self.pack_name(packs, row) for row in range(len(packs))]

    # Manifests.

    def manifest(self, row: SnapshotRow) -> Manifest:
        """Return the manifest of a live snapshot, from cache or store, checked against its record.

        NotFoundError if the snapshot was deleted since the catalog was read.
        """
        cached = self.read_cached_manifest(row.id, row.attempt, row.checksum)
        if cached is not None:
            return cached
        name = self.manifest_name(row)

        def check(data: Buffer) -> tuple[Manifest, Buffer]:
            most = len(self.state.packs) if row.id in self.state.live else None
            manifest, checksum = decode(name, data, most)
            if checksum.hex() != row.checksum or manifest.snapshot != row.id:
                raise DamagedObjectError(f"manifest {name} is not the one that its catalog record names")
            return manifest, data

        try:
            manifest, data = get_checked(self.store, name, check, limit=row.manifest_size)
        except ObjectMissingError as error:
            self.refresh()
            if row.id not in self.state.live:
                raise NotFoundError(f"snapshot {row.id} was deleted meanwhile; see 'island list'") from error
            raise DamagedObjectError(
                f"manifest {name} is missing from {self.store.location}; its snapshot cannot be restored"
            ) from error
        self.files.cache.write(name, data)
        return manifest

    def read_cached_manifest(self, snapshot: str, attempt: int, wanted: str | None = None) -> Manifest | None:
        """Return the manifest of a live or deleted snapshot, if the cache holds it intact; else None.

        `wanted` is the checksum that it must have, in hex, if that is known.
        """
        name = manifest_name(self.name, snapshot, attempt)
        data = self.files.cache.read(name)
        if data is not None:
            with contextlib.suppress(DamagedObjectError):
                manifest, checksum = decode(name, data)
                return manifest if wanted in (None, checksum.hex()) else None
        return None

    def live_runs(self) -> Iterator[tuple[str, int, Runs]]:
        """Yield id, volume size and runs, with pack keys, of live snapshots whose manifests can be read."""
        for row in list(self.state.live.values()):
            with contextlib.suppress(NotFoundError, *UNREADABLE):
                manifest = self.manifest(row)
                yield row.id, manifest.volume_size, manifest.runs_by_key(self.numbers)

    @contextlib.contextmanager
    def deletion_explained(self, row: SnapshotRow, done: str) -> Iterator[None]:
        """Raise a NotFoundError for what fails in the body because the snapshot was deleted meanwhile.

        `done` says what was being done with it, such as "restored".
        """
        try:
            yield
        except (NotFoundError, DamagedError) as error:
            self.refresh()
            if row.id not in self.state.live:
                raise NotFoundError(f"snapshot {row.id} was deleted while it was {done}") from error
            raise

    # Reading.

    def refresh(self) -> None:
        """Read what was appended since the last time. A missing catalog is not an error: see `exists`.

        One look decides what is absent, so what was read can be old, and is never wrong. What must be the
        newest is appended to, which the store then refuses, or is read in a `sure` way.
        """
        self._read_on(self.store.peek)

    def _read_on(self, look: _Look) -> None:
        """Apply the records after the present position; `look` finds out whether there are more."""
        if self._position is None:
            self._start()
        while self._position is not None:
            epoch, number = self._position.place
            if not self._step(epoch, number + 1, look) and not self._step(epoch + 1, 0, look):
                return

    def _step(self, epoch: int, number: int, look: _Look | None) -> bool:
        """Apply a record; return False if there is none. See `_fetch`."""
        found = self._fetch(epoch, number, look)
        if found is not None:
            self._apply(epoch, number, found)
        return found is not None

    def _start(self) -> None:
        """Go to the newest record that the cache knows, else to the newest that the store has."""
        cached = [name for name in self.files.cache.records() if _RECORD.fullmatch(name)]
        if cached and self._replay(*_parse_name(cached[-1])):
            return
        listed = self._find_listed()
        epoch, seen = listed or (0, None)
        while self._has_ended(epoch, self.store.peek):
            if epoch % _EPOCHS_BELIEVED == _EPOCHS_BELIEVED - 1:
                self._require_ended(epoch)
            epoch, seen = epoch + 1, None
        last = self._find_last(epoch, seen)
        if last is None and epoch:  # stopped, and its adopter got no further
            epoch -= 1
            last = self._find_last(epoch, None)
        if last is not None and not self._replay(epoch, last):
            raise DamagedObjectError(
                f"volume {self.name}: the catalog has a hole before record {epoch}-{last}; run 'island "
                "verify --all --heal' on the host that owns the volume, or if that is gone, restore its "
                "snapshots with rescue.py, which comes with island"
            )

    def _require_ended(self, epoch: int) -> None:
        """Raise a StoreError if the end of an epoch is said to be there and cannot be read."""
        signs = {stop_name(self.name, epoch): Kind.STOP, catalog_name(self.name, epoch + 1, 0): Kind.RECORD}
        for name, kind in signs.items():
            with contextlib.suppress(ObjectMissingError):
                self.store.get(name, newest=True, limit=LIMITS[kind].size)
                return
        raise StoreError(
            f"{self.store.location} shows the end of epoch {epoch} of volume {self.name} and cannot send it; "
            "check the store, and the proxies between it and this host"
        )

    def _find_listed(self) -> tuple[int, int] | None:
        """Return epoch and number of the newest record in a listing; it can be late, so more can exist."""
        places = (place for place, _ in self._list_catalog() if place[1] < _LAST)
        return max(places, default=None)

    def _list_catalog(self) -> Iterator[tuple[tuple[int, int], str]]:
        """Yield place and name of what a listing of catalog/ shows; a stop comes after all of its epoch."""
        folder = f"{self.name}/catalog/"
        for info in self.store.list(folder):
            name = info.name.removeprefix(folder)
            if _RECORD.fullmatch(name):
                yield _parse_name(name), info.name
            elif stop := _STOP.fullmatch(name):
                yield (int(stop[1]), _LAST), info.name

    def _find_last(self, epoch: int, seen: int | None) -> int | None:
        """Find the last record of `epoch` by doubling and halving from `seen`; None if there is no record."""
        low, step = seen or 0, 1

        def exists(number: int) -> bool:
            return self.store.peek(catalog_name(self.name, epoch, number)) is not None

        if seen is None and not exists(low):
            return None
        if seen is not None and self.store.head(catalog_name(self.name, epoch, seen)) is None:
            # Records are never deleted.
            raise DamagedObjectError(f"volume {self.name}: catalog record {epoch}-{seen} is missing")
        while exists(low + step):
            low, step = low + step, 2 * step
        high = low + step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if exists(middle) else (low, middle)
        return low

    def _replay(self, epoch: int, last: int) -> bool:
        """Apply the records of `epoch` from its checkpoint up to `last`; return False if one is missing."""
        for number in range(last - last % CHECKPOINT_EVERY, last + 1):
            if not self._step(epoch, number, None):
                self._position = None
                return False
        return True

    def _fetch(self, epoch: int, number: int, look: _Look | None) -> _Fetched | None:
        """Return a record from cache or store; None if there is none.

        Every verb looks for the end of a catalog, and GET waits and retries before it reports that an object
        is absent. So `look` asks for the record first, and decides. It is None if the record must exist.
        """
        name = catalog_name(self.name, epoch, number)
        if (data := self.files.cache.read(name)) is not None:
            with contextlib.suppress(DamagedObjectError):
                return _Fetched(*decode_record(name, data, self.numbers), stored=False)
        if look is not None and look(name) is None:
            return None

        def check(data: Buffer) -> tuple[_Fetched, bytes]:
            return _Fetched(*decode_record(name, data, self.numbers), stored=True), bytes(data)

        try:
            limit = LIMITS[Kind.RECORD].size
            found, fetched = get_checked(self.store, name, check, limit=limit, newest=True)
        except ObjectMissingError:
            return None
        self.files.cache.write(name, fetched)
        return found

    def _apply(self, epoch: int, number: int, found: _Fetched) -> None:
        """Apply one record, which must follow the present position."""
        name = catalog_name(self.name, epoch, number)
        position, record = self._position, found.record
        begins = isinstance(record.event, OwnerChanged)
        follows = position is None or record.previous == position.checksum or begins
        named = (record.lineage, record.epoch, record.number) == (self.name, epoch, number)
        if not (follows and named and (position is not None or record.state is not None)):
            if position is not None:
                self.require_standing()  # what it should follow can be known from another copy
            raise DamagedObjectError(
                f"volume {self.name}: catalog record {name} does not follow the one before it; "
                "nothing can be deleted until this is repaired"
            )
        if isinstance(record.event, SnapshotsDeleted):
            self._remember_deleted(record.event)
        self.state = record.apply_to(self.state)
        self._position = _CatalogPosition(
            epoch, number, found.checksum, record.writer, record.host, record.seed, record.write_features,
            found.stored,
        )  # fmt: skip

    def snapshots_added_since(self, number: int) -> set[str] | None:
        """Return the ids of the snapshots that the records of this epoch after `number` added.

        None if that cannot be known, because one of these records cannot be read.
        """
        added = set()
        for after in range(number + 1, self._at.number + 1):
            try:
                found = self._fetch(self._at.epoch, after, None)
            except UNREADABLE:
                return None
            if found is None:
                return None
            if isinstance(found.record.event, SnapshotAdded):
                added.add(found.record.event.snapshot.id)
        return added

    # What is built upon, and what deletes.

    def _has_ended(self, epoch: int, look: _Look) -> bool:
        """Return whether an epoch is over: its stop is there, or record 0 of the next. Either can be lost."""
        signs = (stop_name(self.name, epoch), catalog_name(self.name, epoch + 1, 0))
        return any(look(name) for name in signs)

    def is_stopped(self) -> bool:
        """Return whether the epoch has ended and no next one has begun, as asked once for each epoch.

        Whoever appends later finds out then whether it has ended since.
        """
        if self._position is None:
            return False
        epoch = self._position.epoch
        if epoch not in self._stopped:
            self._stopped[epoch] = self.store.peek(stop_name(self.name, epoch)) is not None
        return self._stopped[epoch]

    def require_standing(self) -> None:
        """Raise a DamagedObjectError, with the way out, if the store does not hold the newest known record.

        Then another copy of the repository is in its place, most likely an older one, or the record was lost:
        what is appended, or left out as known, would rest on nothing. Records of one number often have one
        size, so the checksum is compared: it stands for all that came before, too.
        """
        at = self._at
        if at.stored:
            return
        name = catalog_name(self.name, *at.place)
        try:
            found = self._read_checksum(name)
        except UNREADABLE:
            found = "damaged"
        if found != at.checksum:
            raise self._missing_record_error(
                name, "is missing from" if found is None else "is a different one in"
            )
        self._position = replace(at, stored=True)

    def require_known_history(self) -> None:
        """Raise a DamagedObjectError, with the way out, if the store has a history that this host lacks.

        Of the newest records that a listing shows, the first one that can be read must be in the cache. If it
        is not, what it and those before it name would be garbage after an adoption.
        """
        records = (one for one in self._list_catalog() if one[0][1] < _LAST)
        for _, name in heapq.nlargest(CHECKPOINT_EVERY, records):
            found = None
            with contextlib.suppress(*UNREADABLE):
                found = self._read_checksum(name)
            if found is None:  # a listing can be late, and the record damaged
                continue
            known = None
            with contextlib.suppress(*UNREADABLE):
                known = self._checksum(name, self.files.cache.read(name) or b"")
            if known != found:
                raise DamagedObjectError(
                    f"volume {self.name}: {self.store.location} holds record {name}, which this host does "
                    "not know, as another copy of the repository does, and nothing was changed; put the "
                    f"right copy back, or {self._way_to_go_on()}"
                )
            return

    def _read_checksum(self, name: str) -> str | None:
        """Return the checksum of a record in the store, in hex; None if there is none."""
        try:
            limit = LIMITS[Kind.RECORD].size
            return get_checked(self.store, name, partial(self._checksum, name), limit=limit, newest=True)
        except ObjectMissingError:
            return None

    def _checksum(self, name: str, data: Buffer) -> str:
        """Return the checksum of the record with these bytes, in hex; raise if they are damaged."""
        return open_frame(Kind.RECORD, name, data).checksum.hex()

    def _missing_record_error(self, name: str, how: str) -> DamagedObjectError:
        return DamagedObjectError(
            f"volume {self.name}: record {name}, which this host knows, {how} {self.store.location}, as in "
            "an older copy of the repository, or another one, and nothing was changed; put the right copy "
            "back, or if only that record was lost, run 'island verify --all --heal'; or "
            f"{self._way_to_go_on()}"
        )

    def _way_to_go_on(self) -> str:
        return (
            "to go on with the copy that is there, remove "
            f"{self.files.folder / 'cache' / 'catalog'} and run 'island adopt {self.name}'"
        )

    def require_manifest(self, row: SnapshotRow) -> None:
        """Raise a DamagedObjectError, with the way out, if the store does not hold a manifest as it was.

        It is that of a snapshot from which a new one inherits, which this host may know by its cache alone.
        """
        name = self.manifest_name(row)
        info = self.store.head(name)
        if info is None or info.size != row.manifest_size:
            how = "is missing from" if info is None else "has another size in"
            raise DamagedObjectError(
                f"manifest {name} {how} {self.store.location}, and a new snapshot would inherit from its "
                "snapshot, so nothing was stored; run 'island verify --all --heal', which puts this host's "
                f"copy back, or delete the snapshot: 'island delete {self.name}@{row.id}'"
            )

    def require_open(self) -> None:
        """Raise a ConflictError if the epoch is over; the absence of both signs must be confirmed."""
        if self._has_ended(self._at.epoch, self.store.head):
            raise ConflictError(
                f"volume {self.name} was adopted by another host meanwhile, so nothing more was deleted; see "
                f"'island list --volume {self.name}'"
            )

    def require_end_of_listing(self) -> None:
        """Raise a ConflictError if a listing shows anything of the catalog newer than what was read."""
        place, name = max(self._list_catalog(), default=((0, 0), ""))
        if place > self._at.place:
            raise ConflictError(
                f"volume {self.name}: {self.store.location} lists {name}, which is newer than what can be "
                "read there, so nothing was deleted; run it again when all servers of the store answer"
            )

    def _remember_deleted(self, event: SnapshotsDeleted) -> None:
        """Remember deleted snapshots whose manifests are cached: their pins stay bases of table diffs."""
        for snapshot in event.deleted:
            row = self.state.live.get(snapshot)
            if row and self.files.cache.read(self.manifest_name(row)) is not None:
                self.files.remember_deleted(row.id, row.attempt, row.parent)

    # Writing.

    def create(self, seed: int | None = None) -> None:
        """Write record 0, which makes this host the owner, before the lineage's first pack. Under the lock.

        `seed` is given if the lineage is to hold copies: that of the lineage in the other repository.
        """
        if self.files.newest_record() is not None:
            raise DamagedObjectError(
                f"volume {self.name} is gone from {self.store.location}, where this host stored snapshots of "
                "it; put the repository back as it was, or use another --volume"
            )
        self.files.make()
        self._position = None
        seed = int.from_bytes(os.urandom(8)) >> 1 if seed is None else seed
        with self._claim_epoch(0):
            self._begin_epoch(0, None, seed, State())

    def append(self, event: Event, checkpoint: State | None = None) -> None:
        """Append the record of `event`, which carries `checkpoint` if given. Under the lock, after `refresh`.

        ConflictError if this host does not own the lineage, or another writer was faster; StoreError if the
        outcome is unknown: then it is settled before anything else happens in the lineage.
        """
        self.require_owner()
        self.require_standing()
        at = self._at
        record = Record(
            lineage=self.name,
            epoch=at.epoch,
            number=at.number + 1,
            writer=self.writer,
            host=at.host,
            previous=at.checksum,
            time=read_clock(),
            seed=at.seed,
            event=event,
            state=checkpoint,
        )
        after = record.apply_to(self.state)  # refuses what no reader would accept, before it is sent
        record = replace(record, write_features=after.write_features | self._write_features)
        if record.number % CHECKPOINT_EVERY == 0:
            record = replace(record, state=after)
        self._append(record)

    def require_owner(self) -> None:
        """Raise a ConflictError, with the way out, unless this host owns the lineage."""
        if self.is_stopped():
            raise ConflictError(
                f"the adoption of volume {self.name} was interrupted; run 'island adopt {self.name}' "
                "on the host that is to own it"
            )
        self._require_known_features()
        if not self.owned_here:
            raise ConflictError(
                f"volume {self.name} belongs to {self.owner_described}; if that is gone, or its state is "
                f"lost, run 'island adopt {self.name}' here, otherwise use another --volume"
            )

    def _require_known_features(self) -> None:
        """Raise an UnsupportedObjectError if the newest record has write features that are not known here."""
        if self._at.write_features & ~KNOWN_WRITE_FEATURES:
            raise UnsupportedObjectError(
                f"volume {self.name} is written by a newer island; this version can only read it"
            )

    def _check_local_state(self) -> None:
        """Find out whether somebody else wrote here with this host's writer id. Under the lock, refreshed.

        Local state remembers the newest record that it appended itself. If the catalog goes on after that,
        local state is older than what this host did: it was put back from a copy. What it holds as being in
        progress is over then, and the ids of that can be used up. Or another host has a copy of local state:
        then this one takes a new writer id, and owns the volume no more.
        """
        at, known = self._position, self.files.newest_record()
        if at is None or not self.owned_here:
            return
        here = StandingOn(at.epoch, at.number, at.checksum)
        if known is not None and here != known and (at.epoch, at.number) >= (known.epoch, known.number):
            if not self._local_state.made_by_this_host:
                _LOG.warning(
                    "another host writes volume %s as this one, from a copy of local state; this host gets "
                    "an identity of its own, and owns no volume until 'island adopt VOLUME' gives it one",
                    self.name,
                )  # fmt: skip
                self._local_state.renew_writer()
                return
            _LOG.warning(
                "local state is older than what this host stored of volume %s, as it is after it was put "
                "back from a copy; what was in progress then is forgotten", self.name,
            )  # fmt: skip
            self.files.forget_progress()
        if known is None or (at.epoch, at.number) >= (known.epoch, known.number):
            self.files.set_newest_record(here)

    def adopt(self) -> None:
        """Make this host the owner: end the epoch, read it to its end, begin the next. Under the lock.

        It is safe to repeat after an interruption. Records that the former owner appends later do not count.
        A stop object of an earlier epoch that the store has lost is written again. DamagedObjectError if a
        listing shows newer records than can be read: what they name would be garbage from then on.
        """
        self._require_known_features()
        self._read_as_far_as_listed()  # before the stop, which ends the former owner's work
        epoch = self._at.epoch
        with self._claim_epoch(epoch + 1):
            for ended in [*self.stop_names, stop_name(self.name, epoch)]:
                if not self.store.peek(ended):
                    self._put_stop(ended, epoch)
            self._read_as_far_as_listed()
            at = self._at
            if at.epoch != epoch:
                raise ConflictError(f"volume {self.name} was adopted by another host at the same moment")
            self._begin_epoch(epoch + 1, at.checksum, at.seed, self.state)

    def _put_stop(self, name: str, epoch: int) -> None:
        """Put a stop object; `epoch` is the present one."""
        meta = json_bytes({"writer": self.writer, "epoch": epoch, "time": read_clock()})
        parts, _ = seal(Kind.STOP, name, [Section(1, [meta])])
        with (
            contextlib.suppress(ConflictError),  # stopped by another: its next epoch decides
            self.store.use_reserve(),
        ):
            self.store.put(name, parts)

    def _read_as_far_as_listed(self) -> None:
        """Read the catalog to its end, as the store confirms it, and at least as far as a listing shows."""
        self._read_on(self.store.head)
        listed = self._find_listed()
        while listed is not None and self._at.place < listed:
            epoch, number = self._at.place
            following = (epoch, number + 1) if listed[0] == epoch else (epoch + 1, 0)
            if not self._step(*following, None):
                raise DamagedObjectError(
                    f"volume {self.name}: {self.store.location} lists record "
                    f"{catalog_name(self.name, *listed)}, and does not have "
                    f"{catalog_name(self.name, *following)}; run it again when all of its servers answer"
                )
            self._read_on(self.store.head)

    @property
    def _write_features(self) -> int:
        """What the next writer must know, whatever the state is: claims, where nothing is refused."""
        return 0 if self.store.refuses_overwrites() else CLAIMED

    @contextlib.contextmanager
    def _claim_epoch(self, epoch: int) -> Iterator[None]:
        """Let the body, and no other writer anywhere, use the names of an epoch that has not begun.

        ConflictError if another has begun it, RefusedError if another is about to. If the body fails, others
        may come as soon as it is certain that no record was sent.
        """
        if self.store.refuses_overwrites():
            yield
            return
        self._claim = self._win_claim(epoch)
        if self._claim is None:
            self._position = None
            raise self._faster_writer_error()
        try:
            yield
        except BaseException:
            if not self._is_pending(epoch):
                self._claim.withdraw()
            raise
        else:
            self._claim.fulfil()
        finally:
            self._claim = None

    def _win_claim(self, epoch: int) -> Claim | None:
        """Return a claim on `epoch` that has won; None if the epoch has begun. See `Claim.win`."""
        first = catalog_name(self.name, epoch, 0)
        doing = f"{'adopting' if epoch else 'making'} volume {self.name}"
        claim = Claim(self.store, epoch_stem(self.name, epoch), self.writer, doing)
        return claim if claim.win(lambda: self.store.head(first) is not None) else None

    def _is_pending(self, epoch: int) -> bool:
        """Return whether the first record of `epoch` may have been sent, and its outcome is unknown."""
        last = catalog_name(self.name, epoch, 0).rpartition("/")[2]
        return any(name == last for name, _ in self.files.pending.all())

    def _begin_epoch(self, epoch: int, previous: str | None, seed: int, state: State) -> None:
        """Append the first record of an epoch: it makes this host the owner, and carries the whole state."""
        record = Record(
            lineage=self.name,
            epoch=epoch,
            number=0,
            writer=self.writer,
            host=os.uname().nodename,
            previous=previous,
            time=read_clock(),
            seed=seed,
            event=OwnerChanged(),
            state=state,
            write_features=state.write_features | self._write_features,
        )
        self._append(record)

    def _append(self, record: Record) -> None:
        name = catalog_name(self.name, record.epoch, record.number)
        data, _ = encode_record(name, record, self.numbers)
        frees = isinstance(record.event, ObjectsSwept) or (record.epoch > 0 and record.number == 0)
        with contextlib.ExitStack() as around:
            if self._claim is not None:
                around.enter_context(self._claim.use())
            if frees:
                around.enter_context(self.store.use_reserve())
            self.files.pending.add(name.rpartition("/")[2], data)
            self._send(name, data, sent_before=False)
        if self._has_ended(record.epoch, self.store.peek):
            self.files.pending.remove(name.rpartition("/")[2])
            self._position = None
            raise ConflictError(
                f"volume {self.name} was adopted by another host at the same moment; whether this counts is "
                f"in 'island list --volume {self.name}'"
            )
        found = _Fetched(*decode_record(name, data, self.numbers), stored=True)
        self._apply(record.epoch, record.number, found)
        self.files.cache.write(name, data)
        self.files.set_newest_record(StandingOn(record.epoch, record.number, found.checksum))
        self.files.pending.remove(name.rpartition("/")[2])

    def _send(self, name: str, data: bytes, *, sent_before: bool) -> None:
        """PUT a record and read it back; ConflictError if the name holds another writer's bytes.

        A record that the store refuses for certain is forgotten, unless it may have been `sent_before`: what
        was refused now can have been stored then.
        """

        def check(found: Buffer) -> bool:
            if found == data:
                return True
            decode_record(name, found, SnapshotNumbers())  # raises if they are damaged, and nobody's record
            return False

        try:
            self._put(name, data, sent_before)
            same = get_checked(self.store, name, check, newest=True)
        except ConflictError:
            same = False
        except ObjectMissingError as error:
            raise StoreError(
                f"{self.store.location} does not show {name}, which was just written; run it again"
            ) from error
        if not same:
            self.files.pending.remove(name.rpartition("/")[2])
            self._position = None
            raise self._faster_writer_error()

    def _faster_writer_error(self) -> ConflictError:
        return ConflictError(
            f"volume {self.name} was written by another host at the same moment; run the command "
            f"again, and see 'island list --volume {self.name}'"
        )

    def _put(self, name: str, data: bytes, sent_before: bool) -> None:
        """PUT a record; see `_send`."""
        try:
            self.store.put(name, [data])
        except ConflictError:
            raise
        except IslandError as error:
            unknown = isinstance(error, StoreError) and not isinstance(error, StoreRefusedError)
            if not unknown and not sent_before:
                self.files.pending.withdraw(name.rpartition("/")[2])
            raise

    def _settle(self, give_up: bool = False) -> None:
        """Send records of unknown outcome again, the same bytes under the same names.

        What each of them follows must still be there, unless all of them may be given up. If the stop is lost
        of the epoch that an adoption ended, and its record 0 never arrived, the former owner can have gone
        on: that adoption is given up in any case.
        """
        for last, data in self.files.pending.all():
            name = f"{self.name}/catalog/{last}"
            try:
                record, checksum = decode_record(name, data, SnapshotNumbers())
            except DamagedObjectError:  # cut short before it was ever sent
                self.files.pending.remove(last)
                continue
            before = self._name_before(record)
            if before and self.store.head(before) is None and self.store.head(name) is None:
                if record.number and not give_up:
                    raise self._missing_record_error(before, "is missing from")
            else:
                with (
                    contextlib.suppress(ConflictError),
                    self.store.use_reserve(),
                ):  # without it nothing can follow
                    self._send_again(record, name, data)
                    self.files.set_newest_record(StandingOn(record.epoch, record.number, checksum))
            self.files.pending.remove(last)

    def _send_again(self, record: Record, name: str, data: bytes) -> None:
        """Send a record of unknown outcome; the first one of an epoch only with a claim on it."""
        claim = None
        if not record.number and not self.store.refuses_overwrites() and not self.store.peek(name):
            claim = self._win_claim(record.epoch)
        with claim.use() if claim is not None else contextlib.nullcontext():
            self._send(name, data, sent_before=True)
        if claim is not None:
            claim.fulfil()

    def _name_before(self, record: Record) -> str | None:
        """Return the name of the object that was there before the record; None for a catalog's first one."""
        if record.number:
            return catalog_name(self.name, record.epoch, record.number - 1)
        return stop_name(self.name, record.epoch - 1) if record.epoch else None


def _describe(event: Event) -> str:
    """Return what a record does, in words."""
    match event:
        case SnapshotAdded():
            return f"snapshot {event.snapshot.id}"
        case SnapshotsDeleted():
            return f"the delete of snapshot {' '.join(event.deleted)}"
        case OwnerChanged():
            return "an adoption"
    return "a sweep"


def _parse_name(name: str) -> tuple[int, int]:
    """Return epoch and number from the last component of a record's name."""
    epoch, _, number = name.partition("-")
    return int(epoch), int(number)
