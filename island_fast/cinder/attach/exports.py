"""The volumes of this host that are in use: a daemon over each image, a block device, and a link to it.

All state is in the kernel, in the daemons and in two folders. So a process that starts anew finds it as it
is, and any number of processes can look at it. Processes that change one volume wait for each other.
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
from island_fast.cinder.attach.vduse_control import device_name, is_on_bus, node_of
from island_fast.cinder.attach.vduse_devices import VduseDevices
from island_fast.errors import ImageInUseError, IslandError, NotFoundError, RefusedError, UsageError
from island_fast.files import make_folders
from island_fast.qemu.programs import TIMEOUT, ProgramResult, RunProgram

__all__ = ["KINDS", "Exports", "State"]

KINDS = ("vduse", "nbd", "loop")
"""The kinds of devices, the best first."""

_VOLUME = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PLAIN_PATH = re.compile(r"(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+")
_STEP = 0.05  # seconds


class State(enum.Enum):
    """How far a volume is attached on this host."""

    NONE = "none"
    SERVED = "served"  # the daemon has the image open; the device or the link is missing
    ATTACHED = "attached"  # daemon, device and link exist
    DEAD = "dead"  # a device, a link or a mount exists, but its daemon is gone


class Exports:
    """The volumes of this host that are in use. Volumes are named by their ids (UUIDs in lower case).

    `run` gets a private folder for each volume (sockets, log, mount point), `links` one link for each
    attached volume. A reboot must remove `links` (tmpfs): device numbers are assigned anew then, and an old
    link could lead to another volume's disk. `kind`, one of KINDS, is what new daemons are started for;
    running ones keep their kind. `execute` runs programs, also as root. Every call can be repeated, even
    after it was interrupted.
    """

    def __init__(self, run: Path, links: Path, execute: RunProgram, kind: str) -> None:
        if kind not in KINDS:
            raise UsageError(f"{kind!r} is not a kind of block device; use {' or '.join(KINDS)}")
        self._run, self._links = _resolve_plain(run), _resolve_plain(links)
        self._execute, self._kind = execute, kind
        self._loops, self._nbds, self._vduses = (
            LoopDevices(execute),
            NbdDevices(execute),
            VduseDevices(execute),
        )

    def attach(self, volume: str, image: Path) -> Path:
        """Serve the volume, make its device and link, and return the link; repair what is broken of them.

        Raises RefusedError if the volume is served from another image.
        """
        with self._lock(volume) as daemon:
            was_running = daemon.is_running()
            try:
                return self._attach(daemon, image)
            except IslandError:
                if not was_running or daemon.is_running():
                    raise
            return self._attach(daemon, image)  # the daemon died just now

    def serve(self, volume: str, image: Path) -> None:
        """Start the daemon if it is not running, without a device."""
        with self._lock(volume) as daemon:
            self._ensure_running(daemon, image)

    def detach(self, volume: str) -> None:
        """Remove link, device and export; the daemon keeps running.

        Raises ImageInUseError, and changes nothing, if the device is open, such as by a guest or a mount.
        """
        with self._lock_if_present(volume) as daemon:
            if daemon is None:
                self._link_path(volume).unlink(missing_ok=True)
            else:
                self._detach(daemon, end=False)

    def stop(self, volume: str) -> None:
        """Detach the volume, end its daemon, which flushes and closes the image, and remove its folder."""
        with self._lock_if_present(volume) as daemon:
            if daemon is None:
                self._link_path(volume).unlink(missing_ok=True)
            else:
                self._detach(daemon, end=True)
                if daemon.left_backings():
                    daemon.stopped_mark.touch()
                else:
                    shutil.rmtree(daemon.folder)

    def restart(self, volume: str, image: Path) -> None:
        """Replace the daemon by a new process of the program that is installed now; its device stays.

        Requests wait meanwhile. Raises RefusedError, and changes nothing, if the device is not of kind vduse.
        """
        with self._lock_if_present(volume) as daemon:
            if daemon is None or not daemon.is_running():
                raise NotFoundError(f"volume {volume} is not served here; attach it first")
            daemon.restart(image)

    def runs_older_program(self, volume: str) -> bool:
        """Return whether a volume's daemon can be restarted, and its program was replaced meanwhile."""
        daemon = self._daemon_of(volume)
        return daemon.backing().parent == daemon.vduse and daemon.runs_older_program()

    def needs_care(self, volume: str) -> bool:
        """Return whether a daemon of the volume died, and left a disk of kind vduse. Never waits."""
        daemon = self._daemon_of(volume)
        present = daemon.backing()
        dead = present.parent == daemon.vduse and not daemon.is_running()
        return bool(daemon.left_backings()) or (dead and node_of(device_name(present)) is not None)

    def hangs(self, volume: str) -> bool:
        """Return whether a disk that a dead daemon left answers nothing, so that `care` must not wait."""
        daemon = self._daemon_of(volume)
        left, present = daemon.left_backings(), daemon.backing()
        if present.parent == daemon.vduse and not daemon.is_running():
            left.append(present)
        return any(map(daemon.lacks_stand_in, left))

    def care(self, volume: str) -> None:
        """Look after the disks of kind vduse that dead daemons left: requests get errors, disks are removed.

        A disk that is open stays, for whoever has it open must get errors from it: call this again. Does
        nothing while another process changes something of the volume.
        """
        daemon = self._daemon_of(volume)
        fd = _try_lock(daemon.folder)
        if fd is None:
            return
        try:
            present = daemon.backing()
            if present.parent == daemon.vduse and not daemon.is_running() and is_on_bus(device_name(present)):
                daemon.start_stand_in(present)
            self._remove_left(daemon)
            if daemon.stopped_mark.exists() and not daemon.left_backings():
                shutil.rmtree(daemon.folder)
        finally:
            os.close(fd)

    def take_internal_snapshot(self, volume: str, name: str) -> None:
        """Take an internal snapshot of a volume that is served; on return it is in the image."""
        self._require_running(volume).take_internal_snapshot(name)

    def drop_internal_snapshot(self, volume: str, name: str) -> None:
        """Drop an internal snapshot of a volume that is served; do nothing if it does not exist."""
        self._require_running(volume).drop_internal_snapshot(name)

    def internal_snapshots(self, volume: str) -> list[str]:
        """Return the names of the internal snapshots in the image of a volume that is served."""
        return self._require_running(volume).internal_snapshots()

    def _require_running(self, volume: str) -> Daemon:
        daemon = self._daemon_of(volume)
        if not daemon.is_running():
            raise NotFoundError(f"volume {volume} is not served here; attach it first")
        return daemon

    def run_as_root(self, volume: str, verb: str, *words: str) -> ProgramResult:
        """Run a command of root's on a volume's device; only the self-test's volume has such commands."""
        backing = self._daemon_of(volume).backing()
        program = self._devices_for(backing).program
        return self._execute([program, verb, str(backing), *words], root=True)

    def grow(self, volume: str, size: int) -> None:
        """Enlarge a volume that is served to `size` bytes, and its device with it. It never shrinks."""
        with self._lock_if_present(volume) as daemon:
            if daemon is None or not daemon.is_running():
                raise NotFoundError(f"volume {volume} is not served here; attach it first")
            device = self._find_device(daemon)
            devices = self._devices_for(daemon.backing())
            if device is not None and devices is self._nbds:
                self._grow_nbd(daemon, device, size)
                return
            daemon.grow(size)
            if device is not None and devices is self._loops:
                self._loops.grow(device, daemon.disk, size)
            elif device is not None:
                self._ensure_size(daemon, device)

    def state(self, volume: str) -> State:
        """Return the volume's present state. Never waits, neither for the daemon nor for anything else."""
        daemon = self._daemon_of(volume)
        device, link = self._find_device(daemon), self._link_path(volume)
        if daemon.is_running():
            return State.ATTACHED if device is not None and _read_link(link) == device else State.SERVED
        left = device is not None or _read_link(link) is not None or is_mounted(daemon.disk)
        return State.DEAD if left else State.NONE

    def monitor(self, volume: str) -> Path | None:
        """Return the QMP socket for snapshots of a volume, or None if the volume is not served."""
        daemon = self._daemon_of(volume)
        return daemon.monitor if daemon.is_running() else None

    def volumes(self) -> list[str]:
        """Return the volumes that have a folder here; their state can still be NONE."""
        try:
            entries = list(self._run.iterdir())
        except FileNotFoundError:
            return []
        return sorted(entry.name for entry in entries if _VOLUME.fullmatch(entry.name) and entry.is_dir())

    def remove_stale_links(self) -> None:
        """Remove every link whose device does not stand on its volume's export: it is another's now."""
        try:
            links = list(self._links.iterdir())
        except FileNotFoundError:
            return
        for link in links:
            device = _read_link(link)
            if device is None or not _VOLUME.fullmatch(link.name):
                continue
            backing = self._daemon_of(link.name).backing()
            if not self._devices_for(backing).stands_on(device, backing):
                link.unlink(missing_ok=True)

    def _ensure_running(self, daemon: Daemon, image: Path) -> None:
        if daemon.is_running():
            daemon.check_serves(image)
        else:
            self._remove_leftovers(daemon)
            daemon.stopped_mark.unlink(missing_ok=True)
            daemon.start(image, self._kind)

    def _attach(self, daemon: Daemon, image: Path) -> Path:
        self._ensure_running(daemon, image)
        self._finish_growing(daemon)
        daemon.export()
        self._remove_left(daemon)
        backing = daemon.backing()
        device = self._find_device(daemon) or self._devices_for(backing).attach(backing, daemon.size())
        if backing.parent == daemon.vduse:
            self._ensure_size(daemon, device)
        return self._point_link(daemon.volume, device)

    def _ensure_size(self, daemon: Daemon, device: Path) -> None:
        """Make sure that the kernel gives a VDUSE disk the size of its volume."""
        if not self._vduses.has_size(device, daemon.size()):
            daemon.announce_size()
        self._vduses.wait_for_size(device, daemon.size())

    def _grow_nbd(self, daemon: Daemon, device: Path, size: int) -> None:
        """Enlarge the volume and its NBD device.

        The export is removed meanwhile. Requests wait for it for up to a minute, then they fail.
        """
        self._finish_growing(daemon)
        if daemon.size() == size and self._nbds.has_size(device, size):
            return
        backing = daemon.backing()
        daemon.growing_mark.touch()
        self._nbds.loosen(device, backing)
        try:
            daemon.grow(size)
        finally:
            self._nbds.resume(device, backing, daemon.size())
            daemon.growing_mark.unlink()

    def _finish_growing(self, daemon: Daemon) -> None:
        """Reconnect a device whose growth was interrupted, or abandon it if that was too long ago."""
        device, backing = self._find_device(daemon), daemon.backing()
        if not daemon.growing_mark.exists():
            return
        if device is not None:
            daemon.restore_export()
            try:
                self._nbds.resume(device, backing, daemon.size())
            except IslandError:
                self._nbds.abandon(backing)
                daemon.unexport()
        daemon.growing_mark.unlink(missing_ok=True)

    def _detach(self, daemon: Daemon, end: bool) -> None:
        """Detach, and with `end` also end the daemon. If it is dead, or dies now, remove what it left."""
        try:
            if daemon.is_running():
                self._release_device(daemon)
                if end:
                    daemon.quit()
                return
        except IslandError:
            if daemon.is_running():
                raise
        self._remove_leftovers(daemon)

    def _release_device(self, daemon: Daemon) -> None:
        """Remove link, device and export; restore the link if the device cannot be removed.

        The link goes first, so that nobody can open the device by it any more.
        """
        self._link_path(daemon.volume).unlink(missing_ok=True)
        device, backing = self._find_device(daemon), daemon.backing()
        if device is not None:
            try:
                self._devices_for(backing).release(device, backing)
            except BaseException:
                self._point_link(daemon.volume, device)
                raise
        elif backing.parent == daemon.vduse:
            self._vduses.remove(backing)
        daemon.unexport()

    def _remove_leftovers(self, daemon: Daemon) -> None:
        """Remove what a dead daemon left. Whoever has its device open keeps it, and gets errors."""
        self._link_path(daemon.volume).unlink(missing_ok=True)
        if self._loops.find(daemon.disk):
            self._loops.abandon(daemon.disk)
        unmount_dead(daemon.disk, self._execute)
        self._nbds.abandon(daemon.backing())
        daemon.abandon_vduse()
        self._remove_left(daemon)
        daemon.forget_export()

    def _remove_left(self, daemon: Daemon) -> None:
        """Remove the VDUSE disks that dead daemons left, except those that are open: those give errors."""
        for backing in daemon.left_backings():
            if is_on_bus(device_name(backing)):
                daemon.start_stand_in(backing)
            try:
                self._vduses.remove(backing)
            except ImageInUseError:
                continue
            daemon.end_stand_in(backing)
            self._vduses.remove(backing)  # if the stand-in did not
            daemon.forget_vduse(backing)

    def _find_device(self, daemon: Daemon) -> Path | None:
        backing = daemon.backing()
        return next(iter(self._devices_for(backing).find(backing)), None)

    def _devices_for(self, backing: Path) -> LoopDevices | NbdDevices | VduseDevices:
        """Return the devices of the kind that a backing belongs to."""
        if backing.parent.name == "vduse":
            return self._vduses
        return self._nbds if backing.parent.name == "nbd" else self._loops

    def _point_link(self, volume: str, device: Path) -> Path:
        """Make the volume's link lead to the device, in one step, and return the link."""
        link = self._link_path(volume)
        if _read_link(link) != device:
            make_folders(self._links, 0o755)
            scratch = link.with_name(f".{volume}")
            scratch.unlink(missing_ok=True)
            scratch.symlink_to(device)
            scratch.replace(link)
        return link

    def _link_path(self, volume: str) -> Path:
        return self._links / volume

    def _daemon_of(self, volume: str) -> Daemon:
        if not _VOLUME.fullmatch(volume):
            raise UsageError(f"{volume!r} is not a volume id; give a UUID in lower case")
        return Daemon(self._run / volume, self._execute)

    @contextlib.contextmanager
    def _lock(self, volume: str) -> Iterator[Daemon]:
        """Hold the lock of a volume, whose folder is made if need be; yield its daemon.

        No other process changes anything of the volume meanwhile.
        """
        daemon = self._daemon_of(volume)
        deadline = time.monotonic() + TIMEOUT
        while True:
            _make_private_folder(daemon.folder)
            fd = _try_lock(daemon.folder)
            if fd is not None:
                break
            if time.monotonic() > deadline:
                raise RefusedError(
                    f"volume {volume} has been in use by another process for {TIMEOUT:.0f} s; try again"
                )
            time.sleep(_STEP)
        try:
            yield daemon
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _lock_if_present(self, volume: str) -> Iterator[Daemon | None]:
        """Hold the lock of a volume that has a folder, as `_lock` does; yield None if it has none."""
        if not self._daemon_of(volume).folder.is_dir():
            yield None
            return
        with self._lock(volume) as daemon:
            yield daemon


