"""What a host keeps for itself: locks, the image each lineage belongs to, and caches.

Losing all of it costs time and never data. Caches hold whole objects, or the fronts of packs, under the
names they have in the repository; each carries its own checksum, so a damaged one reads as absent.
Layout, below `ISLAND_STATE` (else the XDG state folder, for root /var/lib/island):

    writer                                  this host's random writer id
    <repository id>/<lineage>/lock          held while the catalog is followed or appended to
    <repository id>/<lineage>/sweep         held while the lineage is swept
    <repository id>/<lineage>/image         the image that the lineage belongs to
    <repository id>/<lineage>/pending/      record bytes of unknown outcome
    <repository id>/<lineage>/running/<id>  a snapshot in progress, locked by its process
    <repository id>/<lineage>/cache/...     catalog records, manifests, pack fronts, notes of packs sent
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from island_fast.arrays import Buffer
from island_fast.errors import IslandError
from island_fast.files import sync_folder

__all__ = ["LineageFiles", "LocalState", "Registration", "SentPack", "default_root"]

_LEFTOVER_AGE = 86400.0  # seconds; nothing here takes this long to write
_LOG = logging.getLogger(__name__)


def default_root() -> Path:
    """The folder of local state: ISLAND_STATE, for root /var/lib/island, else XDG_STATE_HOME/island."""
    if named := os.environ.get("ISLAND_STATE"):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/island")
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "island"


def _durable(path: Path, data: Buffer) -> None:
    """Write `path` so that it is either as before or whole and on disk."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    with open(temporary, "xb", opener=_private) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


class LocalState:
    """The folder of local state of one user on one host. Made when first written to."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    @property
    def writer(self) -> str:
        """The host's writer id, 32 hex digits, made at first use."""
        path = self.root / "writer"
        with _explained(self.root):
            if not path.exists():
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
                mine = path.with_name(f".writer.{os.urandom(4).hex()}")
                _durable(mine, os.urandom(16).hex().encode())
                with contextlib.suppress(FileExistsError):  # of two first runs one wins
                    os.link(mine, path)
                mine.unlink()
            return path.read_text().strip()

    def lineage(self, repository: str, lineage: str) -> LineageFiles:
        """The files kept for `lineage` of the repository with id `repository`."""
        return LineageFiles(self.root / repository / lineage)

    def lineage_of(self, repository: str, image: Path) -> str | None:
        """The lineage of `repository` that `image` belongs to, as this host remembers."""
        folder = self.root / repository
        if not folder.is_dir():
            return None
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        mine = [n for n in names if LineageFiles(folder / n).image() == str(image)]
        return mine[0] if len(mine) == 1 else None


@contextlib.contextmanager
def _explained(root: Path) -> Iterator[None]:
    """Turn a failure to read or write local state into a sentence."""
    try:
        yield
    except OSError as error:
        raise IslandError(
            f"local state in {root} cannot be used ({error.strerror}); set ISLAND_STATE to a folder "
            "that you may write"
        ) from error


@dataclass(frozen=True, slots=True)
class Registration:
    """A snapshot that is in progress, as written before its first object, or one that was deleted.

    `epoch` is that of the lineage then: one of an earlier epoch never commits. `copied`: its blocks come from
    another repository, whose snapshot has the same id.
    """

    snapshot: str
    attempt: int
    parent: str | None
    epoch: int = 0
    copied: bool = False


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


