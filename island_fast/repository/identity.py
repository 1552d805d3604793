"""Who writes with a folder of local state: one writer id for each machine that uses it, in its own place.

A folder of local state can be copied without anybody meaning it: with a machine that is cloned from a
template, with a home directory, out of an archive. Two users of one writer id would each take the other's
volumes for their own. So the folder records for which machine, and at which place, a writer id was made:

    hosts/<writer id>     {"machine", "product", "name", "path", "device", "inode"}
    writer                the id that was made last; all that older versions wrote

On another machine, or beside the folder that it was copied from, the folder gets an id of its own and owns
nothing, and what was in progress stays the original's. A folder that was moved, mounted elsewhere or put back
at its place keeps its id; the catalog shows whether it is older than what was stored with it (lineage.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from island_fast.files import make_folders, open_private, write_durably
from island_fast.formats.names import SNAPSHOT_PATTERN

__all__ = ["Identity", "Machine"]

_MACHINE_IDS = ("/etc/machine-id", "/var/lib/dbus/machine-id")
_PRODUCT_ID = "/sys/class/dmi/id/product_uuid"  # of the firmware; root alone can read it
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Machine:
    """What tells machines apart: machine-id(5), and the firmware's id; "" if unknown.

    `name` is the host's name; it can change.
    """

    id: str
    product: str
    name: str

    def can_be(self, other: Machine) -> bool:
        """Return whether nothing that is known of both differs, but for the name."""
        pairs = ((self.id, other.id), (self.product, other.product))
        return all(one == two for one, two in pairs if one and two)


def _read_machine() -> Machine:
    """Read what is known of this machine. Templates often keep machine-id, and containers have none."""
    found = next((text for text in map(_read_line, _MACHINE_IDS) if text not in ("", "uninitialized")), "")
    return Machine(found, _read_line(_PRODUCT_ID), os.uname().nodename)


def _read_line(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A writer id, the machine that it was made for, and the place of the folder there."""

    writer: str
    machine: Machine
    path: str
    device: int
    inode: int


class Identity:
    """The writer ids of the folder `root`. `forget` removes what is in progress there."""

    def __init__(self, root: Path, forget: Callable[[], None]) -> None:
        self._root = root
        self._forget = forget
        self._entry: _Entry | None = None

    @property
    def writer(self) -> str:
        """The writer id of this machine, 32 hex digits; made, as a file, when first asked for."""
        return self._mine.writer

    @property
    def made_here(self) -> bool:
        """Whether the writer id was made by a host of this one's name."""
        return self._mine.machine.name == self._machine().name

    @property
    def _mine(self) -> _Entry:
        if self._entry is None:
            found = self._find()
            self._entry = found if found and self._is_in_place(found) else self._settle()
        return self._entry

    def renew(self) -> None:
        """Take a new writer id, because another user of the old one is left somewhere."""
        with self._lock():
            self._entry = self._make(old=self._find())

    def _settle(self) -> _Entry:
        """Return this machine's entry after whatever happened to the folder. Log what is lost by it."""
        with self._lock():
            entry = self._find()
            if entry is None:
                return self._claim()
            if self._is_in_place(entry):  # another process was faster
                return entry
            if self._is_copy(entry):
                _LOG.warning(
                    "local state in %s is a copy of that in %s, which is still there; it gets an identity of "
                    "its own, and owns no volume until 'island adopt VOLUME' gives it one",
                    self._root, entry.path,
                )  # fmt: skip
                return self._make(old=entry)
            return self._write(self._entry_here(entry.writer, entry.machine))

    def _claim(self) -> _Entry:
        """Return a new entry: for the id that an older version left, or for a new one."""
        others, left = self._entries(), _read_line(str(self._root / "writer"))
        if SNAPSHOT_PATTERN.fullmatch(left) and left not in (one.writer for one in others):
            return self._write(self._entry_here(left, self._machine()))
        if others:
            _LOG.warning(
                "local state in %s was made on another machine, %s; this one gets an identity of its own, "
                "and owns no volume until 'island adopt VOLUME' gives it one",
                self._root, others[0].machine.name,
            )  # fmt: skip
        return self._make(old=None, first=not others)

    def _make(self, *, old: _Entry | None, first: bool = False) -> _Entry:
        """Write a new entry in place of `old`. At no moment does the old id count as this place's again."""
        if not first:
            self._forget()
        entry = self._write(self._entry_here(os.urandom(16).hex(), self._machine()))
        write_durably(self._root / "writer", entry.writer.encode())
        if old is not None:
            with contextlib.suppress(FileNotFoundError):
                (self._root / "hosts" / old.writer).unlink()
        return entry

    def _machine(self) -> Machine:
        return _read_machine()

    def _entry_here(self, writer: str, machine: Machine) -> _Entry:
        return _Entry(writer, machine, os.path.realpath(self._root), *self._place())

    def _place(self) -> tuple[int, int]:
        """Return device and inode of the folder."""
        status = os.stat(self._root)
        return status.st_dev, status.st_ino

    def _is_in_place(self, entry: _Entry) -> bool:
        """Return whether the folder is where it was: device numbers change with every boot."""
        here = self._entry_here(entry.writer, entry.machine)
        return (here.path, here.inode) == (entry.path, entry.inode)

    def _is_copy(self, entry: _Entry) -> bool:
        """Return whether the folder that had the writer id before is another one, and still has it."""
        there = Path(entry.path)
        try:
            same = os.path.samestat(os.stat(there), os.stat(self._root))
            return not same and (there / "hosts" / entry.writer).exists()
        except OSError:
            return False

    # Files.

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Make the folder, and hold the lock of its entries."""
        make_folders(self._root / "hosts")
        with open(self._root / "hosts" / "lock", "ab", opener=open_private) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _find(self) -> _Entry | None:
        """Return this machine's entry; of two, which an interruption can leave, the one made here."""
        machine = self._machine()
        mine = [one for one in self._entries() if one.machine.can_be(machine)]
        return max(mine, key=lambda one: (self._is_in_place(one), one.writer), default=None)

    def _entries(self) -> list[_Entry]:
        """Return all entries that can be read."""
        found = []
        with contextlib.suppress(OSError):
            for name in sorted(filter(SNAPSHOT_PATTERN.fullmatch, os.listdir(self._root / "hosts"))):
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    found.append(_parse(name, (self._root / "hosts" / name).read_bytes()))
        return found

    def _write(self, entry: _Entry) -> _Entry:
        machine = asdict(entry.machine)
        text = {"machine": machine.pop("id"), **machine} | {
            name: getattr(entry, name) for name in ("path", "device", "inode")
        }
        write_durably(self._root / "hosts" / entry.writer, json.dumps(text).encode())
        return entry


def _parse(writer: str, text: bytes) -> _Entry:
    """Parse an entry; ValueError, KeyError or TypeError for anything else."""
    value = json.loads(text)
    machine = Machine(str(value["machine"]), str(value["product"]), str(value["name"]))
    return _Entry(writer, machine, str(value["path"]), int(value["device"]), int(value["inode"]))
