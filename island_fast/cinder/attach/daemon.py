"""The qemu-storage-daemon that owns one volume's image, and what it exports.

The daemon outlives the process that starts it: under systemd it is a transient unit of its own, elsewhere it
has a session of its own. Everything about it is in one private folder, where it is found again.

FUSE shows the volume as a file, for a loop device to stand on. In front of the qcow2 node is a filter that
refuses discards with ENOSYS, after which the kernel sends no more. The reason: a loop device turns "write
zeros" into "punch a hole", QEMU before 8.0 turns that into a discard, and a discard leaves old data in
clusters that the hole covers only in part (QEMU's issue 1507). Without holes the kernel writes zeros, and the
qcow2 node turns them into zero clusters (detect-zeroes), which frees the space.

NBD distinguishes discards from zeros, so a daemon that is started for NBD has no filter. That decides which
node is exported. It must be the topmost one: a snapshot stops only the writes of the node that it is taken
of, and writes that enter below that node damage the image. QEMU cannot grow a node that its NBD server
exports, so the export is removed for a moment, and its client must wait.

VDUSE distinguishes them too, and its export grows with the volume. A daemon for VDUSE is watched by the shell
that started it, because the kernel waits for ever for one that died (`stand_in.py`).
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from island_fast.cinder.attach.mounts import is_mounted
from island_fast.cinder.attach.nbd_root import EXPORT
from island_fast.cinder.attach.process_lookup import find_listener, is_alive
from island_fast.cinder.attach.stand_in import (
    PREPARED,
    TOKEN,
    export_options,
    stand_in_script,
    stand_in_socket,
    watch_script,
)
from island_fast.cinder.attach.vduse_control import device_name, is_on_bus
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

SYSTEMD = Path("/run/systemd/system")  # exists if systemd is the first process, see sd_booted(3)

_EXPORT = "device"
_NBD_EXPORT: dict[str, object] = {
    "type": "nbd",
    "id": _EXPORT,
    "node-name": VOLUME_NODE,
    "name": EXPORT,
    "writable": True,
}
_TOKEN_BYTES = 8
_MAX_SOCKET_PATH = 107  # bytes, unix(7)
_START_TIMEOUT = 60.0  # seconds until the program runs; repairing the image, if need be, comes after
_STEP = 0.05  # seconds between two looks
_LAUNCH_AGAIN = 5.0  # seconds after a stand-in was started
_LOOK_AGAIN = 0.2  # seconds between two looks at a stand-in, for a starting qemu bears few clients
_LOG_TAIL = 4096  # bytes


class Daemon:
    """One volume's daemon, running or not.

    `folder` has the volume's name; the caller owns it, keeps it private, and lets one caller at a time use
    it. In it, `control` is the QMP socket of this class, `monitor` the one for snapshots (each serves one
    client at a time), `disk` the file under which FUSE exports the volume, `socket` the socket of the NBD
    server, and `vduse` the folder of its VDUSE exports: the present one, and those that daemons left which
    died.
    """

    def __init__(self, folder: Path, execute: RunProgram) -> None:
        self.folder = folder
        self.volume = folder.name
        self.control = folder / "control"
        self.monitor = folder / "monitor"
        self.disk = folder / "disk"
        self.socket = folder / "nbd"
        self.vduse = folder / "vduse"
        self._execute = execute
        _require_short(self.monitor)

    def is_running(self) -> bool:
        """Return whether a process listens on the control socket, without waiting for its answer."""
        return find_listener(self.control) is not None

    def start(self, image: Path, kind: str) -> None:
        """Start the daemon on a qcow2 image, for devices of this kind; on return it serves the image.

        After a crash this can take as long as a repair of the image's reference counts. Raises RefusedError,
        or another error of an image, if the image must not be served (it is encrypted, or has a backing file
        or an external data file), and ImageInUseError if another process has it open.
        """
        if kind == "vduse":
            _require_short(stand_in_socket(self.vduse / ("0" * 2 * _TOKEN_BYTES)))
        with Image.open(image) as opened:
            size, cluster = opened.header.size, opened.header.cluster_size
        for stale in (self.control, self.monitor, self._pid_file):
            stale.unlink(missing_ok=True)
        if self._log_file.exists():
            self._log_file.replace(self.folder / "log.old")  # it may say why the last daemon died
        program = self._program_script(image.resolve(), size, cluster, kind)
        self._program_file.unlink(missing_ok=True)
        (self.folder / PREPARED).unlink(missing_ok=True)
        if kind == "vduse":
            self.vduse.mkdir(exist_ok=True)
            _replace(self._program_file, program)
            program = watch_script(self.folder, self._program_file, self._log_file)
        self._launch(program)
        self._wait_until_listening(image)
        self._wait_until_confirmed(image)

    def check_serves(self, image: Path) -> None:
        """Raise RefusedError if the running daemon serves another image."""
        with Qmp(self.control) as qmp:
            qmp.find_node(image)

    def size(self) -> int:
        """Return the volume's present size in bytes."""
        with Qmp(self.control) as qmp:
            return _query_size(qmp)

    def backing(self) -> Path:
        """Return what a device stands on: `disk`, or for NBD and VDUSE exports FOLDER/KIND/TOKEN."""
        with contextlib.suppress(FileNotFoundError):
            return self.vduse / (self.vduse / TOKEN).read_text().split()[0]
        with contextlib.suppress(FileNotFoundError):
            return self.socket / self._token_file.read_text()
        return self.disk

    def export(self) -> None:
        """Export the volume for the kind that the daemon was started for; do nothing if it is exported."""
        with Qmp(self.control) as qmp:
            if _query_exports(qmp):
                return
            if self._is_for_vduse():
                self._export_vduse(qmp)
                return
            if _top_node(qmp) == VOLUME_NODE:
                self._start_nbd_server(qmp)
                return
            self._token_file.unlink(missing_ok=True)
            self.disk.touch(0o600)
            fuse_export: dict[str, object] = {
                "type": "fuse",
                "id": _EXPORT,
                "node-name": FRONT_NODE,
                "mountpoint": str(self.disk),
                "writable": True,
                "growable": False,
                "allow-other": "on",  # for root, who makes the loop device
            }
            self._add_export(qmp, fuse_export)
        if not is_mounted(self.disk):
            raise IslandError(
                f"{str(self.disk)!r} was exported, but this process sees no mount there; the daemon and this "
                "process must be in the same mount namespace"
            )

    def unexport(self) -> None:
        """End the export; on return nothing is mounted at `disk`. Whoever has it open gets errors.

        Raises RefusedError if it is a VDUSE export whose disk is still there: its requests would hang.
        """
        if self.backing().parent == self.vduse and is_on_bus(device_name(self.backing())):
            raise RefusedError(f"the disk of volume {self.volume} is still there; remove it first")
        with Qmp(self.control) as qmp:
            self._remove_export(qmp)
            self.forget_export()

    def forget_export(self) -> None:
        """Remove the files about an export that has ended."""
        if self.backing().parent == self.vduse:
            self.forget_vduse(self.backing())
        for left in (self._token_file, self.socket, self.growing_mark):
            left.unlink(missing_ok=True)

    def take_internal_snapshot(self, name: str) -> None:
        """Take an internal snapshot; on return it is in the image."""
        with Qmp(self.control) as qmp:
            qmp.snapshot_create(_top_node(qmp), name)

    def drop_internal_snapshot(self, name: str) -> None:
        """Drop the internal snapshots of this name, if there are any."""
        with Qmp(self.control) as qmp:
            for one in _query_internal_snapshots(qmp):
                if one["name"] == name:
                    qmp.snapshot_delete(_top_node(qmp), str(one["id"]), name)

    def internal_snapshots(self) -> list[str]:
        """Return the names of the internal snapshots in the image."""
        with Qmp(self.control) as qmp:
            return [str(one["name"]) for one in _query_internal_snapshots(qmp)]

    def grow(self, size: int) -> None:
        """Enlarge the volume to `size` bytes, and its caches with it; raise RefusedError if it is larger."""
        with Qmp(self.control) as qmp:
            now = _query_size(qmp)
            if size < now:
                raise RefusedError(
                    f"volume {self.volume} has {now} bytes and would be cut to {size}; it can only grow"
                )
            if size == now:
                return
            over_nbd = self._token_file.exists() and bool(_query_exports(qmp))
            if over_nbd:
                self._remove_export(qmp)
            try:
                _resize(qmp, size)
            finally:
                if over_nbd:
                    self._add_export(qmp, _NBD_EXPORT)

    def announce_size(self) -> None:
        """Let the kernel know the size of a VDUSE export, which is made without one."""
        with Qmp(self.control) as qmp:
            qmp.command("block_resize", {"node-name": _top_node(qmp), "size": _query_size(qmp)})

    def quit(self) -> None:
        """End the daemon, which flushes and closes the image; on return it is gone. Can be repeated."""
        self._quit(self.control)

    def restart(self, image: Path) -> None:
        """Replace a daemon for VDUSE by a new process, of the program that is installed now.

        Its device stays. Requests wait meanwhile, and none fails. If the new daemon does not start, they do
        fail: raises IslandError, and the volume must be attached again.
        """
        backing = self.backing()
        if not self._is_for_vduse() or backing.parent != self.vduse:
            raise RefusedError(f"volume {self.volume} has no VDUSE device; its daemon cannot be replaced")
        if not self._is_watched():
            raise RefusedError(
                f"the shell that watched the daemon of volume {self.volume} is gone, and could not start it "
                "again; detach the volume and attach it again"
            )
        with Image.open(image) as opened:
            size, cluster = opened.header.size, opened.header.cluster_size
        export = ["--export", json.dumps(export_options(backing, VOLUME_NODE))]
        _replace(
            self.folder / PREPARED, self._program_script(image.resolve(), size, cluster, "vduse", export)
        )
        self._pid_file.unlink(missing_ok=True)
        self._quit(self.control)
        self._wait_until_listening(image)
        self._wait_until_confirmed(image)

    def runs_older_program(self) -> bool:
        """Return whether the daemon's program was replaced since it started, as an upgrade of QEMU does."""
        pid = find_listener(self.control)
        try:
            return bool(pid) and os.readlink(f"/proc/{pid}/exe").endswith(" (deleted)")
        except OSError:
            return False

    def abandon_vduse(self) -> None:
        """Make the VDUSE export of a dead daemon one of those that were left: it is the volume's no more."""
        (self.vduse / TOKEN).unlink(missing_ok=True)

    def left_backings(self) -> list[Path]:
        """Return the backings of VDUSE exports that daemons left which died."""
        present = self.backing()
        entries = sorted(self.vduse.iterdir()) if self.vduse.is_dir() else []
        return [one for one in entries if len(one.name) == 2 * _TOKEN_BYTES and one != present]

    def start_stand_in(self, backing: Path) -> None:
        """Have another process answer the requests for a dead daemon's backing with errors, if none does.

        On return it does. One that dies while it starts is started again; of two, the second ends at once.
        """
        deadline, launched = time.monotonic() + _START_TIMEOUT, -_LAUNCH_AGAIN
        while not self._has_stand_in(backing):
            now = time.monotonic()
            if now - launched > _LAUNCH_AGAIN and find_listener(stand_in_socket(backing)) is None:
                self._launch(f". {shlex.quote(str(backing))}\n")
                launched = now
            if now > deadline:
                raise IslandError(
                    f"nothing answers for the daemon of volume {self.volume}, which died, so its device "
                    f"hangs; see the log {str(self._log_file)!r}"
                )
            time.sleep(_LOOK_AGAIN)

    def lacks_stand_in(self, backing: Path) -> bool:
        """Return whether nobody answers the requests for a dead daemon's backing. Never waits."""
        return is_on_bus(device_name(backing)) and find_listener(stand_in_socket(backing)) is None

    def end_stand_in(self, backing: Path) -> None:
        """End the stand-in for a backing, if there is one; its device goes with it, unless it has a disk."""
        self._quit(stand_in_socket(backing))

    def forget_vduse(self, backing: Path) -> None:
        """Remove the files about a VDUSE export whose device is gone."""
        if self.backing() == backing:
            (self.vduse / TOKEN).unlink()
        requests = self.vduse / f"vduse-blk-{device_name(backing)}"  # made by QEMU
        for left in (requests, stand_in_socket(backing), backing.with_name(f"{backing.name}.n"), backing):
            left.unlink(missing_ok=True)

    def _has_stand_in(self, backing: Path) -> bool:
        """Return whether a stand-in serves this backing."""
        if find_listener(stand_in_socket(backing)) is None:
            return False
        try:
            with Qmp(stand_in_socket(backing)) as qmp:
                return bool(_query_exports(qmp))
        except IslandError:  # it is starting
            return False

    def _quit(self, control: Path) -> None:
        """End the qemu-storage-daemon that listens on a QMP socket, if one does."""
        if find_listener(control) is None:
            return
        with Qmp(control) as qmp:
            pid = qmp.peer_pid()
            qmp.command("quit")
        deadline = time.monotonic() + TIMEOUT
        while is_alive(pid):
            if time.monotonic() > deadline:
                raise IslandError(
                    f"the daemon of volume {self.volume} (process {pid}) did not end within {TIMEOUT:.0f} s"
                )
            time.sleep(_STEP)

    @property
    def growing_mark(self) -> Path:
        """A file that exists while the NBD export is removed for growth, to be found after a crash."""
        return self.folder / "growing"

    @property
    def stopped_mark(self) -> Path:
        """A file that exists while nothing is here but the disks of dead daemons, which somebody has open."""
        return self.folder / "stopped"

    def restore_export(self) -> None:
        """Export the volume over NBD again, under the same name, if it is not exported."""
        with Qmp(self.control) as qmp:
            if not _query_exports(qmp):
                self._add_export(qmp, _NBD_EXPORT)

    def _is_for_vduse(self) -> bool:
        """Return whether the daemon was started for VDUSE."""
        return self._program_file.exists()

    def _is_watched(self) -> bool:
        """Return whether the shell that started the daemon is there."""
        with contextlib.suppress(OSError, TypeError):
            status = Path(f"/proc/{find_listener(self.control)}/stat").read_text()
            parent = status.rpartition(")")[2].split()[1]
            words = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
            return os.fsencode(self._script_file) in words
        return False

    def _export_vduse(self, qmp: Qmp) -> None:
        """Export the volume under a new token, and note which process serves it."""
        self.vduse.mkdir(exist_ok=True)
        backing = self.vduse / secrets.token_hex(_TOKEN_BYTES)
        _replace(backing, stand_in_script(backing, self._log_file))
        check_run(
            self._execute,
            ["island-vduse", "create", str(backing)],
            f"make the VDUSE device of volume {self.volume}",
            root=True,
        )
        _replace(self.vduse / TOKEN, f"{backing.name} {qmp.peer_pid()}\n")
        self._add_export(qmp, export_options(backing, VOLUME_NODE))

    def _start_nbd_server(self, qmp: Qmp) -> None:
        """Start the daemon's NBD server with a new token, and export the volume."""
        with contextlib.suppress(IslandError):  # a server runs only if an earlier start was interrupted
            qmp.command("nbd-server-stop")
        self.socket.unlink(missing_ok=True)
        self._token_file.write_text(secrets.token_hex(8))
        address = {"type": "unix", "data": {"path": str(self.socket)}}
        qmp.command("nbd-server-start", {"addr": address})
        self._add_export(qmp, _NBD_EXPORT)

    def _add_export(self, qmp: Qmp, export: dict[str, object]) -> None:
        try:
            qmp.command("block-export-add", export)
        except IslandError as error:
            raise IslandError(f"{error}; the daemon's log ends: {self._read_log_end()}") from error

    def _remove_export(self, qmp: Qmp) -> None:
        """End the export, after every request that it has accepted."""
        if _query_exports(qmp):
            qmp.command("block-export-del", {"id": _EXPORT, "mode": "hard"})
        deadline = time.monotonic() + TIMEOUT
        while _query_exports(qmp) or is_mounted(self.disk):
            if time.monotonic() > deadline:
                raise IslandError(
                    f"the export of volume {self.volume} did not end within {TIMEOUT:.0f} s; "
                    f"the daemon's log ends: {self._read_log_end()}"
                )
            time.sleep(_STEP)

    @property
    def _token_file(self) -> Path:
        return self.folder / "token"

    @property
    def _pid_file(self) -> Path:
        return self.folder / "pid"

    @property
    def _log_file(self) -> Path:
        return self.folder / "log"

    @property
    def _script_file(self) -> Path:
        return self.folder / "start"

    @property
    def _program_file(self) -> Path:
        """The script that becomes the daemon, where a shell watches it."""
        return self.folder / "daemon"

    def _program_script(
        self, image: Path, size: int, cluster: int, kind: str, more: Sequence[str] = ()
    ) -> str:
        """Return a shell script that becomes the daemon."""
        direct = supports_direct_io(image)
        nodes = [file_node(image, direct), qcow2_node(size, cluster, direct)]
        if kind == "loop":
            nodes.append(front_node())
        command = ["qemu-storage-daemon"]
        for node in nodes:
            command += ["--blockdev", json.dumps(node)]
        for name, path in (("control", self.control), ("monitor", self.monitor)):
            quoted = str(path).replace(",", ",,")
            command += ["--chardev", f"socket,id={name},path={quoted},server=on,wait=off"]
            command += ["--monitor", f"chardev={name}"]
        command += more
        lines = [f"echo $$ >{shlex.quote(str(self._pid_file))}", f"exec {shlex.join(command)}", ""]
        if kind == "vduse":  # where QEMU notes the requests in flight, for whoever serves the device next
            return "\n".join([f"export TMPDIR={shlex.quote(str(self.vduse))}", *lines])
        head = f"exec </dev/null >{shlex.quote(str(self._log_file))} 2>&1"
        return "\n".join([head, "umask 077", "cd /", *lines])

    def _launch(self, script: str) -> None:
        """Run a script in a systemd unit of its own, or without systemd in a session of its own.

        It is always the same file, so that the command that root runs is always the same. A shell that still
        reads the last one keeps it.
        """
        _replace(self._script_file, script)
        task = f"start the daemon of volume {self.volume}"
        run = ["/bin/sh", str(self._script_file)]
        if not SYSTEMD.is_dir():
            check_run(self._execute, ["setsid", "--fork", *run], task)
            return
        user, group = _user_and_group()
        name = f"--unit=island-{self.volume}"
        if self.vduse.is_dir():  # the shell of a daemon that died can still be the stand-in for it
            name += f"-{secrets.token_hex(4)}"
        unit = ["--quiet", "--collect", name, f"--uid={user}", f"--gid={group}"]
        check_run(self._execute, ["systemd-run", *unit, "--", *run], task, root=True)

    def _wait_until_listening(self, image: Path) -> None:
        """Wait until the daemon listens on its control socket.

        It does so only once it has opened the image. That can take as long as a repair, so this waits for up
        to TIMEOUT seconds, while the process lives.
        """
        begun = time.monotonic()
        while not self.is_running():
            pid, waited = self._read_pid(), time.monotonic() - begun
            if (pid is None and waited > _START_TIMEOUT) or (pid is not None and not is_alive(pid)):
                log_end = self._read_log_end()
                raise (ImageInUseError if 'Failed to get "' in log_end else IslandError)(
                    f"the daemon of volume {self.volume} did not start on {str(image)!r}: {log_end}"
                )
            if waited > TIMEOUT:
                raise IslandError(
                    f"the daemon of volume {self.volume} (process {pid}) did not open image {str(image)!r} "
                    f"within {TIMEOUT:.0f} s; see its log {str(self._log_file)!r}"
                )
            time.sleep(_STEP)

    def _wait_until_confirmed(self, image: Path) -> None:
        """Wait until the daemon confirms that it serves the image.

        On a slow machine a starting qemu ends a connection that comes right after another one, such as that
        of `is_running`. So this retries while the process lives.
        """
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            try:
                self.check_serves(image)
                return
            except RefusedError:
                raise
            except IslandError:
                pid = self._read_pid()
                if pid is None or not is_alive(pid) or time.monotonic() > deadline:
                    raise
            time.sleep(_STEP)

    def _read_pid(self) -> int | None:
        try:
            return int(self._pid_file.read_text())
        except (FileNotFoundError, ValueError):  # not written yet, or only in part
            return None

    def _read_log_end(self) -> str:
        """Return the end of the daemon's log as one line."""
        try:
            return error_text(self._log_file.read_bytes()[-_LOG_TAIL:].decode(errors="backslashreplace"))
        except OSError:
            return "it has no log"


