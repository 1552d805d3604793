"""The command `island-nbd`: the steps of a volume's NBD device that need root, for the Cinder driver alone.

    island-nbd connect BACKING SIZE    make a device over the backing, and print its name
    island-nbd release BACKING         remove its device, unless it is open (exit status 3)
    island-nbd abandon BACKING         remove its device even if it is open
    island-nbd loosen BACKING          make requests wait from now on when the connection breaks
    island-nbd resume BACKING SIZE     give a loosened device a new connection and a new size

and for the volume of the self-test alone (`exercise.py`; exit status 4 if data is wrong):

    island-nbd exercise BACKING        write to its device in every way, and print digests of what it holds
    island-nbd digest BACKING          print the digests of what its device holds
    island-nbd bench BACKING OPTIONS   run qemu-img bench on its device

BACKING is a path FOLDER/VOLUME/nbd/TOKEN. Its parent is the socket of the daemon. The whole path is the name
that the kernel keeps with the device and shows in sysfs, so no command takes a device's number, which can be
another device's by now. nbd-client cannot replace this command: it sets no such name, it cannot take a free
device without a race, and it can neither find out whether a device is open nor enlarge it.

SIZE is in bytes. Errors go to standard error. Exit status 1: it failed; 2: wrong usage.
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

from island_fast.cinder.attach.exercise import DAMAGED, TESTS, fits_test, run_test
from island_fast.cinder.attach.fuse_export import open_folder
from island_fast.cinder.attach.nbd_netlink import NbdNetlink
from island_fast.errors import DamagedError
from island_fast.qemu.nbd_handshake import Client, shake_hands

__all__ = ["EXPORT", "HELD", "devices_over", "main"]

HELD = 3
"""The exit status of `release` if the device is open."""

EXPORT = "volume"
"""The name of the export that the daemon's NBD server offers."""

_BACKING = re.compile(
    r"(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/nbd/[0-9a-f]{16}"
)
_SYSFS = Path("/sys/block")
_NAME_FILE = "backend"  # in sysfs: the name that the kernel keeps with a device
_REQUEST_TIMEOUT = 180  # seconds; a daemon that takes longer to answer is as good as dead
_RESEND_AFTER = 5  # seconds; then requests whose answers the old connection lost are sent again
_RESUME_TIMEOUT = 60  # seconds in which a loosened device must be resumed
_DRAIN_TIMEOUT = 2.0  # seconds
_RELEASE_TIMEOUT = 3.0  # seconds; udev opens every device that changes, for a moment
_HANDSHAKE_TIMEOUT = 60.0  # seconds
_OFFER_EVERY = 0.5  # seconds
_STEP = 0.05  # seconds between two looks
_USAGE = """\
usage: island-nbd connect|release|abandon|loosen|resume BACKING [SIZE]
The Cinder driver runs this command as root, through rootwrap; it is not meant for users.
To make and restore snapshots, use the command island (see 'island --help')."""
_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid


def devices_over(backing: Path) -> list[str]:
    """Return the devices (nbdN) with which the kernel keeps this name."""
    found = []
    for file in sorted(_SYSFS.glob(f"nbd*/{_NAME_FILE}")):
        with contextlib.suppress(OSError):  # the device went meanwhile
            if file.read_text(errors="surrogateescape").strip("\n") == str(backing):
                found.append(file.parent.name)
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `words` are by default the process's arguments."""
    words = sys.argv[1:] if words is None else words
    if list(words) in (["--help"], ["-h"]):
        print(_USAGE)
        return 0
    command, backing, *more = [*words, "", ""][: max(2, len(words))]
    if not _BACKING.fullmatch(backing) or not _fits(command, more, Path(backing).parts[-3]):
        print(_USAGE, file=sys.stderr)
        return 2
    try:
        if command in TESTS:
            return run_test(command, _own_device(Path(backing)), more)
        return _COMMANDS[command](Path(backing), *map(int, more))
    except DamagedError as error:
        print(error, file=sys.stderr)
        return DAMAGED
    except OSError as error:
        print(error.strerror or error, file=sys.stderr)
        return 1


def _fits(command: str, more: Sequence[str], volume: str) -> bool:
    """Return whether a command takes these words, and may be used on this volume."""
    if command in ("connect", "resume"):
        return len(more) == 1 and re.fullmatch(r"[1-9][0-9]{0,18}", more[0]) is not None
    if command in ("release", "abandon", "loosen"):
        return not more
    return fits_test(command, more, volume)


