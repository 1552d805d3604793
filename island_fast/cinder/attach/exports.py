"""The volumes of this host that are in use: a daemon over each image, a block device in front, a link to it.

All that is known is in the kernel, in the daemons and in two folders, so a process that starts anew finds it
as it is, and any number of processes may look. Those that change one volume wait for each other.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from island_fast.cinder.attach.daemon import Daemon
from island_fast.cinder.attach.loop_devices import LoopDevices
from island_fast.cinder.attach.mounts import is_mounted, unmount_dead
from island_fast.cinder.attach.nbd_devices import NbdDevices
from island_fast.errors import IslandError, NotFoundError, RefusedError, UsageError
from island_fast.qemu.programs import TIMEOUT, RunProgram

__all__ = ["KINDS", "Exports", "State"]

KINDS = ("nbd", "loop")

_VOLUME = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PLAIN_PATH = re.compile(r"(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+")
_STEP = 0.05  # seconds


class State(enum.Enum):
    """What there is of a volume on this host."""

    NONE = "none"
    SERVED = "served"  # the daemon has the image open; nothing can read or write the volume
    ATTACHED = "attached"  # the daemon, the device and the link are there
    DEAD = "dead"  # there is a device, a link or a mount, and the daemon behind them is gone


class Exports:
    """The volumes of this host that are attached. Volumes are named by their ids (UUIDs, small letters).

    `run` gets a private folder for each volume (sockets, log, mount point), `links` one link for each that is
    attached. `links` must be gone after a reboot (tmpfs): device numbers are given out anew then, and an old
    link could lead to another's disk. `kind`, "nbd" or "loop", is what daemons are started for; those
    that run keep theirs. `execute` starts programs, also as root.
    Every call may be repeated, after it was cut off in the middle too.
    """

    def __init__(self, run: Path, links: Path, execute: RunProgram, kind: str) -> None:
        if kind not in KINDS:
            raise UsageError(f"{kind!r} is no kind of block device; there is {', '.join(KINDS)}")
        self._run, self._links = _plain(run), _plain(links)
        self._execute, self._kind = execute, kind
        self._loops, self._nbds = LoopDevices(execute), NbdDevices(execute)

    def attach(self, volume: str, image: Path) -> Path:
        """Serve the volume and return the link to its block device; what is broken of it is mended.

        RefusedError if the volume is served from another image.
        """
        with self._alone(volume) as daemon:
            ran = daemon.runs()
            try:
                return self._attach(daemon, image)
            except IslandError:
                if not ran or daemon.runs():
                    raise
            return self._attach(daemon, image)  # it died just now

    def serve(self, volume: str, image: Path) -> None:
        """Start the daemon alone, without a device, or find it running."""
        with self._alone(volume) as daemon:
            self._start(daemon, image)

    def detach(self, volume: str) -> None:
        """Take link, device and export away; the daemon goes on.

        ImageInUseError, and all stays as it was, if something has the device open: a guest, a mount.
        """
        with self._alone_if_there(volume) as daemon:
            if daemon is None:
                self._link(volume).unlink(missing_ok=True)
            else:
                self._wind_down(daemon, end=False)

    def stop(self, volume: str) -> None:
        """Detach the volume and end its daemon, which flushes and closes the image; nothing is left."""
        with self._alone_if_there(volume) as daemon:
            if daemon is None:
                self._link(volume).unlink(missing_ok=True)
            else:
                self._wind_down(daemon, end=True)
                shutil.rmtree(daemon.folder)

    def freeze(self, volume: str, name: str) -> None:
        """Take an internal snapshot of a volume that is served; on return it is in its image."""
        self._served(volume).freeze(name)

    def thaw(self, volume: str, name: str) -> None:
        """Drop that internal snapshot again; nothing happens if it is not there."""
        self._served(volume).thaw(name)

    def internals(self, volume: str) -> list[str]:
        """The names of the internal snapshots in the image of a volume that is served."""
        return self._served(volume).internals()

    def _served(self, volume: str) -> Daemon:
        daemon = self._daemon(volume)
        if not daemon.runs():
            raise NotFoundError(f"volume {volume} is not served here; attach it first")
        return daemon

    def grow(self, volume: str, size: int) -> None:
        """Make a volume that is served `size` bytes big, the device in front too. It never shrinks."""
        with self._alone_if_there(volume) as daemon:
            if daemon is None or not daemon.runs():
                raise NotFoundError(f"volume {volume} is not served here; attach it first")
            device = self._device(daemon)
            if device is not None and daemon.backing() != daemon.disk:
                self._grow_nbd(daemon, device, size)
                return
            daemon.grow(size)
            if device is not None:
                self._loops.grow(device, daemon.disk, size)

    def state(self, volume: str) -> State:
        """Tell what there is of the volume now. Never waits, neither for the daemon nor for anything else."""
        daemon = self._daemon(volume)
        link, device = self._link(volume), self._device(daemon)
        if daemon.runs():
            there = device is not None and _target(link) == device
            return State.ATTACHED if there else State.SERVED
        left = device is not None or _target(link) is not None or is_mounted(daemon.disk)
        return State.DEAD if left else State.NONE

    def monitor(self, volume: str) -> Path | None:
        """Return the QMP socket for snapshots of a volume that is served; None of one that is not."""
        daemon = self._daemon(volume)
        return daemon.monitor if daemon.runs() else None

    def volumes(self) -> list[str]:
        """Return the volumes that there may be anything of."""
        try:
            entries = list(self._run.iterdir())
        except FileNotFoundError:
            return []
        return sorted(entry.name for entry in entries if _VOLUME.fullmatch(entry.name) and entry.is_dir())

    def forget_stale_links(self) -> None:
        """Remove every link whose device does not stand on its volume's export: it is another's by now."""
        try:
            links = list(self._links.iterdir())
        except FileNotFoundError:
            return
        for link in links:
            device = _target(link)
            if device is None or not _VOLUME.fullmatch(link.name):
                continue
            backing = self._daemon(link.name).backing()
            if not self._of(backing).stands_on(device, backing):
                link.unlink(missing_ok=True)

    def _start(self, daemon: Daemon, image: Path) -> None:
        if daemon.runs():
            daemon.check_serves(image)
        else:
            self._clear(daemon)
            daemon.start(image, self._kind)

    def _attach(self, daemon: Daemon, image: Path) -> Path:
        self._start(daemon, image)
        self._finish_growing(daemon)
        daemon.export()
        backing = daemon.backing()
        device = self._device(daemon) or self._of(backing).attach(backing, daemon.size())
        return self._point(daemon.volume, device)

    def _grow_nbd(self, daemon: Daemon, device: Path, size: int) -> None:
        """Requests wait while the export is away: a minute at most, then they fail."""
        self._finish_growing(daemon)
        if daemon.size() == size and self._nbds.has_size(device, size):
            return
        backing = daemon.backing()
        daemon.growing.touch()
        self._nbds.loosen(device, backing)
        try:
            daemon.grow(size)
        finally:
            self._nbds.resume(device, backing, daemon.size())
            daemon.growing.unlink()

    def _finish_growing(self, daemon: Daemon) -> None:
        """Bring a device back whose growth was cut off; if it was too long ago, it is abandoned."""
        device, backing = self._device(daemon), daemon.backing()
        if not daemon.growing.exists():
            return
        if device is not None:
            daemon.restore_export()
            try:
                self._nbds.resume(device, backing, daemon.size())
            except IslandError:
                self._nbds.abandon(backing)
                daemon.unexport()
        daemon.growing.unlink(missing_ok=True)

    def _wind_down(self, daemon: Daemon, end: bool) -> None:
        """Detach, and with `end` end the daemon; one that is dead, or dies just now, is cleared away."""
        try:
            if daemon.runs():
                self._let_go(daemon)
                if end:
                    daemon.quit()
                return
        except IslandError:
            if daemon.runs():
                raise
        self._clear(daemon)

    def _let_go(self, daemon: Daemon) -> None:
        """The link first: from then on nobody comes in by it; back again if the device is held."""
        link = self._link(daemon.volume)
        link.unlink(missing_ok=True)
        device = self._device(daemon)
        if device is not None:
            try:
                backing = daemon.backing()
                self._of(backing).release(device, backing)
            except BaseException:
                self._point(daemon.volume, device)
                raise
        daemon.unexport()

    def _clear(self, daemon: Daemon) -> None:
        """Take away what a dead daemon left. Who has the dead device open keeps it, and gets errors."""
        self._link(daemon.volume).unlink(missing_ok=True)
        for device in self._loops.over(daemon.disk):
            self._loops.abandon(device)
        unmount_dead(daemon.disk, self._execute)
        self._nbds.abandon(daemon.backing())
        daemon.forget()

    def _device(self, daemon: Daemon) -> Path | None:
        backing = daemon.backing()
        return next(iter(self._of(backing).over(backing)), None)

    def _of(self, backing: Path) -> LoopDevices | NbdDevices:
        """The devices of the kind that stands on such a backing."""
        return self._nbds if backing.parent.name == "nbd" else self._loops

    def _point(self, volume: str, device: Path) -> Path:
        """Make the link lead to the device; whoever follows it meanwhile finds the old or the new one."""
        link = self._link(volume)
        if _target(link) != device:
            self._links.mkdir(mode=0o755, parents=True, exist_ok=True)
            scratch = link.with_name(f".{volume}")
            scratch.unlink(missing_ok=True)
            scratch.symlink_to(device)
            scratch.replace(link)
        return link

    def _link(self, volume: str) -> Path:
        return self._links / volume

    def _daemon(self, volume: str) -> Daemon:
        if not _VOLUME.fullmatch(volume):
            raise UsageError(f"{volume!r} is no volume id; give a UUID in small letters")
        return Daemon(self._run / volume, self._execute)

    @contextlib.contextmanager
    def _alone(self, volume: str) -> Iterator[Daemon]:
        """The volume's daemon, its folder made, and nobody else changing anything of it until the end."""
        daemon = self._daemon(volume)
        deadline = time.monotonic() + TIMEOUT
        while True:
            _make_private(daemon.folder)
            fd = _try_lock(daemon.folder)
            if fd is not None:
                break
            if time.monotonic() > deadline:
                raise RefusedError(
                    f"something else is done to volume {volume} for {TIMEOUT:.0f} s; try again"
                )
            time.sleep(_STEP)
        try:
            yield daemon
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _alone_if_there(self, volume: str) -> Iterator[Daemon | None]:
        """The same, but a volume without a folder gets none, and None is given."""
        if not self._daemon(volume).folder.is_dir():
            yield None
            return
        with self._alone(volume) as daemon:
            yield daemon


def _plain(folder: Path) -> Path:
    """The folder's path without links, as the kernel lists it.

    UsageError if it has characters that the kernel's lists write otherwise, and the rootwrap filters refuse.
    """
    real = Path(os.path.realpath(folder))
    if not _PLAIN_PATH.fullmatch(str(real)):
        raise UsageError(
            f"{str(folder)!r} cannot be a folder for exports; use letters, digits, _ . and - in its path"
        )
    return real


def _make_private(folder: Path) -> None:
    """Make a volume's folder, and the one above; RefusedError if others than its owner may enter that."""
    run = folder.parent
    run.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(run.stat().st_mode) & 0o077:
        raise RefusedError(f"the folder {str(run)!r} is open to others; give it mode 0700")
    folder.mkdir(mode=0o700, exist_ok=True)


def _try_lock(folder: Path) -> int | None:
    """Lock a folder by its flock, without waiting: a descriptor to close, or None.

    Whoever held it before may have removed the folder and another made it again, hence the second look.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.stat(folder)):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def _target(link: Path) -> Path | None:
    """Where a link leads; None where there is none."""
    try:
        return Path(os.readlink(link))
    except (FileNotFoundError, OSError):
        return None
