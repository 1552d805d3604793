"""A running guest of libvirt's: its disks, its qemu's monitor, and the agent inside it.

The monitor is libvirt's passthrough (libvirt-qemu's qemuMonitorCommand), for a QMP socket serves one client,
and that is libvirt. Images are found in the domain's live XML (libvirt's formatdomain document). What the
agent answers comes from inside the guest: it is bounded in time and believed in nothing but its own freeze.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element, ParseError, fromstring

from island_fast.errors import IslandError, NotFoundError, RefusedError, UsageError
from island_fast.qemu.monitor import Monitor, plain

__all__ = ["Disk", "Domain"]

_HERE = (None, "", "localhost", "127.0.0.1", "::1")
_NONSENSE = (ValueError, RecursionError, ParseError)
"""What answers that are no JSON or XML raise, or that are nested without end."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A guest's disk: what libvirt calls it, such as vda, its image, and the image's backing files.

    Those are nearest first, as "qcow2:FILE" or "raw:FILE".
    """

    name: str
    image: Path
    backing: tuple[str, ...] = ()


class Domain(Monitor):
    """A running domain, and the connection to the libvirtd that runs it. A context manager.

    `connect` is libvirt's URI of a qemu on this host (default: libvirt's own choice). IslandError if
    libvirt-python is missing or libvirtd cannot be reached, UsageError for a URI of another kind or host,
    NotFoundError if there is no such domain, RefusedError if it is not running.
    """

    def __init__(self, name: str, connect: str | None = None) -> None:
        self.name = name
        self.who = f"domain {name!r}"
        self.otherwise = "see whether its disk was changed or moved just now"
        self._connect = connect
        self._connection: Any = None
        self._domain: Any = None
        self._libvirt, self._libvirt_qemu = _modules()
        with ExitStack() as stack:
            self._connection = self._connected(connect)
            stack.callback(self.close)
            with self._asked("tell where and what it is"):
                self.uri: str = self._connection.getURI()
                host, kind = urlsplit(self.uri).hostname, self._connection.getType()
            self._check_kind(host, kind)
            self._domain = self._found(name)
            stack.pop_all()

    @property
    def thaw_by_hand(self) -> str:
        """The command that thaws the guest."""
        return f"virsh -c {shlex.quote(self.uri)} domfsthaw {shlex.quote(self.name)}"

    def renew(self) -> None:
        """Connect again, and look the domain up again: libvirtd may have been restarted.

        IslandError if libvirtd cannot be reached, NotFoundError if the domain is gone, RefusedError if it is
        off; all stays as it was then.
        """
        old = self._connection
        new: Any = self._connected(self._connect)
        self._connection = new
        try:
            self._domain = self._found(self.name)
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

    def disks(self, names: Sequence[str] = ()) -> list[Disk]:
        """The disks of these names, or all that the guest may write to; in the order of the XML.

        NotFoundError for a name that no disk has, or if there is none at all. RefusedError if one is
        something else than a qcow2 file, which alone can be snapshotted while in use.
        """
        with self._asked("tell its disks"):
            root = fromstring(self._domain.XMLDesc(0))
        found = {_target(disk): disk for disk in root.iterfind("devices/disk") if _is_disk(disk)}
        if unknown := [name for name in names if name not in found]:
            raise NotFoundError(f"{self.who} has no disk {unknown[0]!r}; it has {', '.join(found) or 'none'}")
        writable = [name for name, disk in found.items() if disk.find("readonly") is None]
        chosen = [name for name in found if name in (names or writable)]
        if not chosen:
            raise NotFoundError(f"{self.who} has no disk that it may write to")
        for name in chosen:
            if why := _unfit(found[name]):
                others = [other for other in writable if not _unfit(found[other])]
                way_out = f"name others with --disk: {', '.join(others)}" if others else "it has no other"
                raise RefusedError(
                    f"disk {name} of {self.who} {why}, and only qcow2 files are snapshotted in use; {way_out}"
                )
        return [_disk(name, found[name]) for name in chosen]

    def command(self, name: str, arguments: Mapping[str, object] | None = None) -> object:
        """See Monitor.command."""
        message = json.dumps({"execute": name, "arguments": arguments or {}})
        with self._asked(f"pass on {name}"):
            answer = json.loads(self._libvirt_qemu.qemuMonitorCommand(self._domain, message, 0))
        if not isinstance(answer, dict) or "return" not in answer:
            raise self.refused(name, answer.get("error") if isinstance(answer, dict) else answer)
        return answer["return"]

    def locate(self, name: str) -> str:
        """See Monitor.locate: libvirt gives qemu whole paths."""
        return name

    def agent(self, command: str, timeout: int) -> object:
        """Give the agent in the guest a command and return its answer; IslandError after `timeout` seconds.

        It is one, too, if the guest has no agent, in half a sentence about the guest. What the agent was told
        to do may be done even then; not so if the agent answers with an error, which is a RefusedError.
        """
        message = json.dumps({"execute": command})
        try:
            answer = json.loads(self._libvirt_qemu.qemuAgentCommand(self._domain, message, timeout, 0))
        except (self._libvirt.libvirtError, *_NONSENSE) as error:
            if self._is_refusal(error, command):
                raise RefusedError(f"its agent refused {command} ({_words(error)})") from error
            raise IslandError(f"its agent did not answer {command} ({_words(error)})") from error
        return answer.get("return") if isinstance(answer, dict) else None

    def _is_refusal(self, error: Exception, command: str) -> bool:
        """Whether libvirt passes on an error that the agent answered `command` with.

        libvirt has no code for that: "internal error: unable to execute QEMU agent command 'COMMAND': ...",
        perhaps translated. What it says of an agent that is silent or gone has other codes.
        """
        return (
            isinstance(error, self._libvirt.libvirtError)
            and error.get_error_code() == self._libvirt.VIR_ERR_INTERNAL_ERROR
            and f"'{command}'" in str(error)
        )

    def _connected(self, connect: str | None) -> object:
        try:
            return self._libvirt.open(connect)
        except self._libvirt.libvirtError as error:
            where = f"at {connect}" if connect else "at its usual place"
            raise IslandError(
                f"libvirt cannot be reached {where} ({_words(error)}); "
                "see whether libvirtd runs, or name it with --connect"
            ) from error

    def _check_kind(self, host: str | None, kind: str) -> None:
        """UsageError for images on another host, or guests that are no qemu's."""
        if host not in _HERE:
            raise UsageError(f"{self.uri} is on another host; run island there, where the images are")
        if kind != "QEMU":
            raise UsageError(f"{self.uri} has no guests of qemu's; name another with --connect")

    def _found(self, name: str) -> object:
        try:
            domain = self._connection.lookupByName(name)
        except self._libvirt.libvirtError as error:
            if error.get_error_code() != self._libvirt.VIR_ERR_NO_DOMAIN:
                raise IslandError(f"libvirt cannot look up {self.who}: {_words(error)}") from error
            raise NotFoundError(
                f"there is no {self.who} at {self.uri}; see 'virsh -c {self.uri} list', or name another "
                "libvirt with --connect"
            ) from error
        with self._asked("tell its state"):
            running = domain.isActive()
        if not running:
            raise RefusedError(f"{self.who} is not running; use 'island snapshot IMAGE' for its images")
        return domain

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        """Make one sentence of what libvirt says if it does not do `what`."""
        try:
            yield
        except self._libvirt.libvirtError as error:
            raise IslandError(f"libvirt could not, for {self.who}, {what} ({_words(error)})") from error
        except _NONSENSE as error:
            raise IslandError(
                f"libvirt could not, for {self.who}, {what} (no sense in the answer)"
            ) from error