def _connect(backing: Path, size: int) -> int:
    with _connect_to_daemon(backing, size) as client, NbdNetlink() as netlink:
        print(f"/dev/nbd{netlink.connect(client, str(backing), _REQUEST_TIMEOUT)}")
    return 0


def _release(backing: Path) -> int:
    """Make the kernel remove the device when its last user closes it; open and close it, and see if it goes.

    If it stays, it has another user; the kernel counts those in containers too.
    """
    with NbdNetlink() as netlink:
        for name in devices_over(backing):
            netlink.set_disconnect_on_close(_index_of(name), str(backing), True)
            os.close(os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC))
        if _wait_for(lambda: not devices_over(backing), _RELEASE_TIMEOUT):
            return 0
        for name in devices_over(backing):
            with contextlib.suppress(OSError):  # the device goes just now
                netlink.set_disconnect_on_close(_index_of(name), str(backing), False)
    return HELD if devices_over(backing) else 0


def _abandon(backing: Path) -> int:
    for name in devices_over(backing):
        with NbdNetlink() as netlink:
            netlink.disconnect(_index_of(name))
    return 0


def _loosen(backing: Path) -> int:
    """Set the times that a loosened device has.

    Requests in flight keep the times that they were sent with, so this waits for their end.
    """
    with NbdNetlink() as netlink:
        for name in devices_over(backing):
            netlink.set_timeouts(_index_of(name), str(backing), _RESEND_AFTER, _RESUME_TIMEOUT)
    _wait_for(lambda: not any(map(_count_requests, devices_over(backing))), _DRAIN_TIMEOUT)
    return 0


def _count_requests(name: str) -> int:
    """Return the number of reads and writes that a device has not answered."""
    return sum(map(int, (_SYSFS / name / "inflight").read_text().split()))


def _resume(backing: Path, size: int) -> int:
    """Offer new connections until a request is answered, then set the size.

    The kernel does not report whether it took one, and takes none before it has seen that the old one is
    broken.
    """
    for name in devices_over(backing):
        answers: list[str] = []
        reader = threading.Thread(target=_read_first_page, args=(name, answers))
        deadline = time.monotonic() + _RESUME_TIMEOUT
        with NbdNetlink() as netlink:
            while not answers and time.monotonic() < deadline:
                with _connect_to_daemon(backing, size) as client:
                    netlink.reconnect(_index_of(name), str(backing), client)
                if reader.ident is None:
                    reader.start()
                reader.join(_OFFER_EVERY)
            if answers == [""]:
                netlink.set_size(_index_of(name), str(backing), size)
            netlink.set_timeouts(_index_of(name), str(backing), _REQUEST_TIMEOUT, 0)
        if answers != [""]:
            raise OSError(errno.EIO, f"/dev/{name} did not come back: {answers or 'no answer'}")
    return 0


def _read_first_page(name: str, answers: list[str]) -> None:
    """Read the device's first page past the page cache, and append "" or the error's text to `answers`."""
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
def _own_device(backing: Path) -> Iterator[tuple[Path, int]]:
    """Yield the self-test's device, and a descriptor of it; while that is open, its number is not reused."""
    for name in devices_over(backing):
        device = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if name in devices_over(backing):
                yield Path("/dev", name), device
                return
        finally:
            os.close(device)
    raise OSError(errno.ENODEV, "the volume of the self-test has no device")


@contextlib.contextmanager
def _connect_to_daemon(backing: Path, size: int) -> Iterator[Client]:
    """Connect to the daemon's NBD server; yield the connection, which closes when the body ends.

    Raises PermissionError if another user than the owner of the volume's folder runs the server, or if a link
    leads to that folder.
    """
    with (
        open_folder(backing.parent.parent) as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection,
    ):
        connection.settimeout(_HANDSHAKE_TIMEOUT)
        connection.connect(f"/proc/self/fd/{folder}/{backing.parent.name}")
        _, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if uid != os.fstat(folder).st_uid:
            raise PermissionError(
                errno.EPERM, f"{backing.parent} is served by another user than the owner of its folder"
            )
        client = shake_hands(connection, EXPORT)
        if client.size != size:
            raise OSError(errno.EINVAL, f"the export has {client.size} bytes and the volume {size}")
        connection.settimeout(None)
        yield client


def _wait_for(condition: Callable[[], bool], timeout: float) -> bool:
    """Wait until a condition holds, and return whether it does before the timeout (seconds)."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_STEP)
    return True


def _index_of(name: str) -> int:
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
