"""The qemu-storage-daemon that owns one volume's image, and what it exports.

It outlives the process that starts it: where systemd runs, as a transient unit of its own, elsewhere in
a session of its own. Everything about it is in one private folder, and there it is found again.

FUSE shows the volume as a file, for a loop device to stand on. In front of the qcow2 node stands a filter
that refuses discards, with ENOSYS, after which the kernel asks for none any more. For QEMU before 8.0
answers "punch a hole", which a loop device makes of "write zeros", by a discard, and that leaves old
data in the clusters that the hole does not wholly cover (QEMU's issue 1507). Without holes the kernel
writes zeros, and the qcow2 node makes zero clusters of them (detect-zeroes), which gives the space back.

NBD tells discards from zeros, so a daemon that is started for it has no filter. Which of the two a daemon has
decides what it exports: only the topmost node may be exported, for a snapshot stops the writes of that one
alone, and writes that come in below it damage the image. QEMU lets no node grow while its NBD server exports
it: for a moment the export goes, and its client must wait.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import secrets
import shlex
import time
from pathlib import Path

from island_fast.cinder.attach.mounts import is_mounted
from island_fast.cinder.attach.nbd_root import EXPORT
from island_fast.cinder.attach.process import is_alive, listener
from island_fast.errors import ImageInUseError, IslandError, RefusedError, UsageError
from island_fast.qcow2.image import Image
from island_fast.qemu.block_nodes import (
    FRONT_NODE,
    VOLUME_NODE,
    file_node,
    front_node,
    qcow2_node,
    supports_direct_io,
)
from island_fast.qemu.programs import TIMEOUT, RunProgram, check_run, error_text
from island_fast.qemu.qmp import Qmp

__all__ = ["Daemon"]

SYSTEMD = Path("/run/systemd/system")  # is there where systemd is the first process, sd_booted(3)

_EXPORT = "device"
_NBD_EXPORT: dict[str, object] = {
    "type": "nbd",
    "id": _EXPORT,
    "node-name": VOLUME_NODE,
    "name": EXPORT,
    "writable": True,
}
_MAX_SOCKET_PATH = 107  # bytes, unix(7)
_START_PATIENCE = 60.0  # seconds until the program runs; opening an image that needs repair comes after
_STEP = 0.05  # seconds between two looks
_LOG_TAIL = 4096  # bytes


class Daemon:
    """One volume's daemon, running or not. `folder`, named by the volume, is private and is the caller's.

    `control` is our own QMP socket, `monitor` the one for snapshots (each serves one client at a time),
    `disk` the file under which FUSE exports the volume, `socket` that of the NBD server. The caller keeps
    callers of one folder apart.
    """

    def __init__(self, folder: Path, execute: RunProgram) -> None:
        self.folder = folder
        self.volume = folder.name
        self.control = folder / "control"
        self.monitor = folder / "monitor"
        self.disk = folder / "disk"
        self.socket = folder / "nbd"
        self._execute = execute
        if len(os.fsencode(self.monitor)) > _MAX_SOCKET_PATH:
            raise UsageError(
                f"the path {str(self.monitor)!r} has over {_MAX_SOCKET_PATH} bytes, too long for a socket; "
                f"choose a shorter folder for the sockets"
            )

    def runs(self) -> bool:
        """Tell whether somebody listens on the control socket. Never waits for an answer."""
        return listener(self.control) is not None

    def start(self, image: Path, kind: str) -> None:
        """Start the daemon on a qcow2 image, for devices of this kind; on return it serves it.

        It may take as long as a repair of the image's reference counts, where a crash left them behind.
        RefusedError (or another of the image's errors) if the image is not one of ours to serve:
        encrypted, with a backing file, with an external data file. ImageInUseError if another process has it.
        """
        with Image.open(image) as opened:
            size, cluster = opened.header.size, opened.header.cluster_size
        for stale in (self.control, self.monitor, self._pid_file):
            stale.unlink(missing_ok=True)
        if self._log.exists():
            self._log.replace(self.folder / "log.old")  # what the one before died of
        self._write_script(image.resolve(), size, cluster, kind)
        self._launch()
        self._wait_until_it_serves(image)

    def check_serves(self, image: Path) -> None:
        """RefusedError if it is another image that the running daemon holds."""
        with Qmp(self.control) as qmp:
            qmp.find_node(image)

    def size(self) -> int:
        """Return the volume's size as the daemon has it, in bytes."""
        with Qmp(self.control) as qmp:
            return _size(qmp)

    def backing(self) -> Path:
        """What the block device in front stands on: `disk`, or the name of the NBD export (`nbd.py`)."""
        try:
            return self.socket / self._token.read_text()
        except FileNotFoundError:
            return self.disk

    def export(self) -> None:
        """Export the volume for the kind that it was started for; nothing happens if that is done."""
        with Qmp(self.control) as qmp:
            if _exports(qmp):
                return
            if _top(qmp) == VOLUME_NODE:
                self._begin_nbd(qmp)
                return
            self._token.unlink(missing_ok=True)
            self.disk.touch(0o600)
            self._add(qmp, self._fuse_export())
        if not is_mounted(self.disk):
            raise IslandError(
                f"{str(self.disk)!r} was exported, but nothing is mounted there that this process sees; "
                f"let both have one mount namespace"
            )

    def unexport(self) -> None:
        """End the export; on return nothing is mounted at `disk`. Whoever has it open gets errors."""
        with Qmp(self.control) as qmp:
            self._remove(qmp)
            self.forget()

    def forget(self) -> None:
        """Forget the export, which is gone, and its device with it."""
        for left in (self._token, self.socket, self.growing):
            left.unlink(missing_ok=True)

    def freeze(self, name: str) -> None:
        """Take an internal snapshot; on return it is in the image."""
        with Qmp(self.control) as qmp:
            qmp.snapshot_create(_top(qmp), name)

    def thaw(self, name: str) -> None:
        """Drop the internal snapshots of this name, if there are any."""
        with Qmp(self.control) as qmp:
            for one in _internals(qmp):
                if one["name"] == name:
                    qmp.snapshot_delete(_top(qmp), str(one["id"]), name)

    def internals(self) -> list[str]:
        """The names of the internal snapshots in the image."""
        with Qmp(self.control) as qmp:
            return [str(one["name"]) for one in _internals(qmp)]

    def grow(self, size: int) -> None:
        """Make the volume `size` bytes big, and the caches fit it. RefusedError if it is bigger now."""
        with Qmp(self.control) as qmp:
            now = _size(qmp)
            if size < now:
                raise RefusedError(
                    f"volume {self.volume} has {now} bytes and would be cut to {size}; it can only grow"
                )
            if size == now:
                return
            over_nbd = self._token.exists() and bool(_exports(qmp))
            if over_nbd:
                self._remove(qmp)
            try:
                _resize(qmp, size)
            finally:
                if over_nbd:
                    self._add(qmp, _NBD_EXPORT)

    def quit(self) -> None:
        """End the daemon: it flushes and closes the image, and on return is gone. Idempotent."""
        pid = listener(self.control)
        if pid is None:
            return
        with Qmp(self.control) as qmp:
            pid = qmp.peer_pid()
            qmp.command("quit")
        deadline = time.monotonic() + TIMEOUT
        while is_alive(pid):
            if time.monotonic() > deadline:
                raise IslandError(f"the daemon of volume {self.volume} (process {pid}) does not end")
            time.sleep(_STEP)

    @property
    def growing(self) -> Path:
        """A file that is there while the NBD export is away to grow, for whoever finds that unfinished."""
        return self.folder / "growing"

    def restore_export(self) -> None:
        """Export the volume over NBD again, under the name it had, if it is not exported."""
        with Qmp(self.control) as qmp:
            if not _exports(qmp):
                self._add(qmp, _NBD_EXPORT)

    def _begin_nbd(self, qmp: Qmp) -> None:
        with contextlib.suppress(IslandError):  # it does not run, but after a start that was cut off
            qmp.command("nbd-server-stop")
        self.socket.unlink(missing_ok=True)
        self._token.write_text(secrets.token_hex(8))
        address = {"type": "unix", "data": {"path": str(self.socket)}}
        qmp.command("nbd-server-start", {"addr": address})
        self._add(qmp, _NBD_EXPORT)

    def _fuse_export(self) -> dict[str, object]:
        return {
            "type": "fuse",
            "id": _EXPORT,
            "node-name": FRONT_NODE,
            "mountpoint": str(self.disk),
            "writable": True,
            "growable": False,
            "allow-other": "on",  # root, who sets the loop device up, is another
        }

    def _add(self, qmp: Qmp, export: dict[str, object]) -> None:
        try:
            qmp.command("block-export-add", export)
        except IslandError as error:
            raise IslandError(f"{error}; the daemon says: {self._said()}") from error

    def _remove(self, qmp: Qmp) -> None:
        """End the export, with every request that it has taken done."""
        if _exports(qmp):
            qmp.command("block-export-del", {"id": _EXPORT, "mode": "hard"})
        deadline = time.monotonic() + TIMEOUT
        while _exports(qmp) or is_mounted(self.disk):
            if time.monotonic() > deadline:
                raise IslandError(f"the export of volume {self.volume} does not end; {self._said()}")
            time.sleep(_STEP)

    @property
    def _token(self) -> Path:
        return self.folder / "token"

    @property
    def _pid_file(self) -> Path:
        return self.folder / "pid"

    @property
    def _log(self) -> Path:
        return self.folder / "log"

    @property
    def _script(self) -> Path:
        return self.folder / "start"

    def _write_script(self, image: Path, size: int, cluster: int, kind: str) -> None:
        """The whole start as one file, so that the command which root runs for us is always the same."""
        direct = supports_direct_io(image)
        nodes = [file_node(image, direct), qcow2_node(size, cluster, direct)]
        if kind != "nbd":
            nodes.append(front_node())
        command = ["qemu-storage-daemon"]
        for node in nodes:
            command += ["--blockdev", json.dumps(node)]
        for name, path in (("control", self.control), ("monitor", self.monitor)):
            quoted = str(path).replace(",", ",,")
            command += ["--chardev", f"socket,id={name},path={quoted},server=on,wait=off"]
            command += ["--monitor", f"chardev={name}"]
        lines = [
            f"exec </dev/null >{shlex.quote(str(self._log))} 2>&1",
            "umask 077",
            "cd /",
            f"echo $$ >{shlex.quote(str(self._pid_file))}",
            f"exec {shlex.join(command)}",
        ]
        self._script.write_text("\n".join([*lines, ""]))

    def _launch(self) -> None:
        task = f"start the daemon of volume {self.volume}"
        run = ["/bin/sh", str(self._script)]
        if not SYSTEMD.is_dir():
            check_run(self._execute, ["setsid", "--fork", *run], task)
            return
        user, group = _user()
        unit = ["--quiet", "--collect", f"--unit=island-{self.volume}", f"--uid={user}", f"--gid={group}"]
        check_run(self._execute, ["systemd-run", *unit, "--", *run], task, root=True)

    def _wait_until_it_serves(self, image: Path) -> None:
        """It listens only when it has the image open, and that has no bound but the process's life."""
        begun = time.monotonic()
        while not self.runs():
            pid, waited = self._written_pid(), time.monotonic() - begun
            if (pid is None and waited > _START_PATIENCE) or (pid is not None and not is_alive(pid)):
                said = self._said()
                raise (ImageInUseError if 'Failed to get "' in said else IslandError)(
                    f"the daemon of volume {self.volume} did not start on {str(image)!r}: {said}"
                )
            if waited > TIMEOUT:
                raise IslandError(
                    f"the daemon of volume {self.volume} (process {pid}) did not open image {str(image)!r} "
                    f"within {TIMEOUT:.0f} s; see its log {str(self._log)!r}"
                )
            time.sleep(_STEP)
        self._meet(image)

    def _meet(self, image: Path) -> None:
        """Hear from the daemon that it serves the image.

        On a slow machine qemu hangs up on whoever connects while it starts, right after one that only
        looked: so it is asked again while it lives.
        """
        deadline = time.monotonic() + _START_PATIENCE
        while True:
            try:
                self.check_serves(image)
                return
            except RefusedError:
                raise
            except IslandError:
                pid = self._written_pid()
                if pid is None or not is_alive(pid) or time.monotonic() > deadline:
                    raise
            time.sleep(_STEP)

    def _written_pid(self) -> int | None:
        try:
            return int(self._pid_file.read_text())
        except (FileNotFoundError, ValueError):  # not written yet, or half
            return None

    def _said(self) -> str:
        """The end of the daemon's log."""
        try:
            return error_text(self._log.read_bytes()[-_LOG_TAIL:].decode(errors="backslashreplace"))
        except OSError:
            return "it has no log"


def _resize(qmp: Qmp, size: int) -> None:
    """Make the volume `size` bytes big, and the caches fit it."""
    qmp.command("block_resize", {"node-name": _top(qmp), "size": size})
    nodes = qmp.command("query-named-block-nodes", {"flat": True})
    cluster = next(
        node["image"]["cluster-size"]
        for node in (nodes if isinstance(nodes, list) else ())
        if node["node-name"] == VOLUME_NODE
    )
    direct = _holds_direct(nodes)
    qmp.command("blockdev-reopen", {"options": [qcow2_node(size, cluster, direct)]})


def _user() -> tuple[str, str]:
    """The names of this process's user and group."""
    return pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name


def _holds_direct(nodes: object) -> bool:
    return any(
        node["node-name"] == VOLUME_NODE and node["cache"]["direct"]
        for node in (nodes if isinstance(nodes, list) else ())
    )


def _size(qmp: Qmp) -> int:
    nodes = qmp.command("query-named-block-nodes", {"flat": True})
    for node in nodes if isinstance(nodes, list) else ():
        if node["node-name"] == VOLUME_NODE:
            return int(node["image"]["virtual-size"])
    raise IslandError(f"the process behind {qmp.socket_path!r} serves no volume; it is no daemon of ours")


def _top(qmp: Qmp) -> str:
    """The node that is exported and frozen: the filter, where the daemon has it."""
    nodes = qmp.command("query-named-block-nodes", {"flat": True})
    names = {node["node-name"] for node in (nodes if isinstance(nodes, list) else ())}
    return FRONT_NODE if FRONT_NODE in names else VOLUME_NODE


def _internals(qmp: Qmp) -> list[dict[str, object]]:
    nodes = qmp.command("query-named-block-nodes", {"flat": True})
    for node in nodes if isinstance(nodes, list) else ():
        if node["node-name"] == VOLUME_NODE:
            return list(node["image"].get("snapshots", []))
    return []


def _exports(qmp: Qmp) -> list[object]:
    answer = qmp.command("query-block-exports")
    return answer if isinstance(answer, list) else []
