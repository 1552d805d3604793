"""The program `island-nbd`: the steps of a volume's NBD device that need root's rights, and nothing else.

    island-nbd connect BACKING SIZE    a new device over it, and its name on standard output
    island-nbd release BACKING         its device away, unless somebody has it open (status 3)
    island-nbd abandon BACKING         its device away, whoever has it open
    island-nbd loosen BACKING          from now on requests wait when the connection breaks
    island-nbd resume BACKING SIZE     a new connection and a new size for a device that was loosened

BACKING is a path FOLDER/VOLUME/nbd/TOKEN. Its parent is the socket of the daemon; the whole of it is the
name under which the kernel keeps the device and shows it in sysfs, so no command takes a device's number,
which may be another's by now. A program of its own and not nbd-client, which sets no such name, takes no free
device without a race, and can neither tell whether a device is open nor let it grow.

Sizes are bytes. Complaints go to standard error. Status 1: it failed, 2: wrong usage.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from island_fast.cinder.attach.nbd_netlink import Link
from island_fast.qemu.nbd_handshake import Client, shake_hands

__all__ = ["EXPORT", "HELD", "devices_over", "main"]

HELD = 3
"""The exit status that says: somebody has the device open."""

EXPORT = "volume"
"""The name of the export that the daemon's NBD server offers."""

_BACKING = re.compile(
    r"(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/nbd/[0-9a-f]{16}"
)
_SYSFS = Path("/sys/block")
_SHOWN = "back" + "end"  # the kernel's word, which is not ours, for the name it keeps
_ANSWER = 180  # seconds; a daemon that does not answer for so long has died in all but name
_SWIFT = 5  # seconds: requests whose answers the old connection took with it are sent again after them
_PATIENCE = 60  # seconds in which a loosened device must be resumed
_SETTLING = 2.0  # seconds
_LETTING_GO = 3.0  # seconds; udev opens every device that changes, for a moment
_STEP = 0.05
_HANDSHAKE = 60.0  # seconds
_NEXT_OFFER = 0.5  # seconds
_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid


def devices_over(backing: Path) -> list[str]:
    """Return the names (nbdN) of the devices that the kernel keeps under this name."""
    found = []
    for file in sorted(_SYSFS.glob(f"nbd*/{_SHOWN}")):
        with contextlib.suppress(OSError):  # it went meanwhile
            if file.read_text(errors="surrogateescape").strip("\n") == str(backing):
                found.append(file.parent.name)
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    command, backing, *more = [*(sys.argv[1:] if words is None else words), "", ""]
    sizes = [int(word) for word in more if re.fullmatch(r"[1-9][0-9]{0,18}", word)]
    wanted = {"connect": 1, "resume": 1, "release": 0, "abandon": 0, "loosen": 0}.get(command)
    if wanted != len(sizes) or len([w for w in more if w]) != wanted or not _BACKING.fullmatch(backing):
        print("usage: island-nbd connect|release|abandon|loosen|resume BACKING [SIZE]", file=sys.stderr)
        return 2
    try:
        return _COMMANDS[command](Path(backing), *sizes)
    except OSError as error:
        print(error.strerror or error, file=sys.stderr)
        return 1


def _connect(backing: Path, size: int) -> int:
    with _client(backing, size) as client, Link() as link:
        print(f"/dev/nbd{link.connect(client, str(backing), _ANSWER)}")
    return 0


def _release(backing: Path) -> int:
    """Let the device go when its last user closes it, be that user and see whether it went.

    If it stays, there is another user; the kernel counts those of containers too.
    """
    with Link() as link:
        for name in devices_over(backing):
            link.goes_when_closed(_index(name), str(backing), True)
            os.close(os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC))
        if _eventually(lambda: not devices_over(backing), _LETTING_GO):
            return 0
        for name in devices_over(backing):
            with contextlib.suppress(OSError):  # it goes just now
                link.goes_when_closed(_index(name), str(backing), False)
    return HELD if devices_over(backing) else 0


def _abandon(backing: Path) -> int:
    for name in devices_over(backing):
        with Link() as link:
            link.disconnect(_index(name))
    return 0


def _loosen(backing: Path) -> int:
    """Requests that are under way keep the time they were given, so those are waited for."""
    with Link() as link:
        for name in devices_over(backing):
            link.set_times(_index(name), str(backing), _SWIFT, _PATIENCE)
    _eventually(lambda: not any(map(_under_way, devices_over(backing))), _SETTLING)
    return 0


def _under_way(name: str) -> int:
    """The requests that the device has not answered: reads and writes."""
    return sum(map(int, (_SYSFS / name / "inflight").read_text().split()))


def _resume(backing: Path, size: int) -> int:
    """Offer connections until a request is answered.

    The kernel does not say whether it took one, and takes none before it saw that the old one is broken.
    """
    for name in devices_over(backing):
        answers: list[str] = []
        reader = threading.Thread(target=_read, args=(name, answers))
        deadline = time.monotonic() + _PATIENCE
        with Link() as link:
            while not answers and time.monotonic() < deadline:
                with _client(backing, size) as client:
                    link.reconnect(_index(name), str(backing), client)
                if reader.ident is None:
                    reader.start()
                reader.join(_NEXT_OFFER)
            link.set_times(_index(name), str(backing), _ANSWER, 0)
        if answers != [""]:
            raise OSError(errno.EIO, f"/dev/{name} does not come back: {answers or 'no answer'}")
    return 0


def _read(name: str, answers: list[str]) -> None:
    """Read the device's first bytes past the page cache, and append "" or the complaint."""
    try:
        fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            with mmap.mmap(-1, mmap.PAGESIZE) as buffer:
                os.preadv(fd, [buffer], 0)
        finally:
            os.close(fd)
    except OSError as error:
        answers.append(str(error))
    else:
        answers.append("")


@contextlib.contextmanager
def _client(backing: Path, size: int) -> Iterator[Client]:
    """Connect to the daemon's NBD server, which the owner of the volume's folder must run."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(_HANDSHAKE)
        connection.connect(str(backing.parent))
        _, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if uid != os.stat(backing.parent.parent).st_uid:
            raise PermissionError(
                errno.EPERM, f"{backing.parent} is served by another user than its folder's"
            )
        client = shake_hands(connection, EXPORT)
        if client.size != size:
            raise OSError(errno.EINVAL, f"the export has {client.size} bytes and the volume {size}")
        connection.settimeout(None)
        yield client


def _eventually(condition: Callable[[], bool], patience: float) -> bool:
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_STEP)
    return True


def _index(name: str) -> int:
    return int(name.removeprefix("nbd"))


_COMMANDS: dict[str, Callable[..., int]] = {
    "connect": _connect,
    "release": _release,
    "abandon": _abandon,
    "loosen": _loosen,
    "resume": _resume,
}


if __name__ == "__main__":
    sys.exit(main())
