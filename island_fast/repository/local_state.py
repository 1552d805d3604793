"""What a host keeps for itself: locks, snapshots in progress, the image of each lineage, and caches.

Losing all of it costs time and never data. The cache holds whole objects, or the fronts of packs, under the
names they have in the repository; each carries its own checksum, so a damaged one reads as absent.
Layout, below `ISLAND_STATE` (else the XDG state folder, for root /var/lib/island):

    writer, hosts/                          this host's random writer id: see identity.py
    <repository id>/repository              where the repository is: see known_repositories.py
    <repository id>/<lineage>/lock          held while the catalog is followed or appended to
    <repository id>/<lineage>/sweep         held while the lineage is swept
    <repository id>/<lineage>/image         the image that the lineage belongs to (`ImageFile`)
    <repository id>/<lineage>/newest        the newest record that this host appended
    <repository id>/<lineage>/pending/      record bytes of unknown outcome
    <repository id>/<lineage>/deleting/<id> a snapshot that a delete took out and has not reported yet
    <repository id>/<lineage>/running/<id>  a snapshot in progress, locked by its process
    <repository id>/<lineage>/accounted     ids whose objects are garbage if no record names them
    <repository id>/<lineage>/cache/catalog/, manifests/, packs/    objects, and fronts of packs
    <repository id>/<lineage>/cache/sent/<id>/<number>              a pack that a snapshot in progress sent
    <repository id>/<lineage>/cache/retired/<id>                    a deleted snapshot whose pin can be left
    <repository id>/<lineage>/cache/proved-<hash>, damaged-<hash>   see health.py
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path

from island_fast.arrays import Buffer
from island_fast.errors import IslandError, UsageError
from island_fast.files import make_folders, open_private, sync_folder, write_durably
from island_fast.formats.names import manifest_name
from island_fast.repository.identity import Identity
from island_fast.repository.known_repositories import KnownRepositories

__all__ = [
    "AccountedIds",
    "ImageFile",
    "LineageFiles",
    "LocalState",
    "Notes",
    "ObjectCache",
    "PendingRecords",
    "Registration",
    "Registrations",
    "SentPack",
    "StandingOn",
    "StartedDelete",
    "StartedDeletes",
    "default_root",
]

_LEFTOVER_AGE = 86400.0  # seconds; nothing here takes this long to write
_RETRIED_WITHIN = 86400.0  # seconds; a delete that comes later is not meant to repeat one that failed
_LOG = logging.getLogger(__name__)


def default_root() -> Path:
    """Return the folder of local state: ISLAND_STATE, else /var/lib/island or XDG_STATE_HOME/island."""
    if named := os.environ.get("ISLAND_STATE"):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/island")
    if base := os.environ.get("XDG_STATE_HOME"):
        return Path(base) / "island"
    try:
        return Path.home() / ".local" / "state" / "island"
    except RuntimeError:  # neither HOME nor an account
        raise UsageError(
            "this user has no home directory to keep local state in; set ISLAND_STATE to a folder that you "
            "can write to"
        ) from None


class LocalState:
    """The folder of local state of one user on one host. It is made when first written to."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()
        self.repositories = KnownRepositories(self.root)
        self._identity = Identity(self.root, self._forget_progress)

    @property
    def writer(self) -> str:
        """The host's writer id, 32 hex digits; made, as a file, when first asked for. See identity.py."""
        with _explain_errors(self.root):
            return self._identity.writer

    @property
    def made_by_this_host(self) -> bool:
        """Whether the writer id was made by a host of this name: then no other should have used it."""
        with _explain_errors(self.root):
            return self._identity.made_here

    def renew_writer(self) -> None:
        """Take a new writer id: this host then owns no volume, and nothing of it is in progress."""
        with _explain_errors(self.root):
            self._identity.renew()

    def _forget_progress(self) -> None:
        """Forget what is in progress in all lineages: it is another host's, or from another time."""
        for folder in sorted(self.root.glob("*/*/running")):
            LineageFiles(folder.parent).forget_progress()

    def remember_repository(self, repository: str, place: str, refuses: bool | None = None) -> None:
        """Remember that the repository with the id `repository` is at `place`; see KnownRepositories."""
        with _explain_errors(self.root):
            self.repositories.remember(repository, place, refuses)

    def lineage(self, repository: str, lineage: str) -> LineageFiles:
        """Return the files kept for `lineage` of the repository with id `repository`."""
        return LineageFiles(self.root / repository / lineage)

    def lineage_names(self, repository: str) -> list[str]:
        """Return the lineages of `repository` that this host keeps files for."""
        with contextlib.suppress(OSError):
            return sorted(entry.name for entry in os.scandir(self.root / repository) if entry.is_dir())
        return []

    def images(self, repository: str) -> dict[str, ImageFile]:
        """Return the images that this host remembers for the lineages of `repository`."""
        names = self.lineage_names(repository)
        found = ((name, self.lineage(repository, name).image()) for name in names)
        return {name: image for name, image in found if image}