def _resolve_plain(folder: Path) -> Path:
    """Return a folder's path without links, as the kernel's lists show it.

    Raises UsageError if it has characters that those lists escape, or that the rootwrap filters refuse.
    """
    real = Path(os.path.realpath(folder))
    if not _PLAIN_PATH.fullmatch(str(real)):
        raise UsageError(
            f"{str(folder)!r} cannot be a folder for exports; use letters, digits, _ . and - in its path"
        )
    return real


def _make_private_folder(folder: Path) -> None:
    """Make a volume's folder and its parent; raise RefusedError if other users have access to the parent."""
    run = folder.parent
    make_folders(run.parent, 0o755)  # also that of the links, which Nova reads
    run.mkdir(mode=0o700, exist_ok=True)
    if stat.S_IMODE(run.stat().st_mode) & 0o077:
        raise RefusedError(f"other users have access to the folder {str(run)!r}; give it mode 0700")
    folder.mkdir(mode=0o700, exist_ok=True)


def _try_lock(folder: Path) -> int | None:
    """Lock a folder with flock, without waiting; return a descriptor to close, or None if it is locked.

    The last holder may have removed the folder, and another process made it again: so the locked folder is
    compared with the one that now has the path.
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


def _read_link(link: Path) -> Path | None:
    """Return where a link leads, or None if there is no link."""
    try:
        return Path(os.readlink(link))
    except OSError:
        return None
