"""What a host keeps for itself: locks, the image each lineage belongs to, and caches.

Losing all of it costs time and never data. Caches hold whole objects, or the fronts of packs, under the
names they have in the repository; each carries its own checksum, so a damaged one reads as absent.
Layout, below `ISLAND_STATE` (else the XDG state folder, for root /var/lib/island):

    writer                                  this host's random writer id
    <repository id>/<lineage>/lock          held while the catalog is followed or appended to
    <repository id>/<lineage>/image         the image that the lineage belongs to
    <repository id>/<lineage>/pending/      record bytes of unknown outcome
    <repository id>/<lineage>/running/<id>  a snapshot in progress, locked by its process
    <repository id>/<lineage>/cache/...     catalog records, manifests, pack fronts
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from island_fast.durable import sync_folder
from island_fast.errors import IslandError
from island_fast.frame import Buffer

__all__ = ["LineageFiles", "LocalState", "Registration", "default_root"]


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
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
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
                mine = path.with_name(f".writer.{secrets.token_hex(4)}")
                _durable(mine, secrets.token_hex(16).encode())
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
    """A snapshot's id, attempt and parent: in progress, as written before its first object, or deleted."""

    snapshot: str
    attempt: int
    parent: str | None


class LineageFiles:
    """The files that this host keeps for one lineage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self) -> None:
        """Make the folders, private to their owner."""
        with _explained(self.folder):
            for name in ("pending", "running", "cache"):
                (self.folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lineage's lock; waits for another process that holds it. The kernel drops it at exit."""
        self.make()
        with _explained(self.folder):
            file = open(self.folder / "lock", "a", opener=_private)  # noqa: SIM115 (held across the yield)
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
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
        paths = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
        return [(path.name, path.read_bytes()) for path in paths]

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
        """Keep `registration` on disk and locked while the body runs; it is removed afterwards."""
        path = self.folder / "running" / registration.snapshot
        with _explained(self.folder):
            _durable(path, json.dumps(_as_json(registration)).encode())
            file = open(path, opener=_private)  # noqa: SIM115 (held across the yield)
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

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
            with contextlib.suppress(FileNotFoundError), open(path) as file:
                found.append((_registration(path.name, file.read()), _locked(file.fileno())))
        return found

    def unregister(self, snapshot: str) -> None:
        """Give up a registration whose process is gone; that id never commits afterwards."""
        with _explained(self.folder):
            (self.folder / "running" / snapshot).unlink(missing_ok=True)
            sync_folder(self.folder / "running")

    def abandoned(self, age: float) -> list[str]:
        """Ids registered more than `age` seconds ago whose process is gone."""
        now = time.time()
        gone = []
        for registration, alive in self.running():
            path = self.folder / "running" / registration.snapshot
            with contextlib.suppress(FileNotFoundError):
                if not alive and now - path.stat().st_mtime >= age:
                    gone.append(registration.snapshot)
        return gone

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
        self.cache(f"/retired/{retired.snapshot}", json.dumps(_as_json(retired)).encode())

    def retired(self) -> list[Registration]:
        """Deleted snapshots, each with its attempt and nearest live ancestor, if their pins may be left."""
        names = self.cached_names("retired")
        found = (_registration(n, (self.cached(f"/retired/{n}") or b"").decode()) for n in names)
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
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(temporary, "xb", opener=_private) as file:
                file.write(data)
            os.replace(temporary, path)

    def uncache(self, name: str) -> None:
        """Drop what is cached of object `name`, or of every object below a name that ends with '/'."""
        path = self.folder / "cache" / _relative(name)
        with contextlib.suppress(OSError):
            if name.endswith("/"):
                shutil.rmtree(path)
            else:
                path.unlink()

    def cached_names(self, folder: str) -> list[str]:
        """Last components of the names cached below `folder` of the lineage (such as "catalog")."""
        path = self.folder / "cache" / folder
        if not path.is_dir():
            return []
        return sorted(p.name for p in path.iterdir() if not p.name.startswith("."))


def _relative(name: str) -> str:
    """An object's name below its lineage."""
    return name.partition("/")[2]


def _as_json(registration: Registration) -> dict[str, object]:
    return {name: getattr(registration, name) for name in Registration.__slots__}


def _registration(snapshot: str, text: str) -> Registration:
    """A registration read back; one that is unreadable keeps its id alive and matches no other."""
    try:
        value = json.loads(text)
        return Registration(str(value["snapshot"]), int(value["attempt"]), value["parent"])
    except (ValueError, KeyError, TypeError):
        return Registration(snapshot, -1, None)


def _locked(fd: int) -> bool:
    """Whether another open description holds the lock on the file."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False