@contextlib.contextmanager
def _explain_errors(root: Path) -> Iterator[None]:
    """Raise an IslandError for an OSError of the body: the cause and the way out."""
    try:
        yield
    except OSError as error:
        raise IslandError(
            f"local state in {root} cannot be used ({error.strerror}); set ISLAND_STATE to a folder "
            "that you can write to"
        ) from error


@dataclass(frozen=True, slots=True)
class Registration:
    """A snapshot in progress, as written before its first object; or one that was deleted.

    `epoch` is the lineage's at that time: a registration of an earlier epoch never commits. `copied`: its
    blocks come from another repository, whose snapshot has the same id. `record` is the number of the newest
    record at that time, None if it was not noted: only later ones can have used the id up.
    """

    snapshot: str
    attempt: int
    parent: str | None
    epoch: int = 0
    copied: bool = False
    record: int | None = None


@dataclass(frozen=True, slots=True)
class SentPack:
    """A pack of a snapshot in progress that the store has acknowledged.

    Its slots hold, in order, the blocks of `runs` (start and length of each). `size` is the object's, bytes.
    """

    number: int
    attempt: int
    size: int
    slots: int
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class StandingOn:
    """A catalog record by epoch and number, and its checksum in hex."""

    epoch: int
    number: int
    checksum: str


@dataclass(frozen=True, slots=True)
class ImageFile:
    """The image of a lineage: its path, without symbolic links, and what identifies the file or device there.

    Of a file that is the device and inode, and the time of its creation in nanoseconds; of a block device its
    number (st_rdev) as `device`, and the name that it keeps. What is not known is 0 or "", such as of an
    image that an older version noted, or that is no file.
    """

    path: str
    device: int = 0
    inode: int = 0
    born: int = 0
    name: str = ""