def _modules() -> tuple[ModuleType, ModuleType]:
    try:
        import libvirt
        import libvirt_qemu
    except ImportError as error:
        raise IslandError("--domain needs libvirt-python; pip install it in the same environment") from error
    libvirt.registerErrorHandler(_silent, None)  # else it writes what it raises to standard error, too
    return libvirt, libvirt_qemu


def _silent(*_: object) -> None:
    """Errors are told by whoever catches them."""


def _words(error: Exception) -> str:
    return plain(str(error))


def _is_disk(disk: Element) -> bool:
    """Neither a CD nor a floppy."""
    return disk.get("device", "disk") in ("disk", "lun") and bool(_target(disk))


def _target(disk: Element) -> str:
    target = disk.find("target")
    return "" if target is None else target.get("dev", "")


def _unfit(disk: Element) -> str:
    """Why a disk is no qcow2 file over nothing but files, to follow its name; "" if it is one."""
    kind, driver = disk.get("type", ""), disk.find("driver")
    if kind != "file" or not _file(disk):
        return f"is no file but of type {kind!r}"
    if driver is None or driver.get("type") != "qcow2":
        return f"has format {'raw' if driver is None else driver.get('type', 'raw')!r}"
    for layer in _backing(disk):
        if layer.get("type") != "file" or _format(layer) not in ("qcow2", "raw"):
            return "has a backing file that is neither a qcow2 nor a raw file"
    return ""


def _file(layer: Element) -> str:
    source = layer.find("source")
    return "" if source is None else source.get("file", "")


def _format(layer: Element) -> str:
    found = layer.find("format")
    return "" if found is None else found.get("type", "")


def _backing(disk: Element) -> Iterator[Element]:
    """The layers below a disk's image, nearest first; an empty element ends them."""
    layer = disk.find("backingStore")
    while layer is not None and layer.find("source") is not None:
        yield layer
        layer = layer.find("backingStore")


def _disk(name: str, disk: Element) -> Disk:
    below = tuple(f"{_format(one)}:{Path(_file(one)).resolve()}" for one in _backing(disk))
    return Disk(name, Path(_file(disk)).resolve(), below)