class LineageFiles:
    """The files that this host keeps for one lineage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self) -> None:
        """Make the folders, private to their owner."""
        with _explained(self.folder):
            for name in ("pending", "running", "cache"):
                (self.folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lineage's lock: to follow its catalog, to plan by it, and to append to it."""
        return self._holding("lock", "is changing")

    def sweeping(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock that makes sweeps of the lineage come one after another."""
        return self._holding("sweep", "is sweeping")

    @contextlib.contextmanager
    def _holding(self, name: str, doing: str) -> Iterator[None]:
        """Hold one of the lineage's locks; waits, and says for whom. The kernel drops it at exit."""
        self.make()
        with _explained(self.folder):
            file = open(self.folder / name, "a+b", opener=_private)  # noqa: SIM115 (held across the yield)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read(20).strip().decode(errors="replace") or "another"
                _LOG.warning("waiting for process %s, which %s volume %s", holder, doing, self.folder.name)
                fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(OSError):  # only to be told to those who wait
                file.truncate(0)
                file.write(b"%d\n" % os.getpid())
                file.flush()
            yield

    # The image that the lineage belongs to.

    def image(self) -> str | None:
        """Path of the image that the lineage belongs to; None if any may claim it."""
        try:
            return str(json.loads((self.folder / "image").read_bytes())["path"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def set_image(self, path: Path | None) -> None:
        """Remember `path` as the lineage's image; None lets the next snapshot claim it."""
        self.make()
        with _explained(self.folder):
            if path is None:
                (self.folder / "image").unlink(missing_ok=True)
            elif self.image() != str(path):
                _durable(self.folder / "image", json.dumps({"path": str(path)}).encode())

    # Records of unknown outcome.

    def pending(self) -> list[tuple[str, bytes]]:
        """Names (last component) and bytes of records whose outcome is not known."""
        folder = self.folder / "pending"
        if not folder.is_dir():
            return []
        found = []
        for path in sorted(p for p in folder.iterdir() if not p.name.startswith(".")):
            with contextlib.suppress(FileNotFoundError):  # settled by another process just now
                found.append((path.name, path.read_bytes()))
        return found

    def set_pending(self, name: str, data: bytes) -> None:
        """Keep a record's bytes on disk before they are sent for the first time."""
        with _explained(self.folder):
            _durable(self.folder / "pending" / name, data)

    def clear_pending(self, name: str) -> None:
        """The outcome of the record is known."""
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "pending" / name).unlink()

    # Snapshots in progress.

    @contextlib.contextmanager
    def register(self, registration: Registration) -> Iterator[None]:
        """Keep `registration` on disk and locked while the body runs; under the lineage's lock at first.

        It is removed afterwards, unless the body fails and packs were sent: the next attempt keeps those.
        """
        snapshot = registration.snapshot
        path = self.folder / "running" / snapshot
        with _explained(self.folder):
            _durable(path, json.dumps(asdict(registration)).encode())
            file = open(path, opener=_private)  # noqa: SIM115 (held across the yield)
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            except BaseException:
                if not self.cached_names(f"sent/{snapshot}"):
                    self._forget(snapshot)
                raise
            self._forget(snapshot)

    def registered(self, registration: Registration) -> bool:
        """Whether `registration` stands unchanged."""
        return any(found == registration for found, _ in self.running())

    def running(self) -> list[tuple[Registration, bool]]:
        """Registrations, each with whether its process is still there."""
        folder = self.folder / "running"
        found = []
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.name.startswith("."):
                continue
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                found.append((_registration(path.name, file.read()), _locked(file.fileno())))
        return found

    def unregister(self, snapshot: str) -> None:
        """Give up a registration, if there is one; unless registered again, that id never commits."""
        if self._forget(snapshot):
            with _explained(self.folder):
                sync_folder(self.folder / "running")

    def _forget(self, snapshot: str) -> bool:
        """Remove a registration and the notes of what was sent; False if there was none."""
        self.uncache(f"/sent/{snapshot}/")
        with _explained(self.folder), contextlib.suppress(FileNotFoundError):
            (self.folder / "running" / snapshot).unlink()
            return True
        return False

    def abandoned(self, age: float) -> list[str]:
        """Ids whose process is gone, and that registered and sent nothing for `age` seconds."""
        gone = (r.snapshot for r, alive in self.running() if not alive)
        return [snapshot for snapshot in gone if self._age(snapshot) >= age]

    def tidy(self) -> None:
        """Remove temporary files that processes left when they died in the middle of writing one."""
        oldest = time.time() - _LEFTOVER_AGE
        for folder, _, names in os.walk(self.folder):
            for path in (Path(folder, name) for name in names if name.startswith(".")):
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime < oldest:
                        path.unlink()

    def _age(self, snapshot: str) -> float:
        """Seconds since a registration was written, or a pack of it acknowledged; 0.0 if there is none."""
        try:
            return time.time() - (self.folder / "running" / snapshot).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def interrupted(self, epoch: int, copied: str | None = None) -> Registration | None:
        """The newest registration of this epoch whose process is gone and that sent packs. Under the lock.

        That of a snapshot of an image, or of the copy of `copied`: neither may go on with the other.
        """
        found = [r for r, alive in self.running() if not alive and r.epoch == epoch and r.attempt >= 0]
        meant = [r for r in found if r.copied == (copied is not None) and copied in (None, r.snapshot)]
        kept = [r for r in meant if self.cached_names(f"sent/{r.snapshot}")]
        return min(kept, key=lambda r: self._age(r.snapshot), default=None)

    def note_sent(self, snapshot: str, pack: SentPack) -> None:
        """Remember that the store has acknowledged a pack. What is lost of this is sent again."""
        self.cache(f"/sent/{snapshot}/{pack.number}", json.dumps(asdict(pack)).encode())
        with contextlib.suppress(OSError):
            os.utime(self.folder / "running" / snapshot)

    def sent(self, snapshot: str) -> list[SentPack]:
        """Packs of a registered snapshot that the store has acknowledged, by attempt and number."""
        names = self.cached_names(f"sent/{snapshot}")
        read = (_sent_pack(self.cached(f"/sent/{snapshot}/{name}") or b"") for name in names)
        return sorted((pack for pack in read if pack), key=lambda pack: (pack.attempt, pack.number))

    # Deleted snapshots whose pin may still be in the image.

    def retire(self, snapshot: str, attempt: int, parent: str | None) -> None:
        """Remember a deleted snapshot: its pin stays the base of the next table diff.

        Those retired before it whose parent it was get its parent.
        """
        for other in self.retired():
            if other.parent == snapshot:
                self._write_retired(Registration(other.snapshot, other.attempt, parent))
        self._write_retired(Registration(snapshot, attempt, parent))

    def _write_retired(self, retired: Registration) -> None:
        self.cache(f"/retired/{retired.snapshot}", json.dumps(asdict(retired)).encode())

    def retired(self) -> list[Registration]:
        """Deleted snapshots, each with its attempt and nearest live ancestor, if their pins may be left."""
        names = self.cached_names("retired")
        found = (_registration(n, self.cached(f"/retired/{n}") or b"") for n in names)
        return [one for one in found if one.attempt >= 0]

    def forget_retired(self) -> None:
        """No pin of a deleted snapshot is in the image any more."""
        for one in self.retired():
            self.uncache(f"/manifests/{one.snapshot}-{one.attempt}")
            self.uncache(f"/retired/{one.snapshot}")

    # Caches.

    def cached(self, name: str) -> bytes | None:
        """The cached bytes of object `name`; None if there are none."""
        try:
            return (self.folder / "cache" / _relative(name)).read_bytes()
        except OSError:
            return None

    def cache(self, name: str, data: Buffer) -> None:
        """Keep bytes of object `name`. A cache that cannot be written is no error."""
        path = self.folder / "cache" / _relative(name)
        temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(temporary, "xb", opener=_private) as file:
                file.write(data)
            os.replace(temporary, path)

    def uncache(self, name: str) -> None:
        """Drop what is cached of object `name`, or of every object below a name that ends with '/'."""
        path = self.folder / "cache" / _relative(name)
        with contextlib.suppress(OSError):
            if not name.endswith("/"):
                path.unlink()
            elif path.exists():
                from shutil import rmtree  # which imports every compressor that Python has

                rmtree(path)

    def cached_names(self, folder: str) -> list[str]:
        """Last components of the names cached below `folder` of the lineage (such as "catalog")."""
        path = self.folder / "cache" / folder
        if not path.is_dir():
            return []
        return sorted(p.name for p in path.iterdir() if not p.name.startswith("."))


def _relative(name: str) -> str:
    """An object's name below its lineage."""
    return name.partition("/")[2]


def _registration(snapshot: str, text: bytes) -> Registration:
    """A registration read back; one that is unreadable keeps its id alive and matches no other."""
    try:
        value = json.loads(text)
        snapshot, attempt, epoch = str(value["snapshot"]), int(value["attempt"]), int(value["epoch"])
        return Registration(snapshot, attempt, value["parent"], epoch, bool(value.get("copied")))
    except (ValueError, KeyError, TypeError):
        return Registration(snapshot, -1, None)


def _sent_pack(text: bytes) -> SentPack | None:
    """A note of a pack read back; None if it is unreadable or contradicts itself."""
    try:
        value = json.loads(text)
        runs = tuple((int(start), int(length)) for start, length in value["runs"])
        number, attempt, size, slots = (int(value[k]) for k in ("number", "attempt", "size", "slots"))
    except (ValueError, KeyError, TypeError):
        return None
    if sum(length for _, length in runs) != slots or min(number, attempt, size) < 0:
        return None
    return SentPack(number, attempt, size, slots, runs)


def _locked(fd: int) -> bool:
    """Whether another open description holds the lock on the file."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False