class LineageFiles:
    """The files that this host keeps for one lineage: its locks, its image, and what the attributes hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending = PendingRecords(folder / "pending")
        self.started_deletes = StartedDeletes(folder / "deleting")
        self.cache = ObjectCache(folder / "cache")
        self.notes = Notes(folder / "cache")
        self.accounted = AccountedIds(folder / "accounted")
        self.registrations = Registrations(folder / "running", self.notes, self.accounted)

    def make(self) -> None:
        """Make the folders, private to their owner, also what an earlier version left open."""
        with _explain_errors(self.folder):
            for name in ("pending", "deleting", "running", "cache"):
                make_folders(self.folder / name)
            for folder in (self.folder.parent, self.folder):
                if folder.stat().st_mode & 0o077:
                    folder.chmod(0o700)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lineage's lock: to follow its catalog, to plan by it, and to append to it."""
        return self._hold("lock", "is changing")

    def lock_sweeps(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock under which sweeps and repairs of the lineage run one after another."""
        return self._hold("sweep", "is sweeping")

    @contextlib.contextmanager
    def _hold(self, name: str, doing: str) -> Iterator[None]:
        """Hold a lock of the lineage; wait for it, and log for which process. The kernel drops it at exit."""
        self.make()
        with _explain_errors(self.folder):
            file = open(self.folder / name, "a+b", opener=open_private)  # noqa: SIM115 (held across the yield)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read(20).strip().decode(errors="replace") or "another"
                _LOG.warning("waiting for process %s, which %s volume %s", holder, doing, self.folder.name)
                fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(OSError):  # only for the message of those who wait
                file.truncate(0)
                file.write(b"%d\n" % os.getpid())
                file.flush()
            yield

    def image(self) -> ImageFile | None:
        """Return the image that the lineage belongs to; None if any image can claim it."""
        try:
            value = json.loads((self.folder / "image").read_bytes())
            device, inode, born = (int(value.get(key, 0)) for key in ("device", "inode", "born"))
            return ImageFile(str(value["path"]), device, inode, born, str(value.get("name", "")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def set_image(self, image: ImageFile | None) -> None:
        """Remember `image` as the lineage's; None lets the next snapshot claim it."""
        self.make()
        with _explain_errors(self.folder):
            if image is None:
                (self.folder / "image").unlink(missing_ok=True)
            elif self.image() != image:
                write_durably(self.folder / "image", json.dumps(asdict(image)).encode())

    def newest_record(self) -> StandingOn | None:
        """Return the newest record that this host appended, as far as it remembers."""
        try:
            value = json.loads((self.folder / "newest").read_bytes())
            return StandingOn(int(value["epoch"]), int(value["number"]), str(value["checksum"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def set_newest_record(self, record: StandingOn) -> None:
        """Remember `record` as the newest that this host appended. Under the lineage's lock.

        Not flushed: what a crash of the host makes older counts as put back.
        """
        if self.newest_record() != record:
            with _explain_errors(self.folder):
                temporary = self.folder / f".newest.{os.urandom(4).hex()}"
                with open(temporary, "xb", opener=open_private) as file:
                    file.write(json.dumps(asdict(record)).encode())
                os.replace(temporary, self.folder / "newest")

    def forget_progress(self) -> None:
        """Forget registrations, also of running processes, which then fail; pending records and deletes."""
        for name, _ in self.pending.all():
            self.pending.remove(name)
        for started in self.started_deletes.all():
            self.started_deletes.remove(started.snapshot)
        self.registrations.remove_all()

    def remove_leftovers(self) -> None:
        """Remove the temporary files of processes that died while they wrote one."""
        oldest = time.time() - _LEFTOVER_AGE
        for folder, _, names in os.walk(self.folder):
            for path in (Path(folder, name) for name in names if name.startswith(".")):
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime < oldest:
                        path.unlink()

    # Deleted snapshots whose pins can still be in the image.

    def remember_deleted(self, snapshot: str, attempt: int, parent: str | None) -> None:
        """Remember a deleted snapshot: its pin stays the base of the next table diff.

        Snapshots that were deleted before it, and whose parent it was, get its parent.
        """
        for other in self.deleted_snapshots():
            if other.parent == snapshot:
                self._write_deleted(Registration(other.snapshot, other.attempt, parent))
        self._write_deleted(Registration(snapshot, attempt, parent))

    def _write_deleted(self, deleted: Registration) -> None:
        self.notes.write(f"retired/{deleted.snapshot}", json.dumps(asdict(deleted)).encode())

    def deleted_snapshots(self) -> list[Registration]:
        """Return the remembered ones, each with its attempt and its nearest live ancestor as parent."""
        names = self.notes.names("retired")
        found = (_parse_registration(n, self.notes.read(f"retired/{n}") or b"") for n in names)
        return [one for one in found if one.attempt >= 0]

    def forget_deleted(self) -> None:
        """Forget the deleted snapshots, because no pin of one is in the image any more."""
        for one in self.deleted_snapshots():
            self.cache.remove(manifest_name(self.folder.name, one.snapshot, one.attempt))
            self.notes.remove(f"retired/{one.snapshot}")


class PendingRecords:
    """Catalog records whose outcome is not known: their bytes, by the last component of their names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def all(self) -> list[tuple[str, bytes]]:
        """Return names and bytes, in the order of the names."""
        if not self._folder.is_dir():
            return []
        found = []
        for path in sorted(p for p in self._folder.iterdir() if not p.name.startswith(".")):
            with contextlib.suppress(FileNotFoundError):  # settled by another process just now
                found.append((path.name, path.read_bytes()))
        return found

    def add(self, name: str, data: bytes) -> None:
        """Keep a record's bytes on disk, before they are sent for the first time."""
        with _explain_errors(self._folder.parent):
            write_durably(self._folder / name, data)

    def remove(self, name: str) -> None:
        """Forget a record whose outcome is known."""
        with contextlib.suppress(FileNotFoundError):
            (self._folder / name).unlink()

    def withdraw(self, name: str) -> None:
        """Forget a record that was refused. On disk, too: nobody may send it after the host has crashed."""
        with _explain_errors(self._folder.parent):
            self.remove(name)
            sync_folder(self._folder)


@dataclass(frozen=True, slots=True)
class StartedDelete:
    """A snapshot that a delete is about to take out of the catalog, and the figures that it reports (bytes).

    `newest`: it was the newest of its volume then, so VOLUME@latest meant it.
    """

    snapshot: str
    newest: bool
    unreferenced: int
    freed: int


class StartedDeletes:
    """Deletes that no command has reported as done: where the outcome was unknown, or one after it failed.

    Whoever runs such a command again means the same snapshots. One that is lost, or older than a day, is no
    more than a delete that is not recognized.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def all(self) -> list[StartedDelete]:
        """Return those of the last day, in their order."""
        found = []
        for path in self._folder.iterdir() if self._folder.is_dir() else []:
            with contextlib.suppress(OSError, ValueError, TypeError):
                at = path.stat().st_mtime
                if not path.name.startswith(".") and time.time() - at < _RETRIED_WITHIN:
                    found.append((at, StartedDelete(**json.loads(path.read_bytes()))))
        return [started for _, started in sorted(found, key=itemgetter(0))]

    def add(self, started: StartedDelete) -> None:
        """Keep `started` on disk, before its record is sent."""
        with _explain_errors(self._folder.parent):
            write_durably(self._folder / started.snapshot, json.dumps(asdict(started)).encode())

    def remove(self, snapshot: str) -> None:
        """Forget a delete: its command reports it, or it was refused."""
        with contextlib.suppress(OSError):
            (self._folder / snapshot).unlink()


class AccountedIds:
    """The ids of snapshots that this host registered, or that the catalog named when it swept.

    Only what these left behind is known to be garbage once no record names it. Ids are never removed: a
    store can bring back what was deleted. One id is a line of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def all(self) -> set[str]:
        """Return the ids; none if the file cannot be read."""
        try:
            return {line for line in self._path.read_text("ascii", "replace").split("\n") if len(line) == 32}
        except OSError:
            return set()

    def add(self, snapshots: Iterable[str]) -> None:
        """Add ids, durably. Call it under the lineage's lock."""
        new = set(snapshots) - self.all()
        if not new:
            return
        with _explain_errors(self._path.parent):
            fresh = not self._path.exists()
            with open(self._path, "ab", opener=open_private) as file:
                file.write("".join(f"\n{snapshot}\n" for snapshot in sorted(new)).encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
            if fresh:
                sync_folder(self._path.parent)


class Registrations:
    """Snapshots in progress, and the packs that the store has acknowledged for each."""

    def __init__(self, folder: Path, notes: Notes, accounted: AccountedIds) -> None:
        self._folder = folder
        self._notes = notes
        self._accounted = accounted

    @contextlib.contextmanager
    def register(self, registration: Registration) -> Iterator[None]:
        """Keep `registration` on disk and locked while the body runs. Enter under the lineage's lock.

        It is removed afterwards, unless the body fails and packs were sent: the next attempt keeps those.
        """
        snapshot = registration.snapshot
        path = self._folder / snapshot
        self._accounted.add([snapshot])
        with _explain_errors(self._folder.parent):
            write_durably(path, json.dumps(asdict(registration)).encode())
            file = open(path, opener=open_private)  # noqa: SIM115 (held across the yield)
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            except BaseException:
                if not self._notes.names(f"sent/{snapshot}"):
                    self._forget(snapshot)
                raise
            self._forget(snapshot)

    def all(self) -> list[tuple[Registration, bool]]:
        """Return the registrations, each with whether its process still runs."""
        found = []
        for path in sorted(self._folder.iterdir()) if self._folder.is_dir() else []:
            if path.name.startswith("."):
                continue
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                found.append((_parse_registration(path.name, file.read()), _is_locked(file.fileno())))
        return found

    def __contains__(self, registration: Registration) -> bool:
        """Return whether `registration` stands unchanged."""
        return any(found == registration for found, _ in self.all())

    def remove_all(self) -> None:
        """Give up all registrations, and all that was sent."""
        for registration, _ in self.all():
            self.remove(registration.snapshot)

    def remove(self, snapshot: str) -> None:
        """Give up a registration, if there is one: unless registered again, that id never commits."""
        if self._forget(snapshot):
            with _explain_errors(self._folder.parent):
                sync_folder(self._folder)

    def _forget(self, snapshot: str) -> bool:
        """Remove a registration and the notes of what was sent; return False if there was none."""
        self._notes.remove_all(f"sent/{snapshot}")
        with _explain_errors(self._folder.parent), contextlib.suppress(FileNotFoundError):
            (self._folder / snapshot).unlink()
            return True
        return False

    def find_abandoned(self, age: float) -> list[str]:
        """Return the ids whose process has exited, and that registered and sent nothing for `age` seconds."""
        gone = (r.snapshot for r, alive in self.all() if not alive)
        return [snapshot for snapshot in gone if self._age(snapshot) >= age]

    def find_interrupted(self, epoch: int, copied: str | None = None) -> Registration | None:
        """Return the newest of this epoch whose process has exited and that sent packs. Under the lock.

        One without a `record` is not resumed: nothing says whether its id was used up since.

        That is an attempt at a snapshot of an image, or with `copied` at the copy of that snapshot: neither
        can resume the other.
        """
        found = [r for r, alive in self.all() if not alive and r.epoch == epoch and r.attempt >= 0]
        found = [r for r in found if r.record is not None]
        meant = [r for r in found if r.copied == (copied is not None) and copied in (None, r.snapshot)]
        kept = [r for r in meant if self._notes.names(f"sent/{r.snapshot}")]
        return min(kept, key=lambda r: self._age(r.snapshot), default=None)

    def _age(self, snapshot: str) -> float:
        """Return seconds since it was registered, or a pack of it acknowledged; 0.0 if there is none."""
        try:
            return time.time() - (self._folder / snapshot).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def note_sent(self, snapshot: str, pack: SentPack) -> None:
        """Remember that the store has acknowledged a pack. A pack whose note is lost is sent again."""
        self._notes.write(f"sent/{snapshot}/{pack.number}", json.dumps(asdict(pack)).encode())
        with contextlib.suppress(OSError):
            os.utime(self._folder / snapshot)

    def sent_packs(self, snapshot: str) -> list[SentPack]:
        """Return the packs that the store has acknowledged, by attempt and number."""
        names = self._notes.names(f"sent/{snapshot}")
        read = (_parse_sent_pack(self._notes.read(f"sent/{snapshot}/{name}") or b"") for name in names)
        return sorted((pack for pack in read if pack), key=lambda pack: (pack.attempt, pack.number))


class Notes:
    """Files by their paths below a folder; to lose one costs time only.

    One that cannot be read is absent, and one that cannot be written is not kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a file; None if there are none."""
        try:
            return (self._folder / name).read_bytes()
        except OSError:
            return None

    def write(self, name: str, data: Buffer) -> None:
        """Keep the bytes of a file."""
        path = self._folder / name
        temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
        with contextlib.suppress(OSError):
            make_folders(path.parent)
            with open(temporary, "xb", opener=open_private) as file:
                file.write(data)
            os.replace(temporary, path)

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()

    def remove_all(self, folder: str) -> None:
        """Remove every file below `folder`."""
        path = self._folder / folder
        with contextlib.suppress(OSError):
            if path.exists():
                from shutil import rmtree  # which imports every compressor that Python has

                rmtree(path)

    def names(self, folder: str) -> list[str]:
        """Return the last components of the names of the files in `folder`, sorted."""
        try:
            return sorted(name for name in os.listdir(self._folder / folder) if not name.startswith("."))
        except OSError:
            return []


class ObjectCache:
    """Copies of a lineage's objects, or of the fronts of packs, by the names that the objects have."""

    def __init__(self, folder: Path) -> None:
        self._files = Notes(folder)

    def read(self, name: str) -> bytes | None:
        """Return the cached bytes of an object; None if there are none."""
        return self._files.read(_below_lineage(name))

    def write(self, name: str, data: Buffer) -> None:
        """Keep the bytes of an object. A cache that cannot be written to is not an error."""
        self._files.write(_below_lineage(name), data)

    def remove(self, name: str) -> None:
        """Drop what is cached of an object."""
        self._files.remove(_below_lineage(name))

    def records(self) -> list[str]:
        """Return the last components of the names of the cached catalog records, sorted."""
        return self._files.names("catalog")


def _below_lineage(name: str) -> str:
    """Return an object's name below its lineage."""
    return name.partition("/")[2]


def _parse_registration(snapshot: str, text: bytes) -> Registration:
    """Parse a registration; one that is unreadable keeps its id in use, and equals no other."""
    try:
        value = json.loads(text)
        snapshot, attempt, epoch = str(value["snapshot"]), int(value["attempt"]), int(value["epoch"])
        record = int(value["record"]) if value.get("record") is not None else None
        return Registration(snapshot, attempt, value["parent"], epoch, bool(value.get("copied")), record)
    except (ValueError, KeyError, TypeError):
        return Registration(snapshot, -1, None)


def _parse_sent_pack(text: bytes) -> SentPack | None:
    """Parse the note of a pack; None if it is unreadable or contradicts itself."""
    try:
        value = json.loads(text)
        runs = tuple((int(start), int(length)) for start, length in value["runs"])
        number, attempt, size, slots = (int(value[k]) for k in ("number", "attempt", "size", "slots"))
    except (ValueError, KeyError, TypeError):
        return None
    if sum(length for _, length in runs) != slots or min(number, attempt, size) < 0:
        return None
    return SentPack(number, attempt, size, slots, runs)


def _is_locked(fd: int) -> bool:
    """Return whether another open file description holds the lock on the file."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False
