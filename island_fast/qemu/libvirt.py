"""A running guest of libvirt: its disks, the monitor of its qemu, and the agent inside it.

The monitor is libvirt's passthrough (libvirt-qemu's qemuMonitorCommand), because a QMP socket serves one
client, which is libvirt. Images are found in the domain's live XML (libvirt's formatdomain document). The
agent's answers come from inside the guest: they have a time limit, and are trusted in nothing but the guest's
own freeze. This is the only module that imports libvirt.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element, ParseError, fromstring

from island_fast.errors import IslandError, NotFoundError, RefusedError, UsageError
from island_fast.qemu.monitor import Monitor, printable

__all__ = ["Disk", "Domain"]

_HERE = (None, "", "localhost", "127.0.0.1", "::1")
_AGENT_COMMAND_FAILED = 113  # VIR_ERR_AGENT_COMMAND_FAILED; the binding can be older than the daemon
_NONSENSE = (ValueError, RecursionError, ParseError)
"""Raised for answers that are not valid JSON or XML, or that are nested without end."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A guest's disk: its name in libvirt, such as vda, its image, and the image's backing files.

    The backing files are "qcow2:FILE" or "raw:FILE", nearest first.
    """

    name: str
    image: Path
    backing: tuple[str, ...] = ()


class Domain(Monitor):
    """A running domain, and the connection to the libvirtd that runs it. A context manager.

    `connect` is libvirt's URI of a qemu on this host (default: libvirt's choice). IslandError if
    libvirt-python is missing or libvirtd cannot be reached, UsageError for a URI of another kind or host,
    NotFoundError if there is no such domain, RefusedError if it is not running.
    """

    def __init__(self, name: str, connect: str | None = None) -> None:
        self.name = name
        self.who = f"domain {name!r}"
        self.way_out = "see whether its disk was changed or moved just now"
        self._connect = connect
        self._connection: Any = None
        self._domain: Any = None
        self._libvirt, self._libvirt_qemu = _import_libvirt()
        with ExitStack() as stack:
            self._connection = self._open_connection(connect)
            stack.callback(self.close)
            with self._translate_errors("report host and kind"):
                self.uri: str = self._connection.getURI()
                host, kind = urlsplit(self.uri).hostname, self._connection.getType()
            if host not in _HERE:
                raise UsageError(f"{self.uri} is on another host; run island there, where the images are")
            if kind != "QEMU":
                raise UsageError(f"{self.uri} has no qemu guests; name another with --connect")
            self._domain = self._look_up(name)
            stack.pop_all()

    @property
    def thaw_command(self) -> str:
        """See Guest.thaw_command."""
        return f"virsh -c {shlex.quote(self.uri)} domfsthaw {shlex.quote(self.name)}"

    def reconnect(self) -> None:
        """Connect again, and look up the domain again: libvirtd can have been restarted.

        IslandError if libvirtd cannot be reached, NotFoundError if the domain is gone, RefusedError if it is
        off; then the old connection stays in use.
        """
        old = self._connection
        new: Any = self._open_connection(self._connect)
        self._connection = new
        try:
            self._domain = self._look_up(self.name)
        except BaseException:
            self._connection, old = old, new
            raise
        finally:
            with suppress(self._libvirt.libvirtError):
                old.close()

    def close(self) -> None:
        """See Monitor.close."""
        with suppress(self._libvirt.libvirtError):
            self._connection.close()

    def find_disks(self, names: Sequence[str] = ()) -> list[Disk]:
        """Return the disks of these names, or all that the guest can write to, in the order of the XML.

        NotFoundError if no disk has one of the names, or if there is no disk to return. RefusedError if one
        is not a qcow2 file: only those can be snapshotted while in use.
        """
        with self._translate_errors("list the disks"):
            root = fromstring(self._domain.XMLDesc(0))
        found = {_target_name(disk): disk for disk in root.iterfind("devices/disk") if _is_disk(disk)}
        if unknown := [name for name in names if name not in found]:
            raise NotFoundError(f"{self.who} has no disk {unknown[0]!r}; it has {', '.join(found) or 'none'}")
        writable = [name for name, disk in found.items() if disk.find("readonly") is None]
        chosen = [name for name in found if name in (names or writable)]
        if not chosen:
            raise NotFoundError(f"{self.who} has no writable disk; name one with --disk")
        for name in chosen:
            if why := _reason_unfit(found[name]):
                others = [other for other in writable if not _reason_unfit(found[other])]
                way_out = (
                    f"name others with --disk: {', '.join(others)}" if others else "it has no other disk"
                )
                raise RefusedError(
                    f"disk {name} of {self.who} {why}, and only qcow2 files can be snapshotted while in use; "
                    f"{way_out}"
                )
        return [_make_disk(name, found[name]) for name in chosen]

    def command(self, name: str, arguments: Mapping[str, object] | None = None) -> object:
        """See Monitor.command."""
        message = json.dumps({"execute": name, "arguments": arguments or {}})
        with self._translate_errors(f"pass on {name}"):
            answer = json.loads(self._libvirt_qemu.qemuMonitorCommand(self._domain, message, 0))
        if not isinstance(answer, dict) or "return" not in answer:
            raise self.refusal_error(name, answer.get("error") if isinstance(answer, dict) else answer)
        return answer["return"]

    def locate(self, name: str) -> Sequence[str]:
        """See Monitor.locate: libvirt gives qemu absolute paths."""
        return [name]

    def processes(self) -> Iterable[int]:
        """See Monitor.processes: libvirt does not say which one it is."""
        return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]

    def ask_agent(self, command: str, timeout: int) -> object:
        """Send the guest's agent a command and return its answer; IslandError after `timeout` seconds.

        Also IslandError if the guest has no agent. Its message is a clause about the guest ("its agent ...").
        The command can take effect even then. If the agent answers with an error, it is a RefusedError and
        the command has no effect.
        """
        message = json.dumps({"execute": command})
        try:
            answer = json.loads(self._libvirt_qemu.qemuAgentCommand(self._domain, message, timeout, 0))
        except (self._libvirt.libvirtError, *_NONSENSE) as error:
            if self._is_refusal(error, command):
                raise RefusedError(f"its agent refused {command} ({_error_text(error)})") from error
            raise IslandError(f"its agent did not answer {command} ({_error_text(error)})") from error
        return answer.get("return") if isinstance(answer, dict) else None

    def _is_refusal(self, error: Exception, command: str) -> bool:
        """Return whether `error` is the agent's own error in answer to `command`, passed on by libvirt.

        Its code is VIR_ERR_AGENT_COMMAND_FAILED. An older libvirt, such as 9.0, has no code for it: "internal
        error: unable to execute QEMU agent command 'COMMAND': ...", perhaps translated. An agent that is
        silent or gone has other codes.
        """
        if not isinstance(error, self._libvirt.libvirtError):
            return False
        failed = getattr(self._libvirt, "VIR_ERR_AGENT_COMMAND_FAILED", _AGENT_COMMAND_FAILED)
        return error.get_error_code() in (failed, self._libvirt.VIR_ERR_INTERNAL_ERROR) and (
            f"'{command}'" in str(error)
        )

    def _open_connection(self, connect: str | None) -> object:
        try:
            return self._libvirt.open(connect)
        except self._libvirt.libvirtError as error:
            where = f"at {connect}" if connect else "at its usual place"
            raise IslandError(
                f"libvirt cannot be reached {where} ({_error_text(error)}); "
                "check whether libvirtd runs, or name it with --connect"
            ) from error

    def _look_up(self, name: str) -> object:
        try:
            domain = self._connection.lookupByName(name)
        except self._libvirt.libvirtError as error:
            if error.get_error_code() != self._libvirt.VIR_ERR_NO_DOMAIN:
                raise IslandError(f"libvirt cannot look up {self.who}: {_error_text(error)}") from error
            raise NotFoundError(
                f"there is no {self.who} at {self.uri}; see 'virsh -c {self.uri} list', or name another "
                "libvirt with --connect"
            ) from error
        with self._translate_errors("report the state"):
            running = domain.isActive()
        if not running:
            raise RefusedError(f"{self.who} is not running; use 'island snapshot IMAGE' for its images")
        return domain

    @contextmanager
    def _translate_errors(self, what: str) -> Iterator[None]:
        """Raise libvirt's errors of the body, in which it shall `what`, as an IslandError of one sentence."""
        try:
            yield
        except self._libvirt.libvirtError as error:
            raise IslandError(f"libvirt could not {what} for {self.who} ({_error_text(error)})") from error
        except _NONSENSE as error:
            raise IslandError(f"libvirt could not {what} for {self.who} (its answer is invalid)") from error