def _require_short(socket: Path) -> None:
    """Raise UsageError if a path is too long for a socket."""
    if len(os.fsencode(socket)) > _MAX_SOCKET_PATH:
        raise UsageError(
            f"the path {str(socket)!r} has over {_MAX_SOCKET_PATH} bytes, too long for a socket; "
            f"choose a shorter folder for the sockets"
        )


def _replace(file: Path, text: str) -> None:
    """Write a file in one step; who reads the one that it replaces goes on with that."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text)
    new.replace(file)


def _resize(qmp: Qmp, size: int) -> None:
    """Enlarge the volume to `size` bytes, and make the caches fit it."""
    qmp.command("block_resize", {"node-name": _top_node(qmp), "size": size})
    volume = _query_nodes(qmp)[VOLUME_NODE]
    cluster, direct = volume["image"]["cluster-size"], bool(volume["cache"]["direct"])
    qmp.command("blockdev-reopen", {"options": [qcow2_node(size, cluster, direct)]})


def _user_and_group() -> tuple[str, str]:
    """Return the names of this process's user and group."""
    return pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name


def _query_nodes(qmp: Qmp) -> dict[str, Any]:
    """Return the daemon's block nodes by name, as QMP describes them."""
    nodes = qmp.command("query-named-block-nodes", {"flat": True})
    return {node["node-name"]: node for node in (nodes if isinstance(nodes, list) else ())}


def _query_size(qmp: Qmp) -> int:
    """Return the volume's size in bytes; raise IslandError if the process is not a daemon of this module."""
    volume = _query_nodes(qmp).get(VOLUME_NODE)
    if volume is None:
        raise IslandError(
            f"the process at {qmp.socket_path!r} serves no volume; it is not a daemon of the Cinder driver"
        )
    return int(volume["image"]["virtual-size"])


def _top_node(qmp: Qmp) -> str:
    """Return the node that is exported and snapshotted: the filter, if the daemon has one."""
    return FRONT_NODE if FRONT_NODE in _query_nodes(qmp) else VOLUME_NODE


def _query_internal_snapshots(qmp: Qmp) -> list[dict[str, object]]:
    volume = _query_nodes(qmp).get(VOLUME_NODE)
    return list(volume["image"].get("snapshots", [])) if volume else []


def _query_exports(qmp: Qmp) -> list[object]:
    answer = qmp.command("query-block-exports")
    return answer if isinstance(answer, list) else []
