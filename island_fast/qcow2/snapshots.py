"""The table of internal snapshots.

Source: the qcow2 specification, section "Snapshots", with QEMU's limits: at most 65536 entries, 64 MiB in
all, and 1024 bytes of extra data per entry. An entry's L1 table is checked when it is used, not here: one
damaged old snapshot must not hide the others.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from island_fast.errors import DamagedImageError, UnsupportedImageError
from island_fast.qcow2.header import Header
from island_fast.qcow2.names import escape, unescape

__all__ = [
    "InternalSnapshot",
    "PinnedBase",
    "encode_snapshot",
    "find_pinned",
    "read_snapshots",
]

_ENTRY = struct.Struct(">QIHHIIQII")
_TABLE_LIMIT = 64 << 20
_EXTRA_LIMIT = 1024
_NAMES_LIMIT = 8 << 20
_WINDOW = 64 << 10
_NO_ICOUNT = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class PinnedBase:
    """The identity of an internal snapshot. All five fields must match, because names and ids are reused.

    `name` and `id` are escaped (see `names`), the time is the one that the writer of the snapshot recorded,
    and `disk_size` is the size of the volume then, in bytes.
    """

    name: str
    id: str
    seconds: int
    nanoseconds: int
    disk_size: int


@dataclass(frozen=True, slots=True)
class InternalSnapshot:
    """One entry of the table. `l1_offset` and `l1_size` (entries) are not checked yet."""

    id: str
    name: str
    seconds: int
    nanoseconds: int
    disk_size: int
    l1_offset: int
    l1_size: int
    vm_state_size: int

    @property
    def identity(self) -> PinnedBase:
        """What distinguishes this snapshot from every other that the file ever had."""
        return PinnedBase(self.name, self.id, self.seconds, self.nanoseconds, self.disk_size)


def find_pinned(snapshots: Iterable[InternalSnapshot], base: PinnedBase) -> InternalSnapshot | None:
    """Return the snapshot with exactly this identity; None if there is none, or more than one."""
    found = [snapshot for snapshot in snapshots if snapshot.identity == base]
    return found[0] if len(found) == 1 else None


def read_snapshots(
    read: Callable[[int, int], bytes], header: Header, file_size: int
) -> tuple[InternalSnapshot, ...]:
    """Read the whole table, in its order.

    read: `read(offset, length)` returns bytes of the file, fewer at its end.
    header: has the offset of the table and the number of entries.
    file_size: bytes in the file.

    Raises DamagedImageError: an entry over QEMU's limits, or a table that runs past the end of the file.
    Raises UnsupportedImageError: names of more than 8 MiB in all.
    """
    stop = min(file_size, header.snapshots_offset + _TABLE_LIMIT)
    table = _Table(read, header.snapshots_offset, stop)
    snapshots = []
    names = 0
    for number in range(header.snapshot_count):
        snapshots.append(_read_entry(table, number, header.size))
        # QEMU's own names are below 400 bytes each. Escaped, a byte can take 16 in memory.
        names += len(snapshots[-1].id) + len(snapshots[-1].name)
        if names > _NAMES_LIMIT:
            raise UnsupportedImageError(
                f"the names of the first {number + 1} internal snapshots take {names} characters, over the"
                f" limit of {_NAMES_LIMIT}; delete some with qemu-img snapshot -d"
            )
    return tuple(snapshots)


def encode_snapshot(snapshot: InternalSnapshot) -> bytes:
    """Return the table entry, padded to 8 bytes, with the extra data that QEMU 7.2 writes."""
    raw_id, raw_name = unescape(snapshot.id), unescape(snapshot.name)
    extra = struct.pack(">QQQ", snapshot.vm_state_size, snapshot.disk_size, _NO_ICOUNT)
    fixed = _ENTRY.pack(
        snapshot.l1_offset, snapshot.l1_size, len(raw_id), len(raw_name), snapshot.seconds,
        snapshot.nanoseconds, 0, min(snapshot.vm_state_size, 0xFFFFFFFF), len(extra),
    )  # fmt: skip
    entry = fixed + extra + raw_id + raw_name
    return entry + bytes(-len(entry) % 8)


class _Table:
    """Reads the table front to back through a small window, because its size is not known before."""

    def __init__(self, read: Callable[[int, int], bytes], start: int, stop: int) -> None:
        self._read = read
        self._start = self._at = start
        self._stop = stop
        self._window = b""
        self._window_at = start

    def take(self, length: int, entry: int) -> bytes:
        """Return the next bytes; `entry` is the number of the entry, for messages."""
        if self._at + length > self._stop:
            raise DamagedImageError(
                f"damaged qcow2 image: entry {entry} of its snapshot table runs past the end of the"
                " file or the limit of 64 MiB; restore it from a good copy"
            )
        begin = self._at - self._window_at
        if begin + length > len(self._window):
            self._window = self._read(self._at, max(length, min(_WINDOW, self._stop - self._at)))
            self._window_at, begin = self._at, 0
        self._at += length
        taken = self._window[begin : begin + length]
        if len(taken) < length:
            raise DamagedImageError(
                "damaged qcow2 image: its snapshot table was cut off while it was read;"
                " keep other programs from shortening the file"
            )
        return taken

    def align(self) -> None:
        """Skip to the next multiple of 8 bytes."""
        self._at += -(self._at - self._start) % 8


def _read_entry(table: _Table, entry: int, active_size: int) -> InternalSnapshot:
    """Read the next entry. Where old writers left extra data out, its values are taken as QEMU does."""
    table.align()
    (l1_offset, l1_size, id_length, name_length, seconds, nanoseconds, _, vm_state_size,
     extra_length) = _ENTRY.unpack(table.take(_ENTRY.size, entry))  # fmt: skip
    if extra_length > _EXTRA_LIMIT:
        raise DamagedImageError(
            f"damaged qcow2 image: entry {entry} of its snapshot table has {extra_length} bytes of"
            " extra data, over the limit of 1024; restore it from a good copy"
        )
    extra = table.take(extra_length, entry)
    if len(extra) >= 8:
        vm_state_size = int.from_bytes(extra[:8], "big")
    disk_size = int.from_bytes(extra[8:16], "big") if len(extra) >= 16 else active_size
    return InternalSnapshot(
        id=escape(table.take(id_length, entry)),
        name=escape(table.take(name_length, entry)),
        seconds=seconds,
        nanoseconds=nanoseconds,
        disk_size=disk_size,
        l1_offset=l1_offset,
        l1_size=l1_size,
        vm_state_size=vm_state_size,
    )