def _import_libvirt() -> tuple[ModuleType, ModuleType]:
    try:
        import libvirt
        import libvirt_qemu
    except ImportError as error:
        raise IslandError("--domain needs libvirt-python; pip install it in the same environment") from error
    # Without a handler it also writes what it raises to standard error.
    libvirt.registerErrorHandler(lambda *_: None, None)
    return libvirt, libvirt_qemu


def _error_text(error: Exception) -> str:
    return printable(str(error))


def _is_disk(disk: Element) -> bool:
    """Return whether the element is a disk, not a CD or a floppy."""
    return disk.get("device", "disk") in ("disk", "lun") and bool(_target_name(disk))


def _target_name(disk: Element) -> str:
    target = disk.find("target")
    return "" if target is None else target.get("dev", "")


def _reason_unfit(disk: Element) -> str:
    """Return why a disk is not a qcow2 file with backing files only, to follow its name; "" if it is one."""
    kind, driver = disk.get("type", ""), disk.find("driver")
    if kind != "file" or not _source_file(disk):
        return f"is not a file but of type {kind!r}"
    if driver is None or driver.get("type") != "qcow2":
        return f"has format {'raw' if driver is None else driver.get('type', 'raw')!r}"
    for layer in _backing_layers(disk):
        if layer.get("type") != "file" or _format_name(layer) not in ("qcow2", "raw"):
            return "has a backing file that is neither a qcow2 nor a raw file"
    return ""


def _source_file(layer: Element) -> str:
    source = layer.find("source")
    return "" if source is None else source.get("file", "")


def _format_name(layer: Element) -> str:
    found = layer.find("format")
    return "" if found is None else found.get("type", "")


def _backing_layers(disk: Element) -> Iterator[Element]:
    """Iterate over the layers below a disk's image, nearest first; an empty element ends them."""
    layer = disk.find("backingStore")
    while layer is not None and layer.find("source") is not None:
        yield layer
        layer = layer.find("backingStore")


def _make_disk(name: str, disk: Element) -> Disk:
    below = tuple(f"{_format_name(one)}:{Path(_source_file(one)).resolve()}" for one in _backing_layers(disk))
    return Disk(name, Path(_source_file(disk)).resolve(), below)
