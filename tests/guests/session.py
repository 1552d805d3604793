"""A real libvirtd for a user's session, started by a test, with guests of software emulation that only write.

libvirtd that is started by root manages the whole machine, and so root's tests start it as nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.live.actor import USER
from tests.support.daemon import create_qcow2, qemu_io

LIBVIRTD = shutil.which("libvirtd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
EMULATOR = shutil.which("qemu-system-x86_64")
SIZE = 16 << 20

# no groups, namespaces and labels, which need a whole machine and its root
SETTINGS = 'security_driver = "none"\nnamespaces = []\ncgroup_controllers = []\nstdio_handler = "file"\n'


PLACES = {"RUNTIME_DIR": "run", "CONFIG_HOME": "config", "CACHE_HOME": "cache", "DATA_HOME": "data"}
DOMAIN = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>256</memory>
<features><acpi/></features><os><type arch='x86_64' machine='q35'>hvm</type>{more}
<emulator>{emulator}</emulator>{devices}
<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"""
NO_MORE = "</os><devices>"


def missing() -> str:
    """What this machine lacks for these tests, in words; "" where it lacks nothing."""
    try:
        import libvirt  # noqa: F401
    except ImportError:
        return "libvirt-python is not installed"
    if LIBVIRTD is None or not list(Path("/usr/lib").glob("*/libvirt/connection-driver/*_qemu.so")):
        return "libvirtd is not installed (scripts/install_packages libvirt)"
    if EMULATOR is None or shutil.which("qemu-io") is None:
        return "qemu is not installed (scripts/install_packages qemu vm)"
    return ""


class Libvirt:
    """A libvirtd with folders of its own; a context manager. `uri` leads to it, `images` are its guests'."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="island-libvirt-"))
        self.images = self.folder / "images"
        self.socket = self.folder / "run/libvirt/libvirt-sock"
        self.uri = f"qemu:///session?socket={self.socket}"
        self._process: subprocess.Popen[bytes] | None = None
        self.connection: Any = None
        self.guests: list[Guest] = []

    def __enter__(self) -> Self:
        import libvirt

        for place in ("run", "config/libvirt", "cache", "data", "images"):
            (self.folder / place).mkdir(parents=True)
        (self.folder / "config/libvirt/qemu.conf").write_text(SETTINGS)
        self.give(self.folder)
        places = {f"XDG_{name}": f"{self.folder}/{place}" for name, place in PLACES.items()}
        as_nobody = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
        words = [*(as_nobody if os.geteuid() == 0 else []), LIBVIRTD, "--config", "/dev/null"]
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), **places}
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        libvirt.registerErrorHandler(lambda *_: None, None)
        try:
            self.connection = self._connected()
        except BaseException as error:
            error.add_note((self.folder / "log").read_text(errors="replace"))
            self.stop()
            raise
        return self

    def _connected(self) -> Any:
        import libvirt

        deadline = time.monotonic() + 30
        while True:
            assert self._process is not None
            assert self._process.poll() is None, "libvirtd ended"
            try:
                return libvirt.open(self.uri)
            except libvirt.libvirtError:
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.connection is not None:
            for guest in [*self.guests]:
                guest.stop()
            self.connection.close()
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
        shutil.rmtree(self.folder)

    def give(self, top: Path) -> None:
        """Let the user that runs libvirtd have a file or folder."""
        if os.geteuid() == 0:
            for path in (top, *top.rglob("*")):
                os.chown(path, USER, USER)
        top.chmod(top.stat().st_mode | 0o711)

    def image(self, name: str, size: int = SIZE, **options: object) -> Path:
        path = create_qcow2(self.images / f"{name}.qcow2", size, **options)
        self.give(path)
        return path

    def make(self, name: str, disks: Mapping[str, str], more: str = NO_MORE, start: bool = True) -> Guest:
        """A guest with these disks, by target name, each the inside of a <disk> element; see `file`."""
        devices = "".join(f"<disk {inside}<target dev='{dev}'/></disk>" for dev, inside in disks.items())
        xml = DOMAIN.format(name=name, emulator=EMULATOR, devices=devices, more=more)
        made = self.connection.createXML if start else self.connection.defineXML
        self.guests.append(Guest(self, made(xml)))
        return self.guests[-1]


def file(image: Path, kind: str = "qcow2", **attributes: str) -> str:
    """The inside of a <disk> that is a file."""
    extra = "".join(f" {name}='{value}'" for name, value in attributes.items())
    return f"type='file'{extra}><driver name='qemu' type='{kind}'/><source file='{image}'/>"


class Guest:
    """A running guest, written to as by itself, through the devices that it has."""

    def __init__(self, libvirt: Libvirt, domain: Any) -> None:
        self.libvirt = libvirt
        self.domain = domain
        self.name = domain.name()

    def qmp(self, command: str, **arguments: object) -> Any:
        import libvirt_qemu

        message = json.dumps({"execute": command, "arguments": arguments})
        answer = json.loads(libvirt_qemu.qemuMonitorCommand(self.domain, message, 0))
        assert "return" in answer, answer
        return answer["return"]

    def write(self, number: int, offset: int, length: int, pattern: int) -> None:
        """Fill a range of the disk of that number, from 0, in bytes."""
        device = f"/machine/peripheral/virtio-disk{number}/virtio-backend"
        line = f'qemu-io -d {device} "write -P {pattern} {offset} {length}"'
        said = self.qmp("human-monitor-command", **{"command-line": line})
        assert said == "", said

    def stop(self) -> None:
        """End the guest, whose images are closed then; libvirt is at it for a second more."""
        import libvirt
        import libvirt_qemu

        self.libvirt.guests.remove(self)
        with contextlib.suppress(libvirt.libvirtError):  # it is gone before it could answer
            if self.domain.isActive():
                libvirt_qemu.qemuMonitorCommand(self.domain, '{"execute": "quit"}', 0)
            else:
                self.domain.undefine()


def content_is(image: Path, patterns: Sequence[tuple[int, int, int]], size: int = SIZE) -> None:
    """Assert that a qcow2 holds these ranges (offset, length, byte value), in order, and zeros else."""
    at = 0
    commands = []
    for offset, length, pattern in [*patterns, (size, 0, 0)]:
        if offset > at:
            commands.append(f"read -q -P 0 {at} {offset - at}")
        if length:
            commands.append(f"read -q -P {pattern} {offset} {length}")
        at = offset + length
    qemu_io(image, *commands, read_only=True)


def pins(image: Path) -> list[str]:
    """Names of the internal snapshots of an image that may be in use."""
    told = subprocess.check_output(["qemu-img", "info", "-U", "-f", "qcow2", "--output=json", image])
    return [one["name"] for one in json.loads(told).get("snapshots", [])]
