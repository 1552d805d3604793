"""A guest with an agent that is the test's: a Debian kernel and a busybox that pass on what libvirt says.

libvirt speaks to an agent only once the guest has opened the channel, so the channel and the guest are real,
and the agent is the one thing that is not. It speaks as qemu's does (qga/qapi-schema.json).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

from tests.guests.session import Guest, Libvirt, file
from tests.live import machine

MODULES = "virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_console"
# a channel may be opened once, hence one descriptor for both directions; without a peer it reads as ended
INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for m in {MODULES}; do [ ! -e /modules/$m.ko ] || insmod /modules/$m.ko; done
port() {{ while :; do for p in /sys/class/virtio-ports/*; do
    [ "$(cat $p/name)" != $1 ] || {{ echo /dev/${{p##*/}}; return; }}
done; sleep 0.1; done; }}
exec 3<>$(port org.qemu.guest_agent.0) 4<>$(port island.relay)
while :; do cat <&3 >&4; sleep 0.05; done &
while :; do cat <&4 >&3; sleep 0.05; done
"""
DEVICES = """<serial type='file'><source path='{folder}/console'/></serial>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<channel type='unix'><source mode='bind' path='{folder}/relay'/>
<target type='virtio' name='island.relay'/></channel>
"""


def missing() -> str:
    if machine.kernel() is None:
        return f"there is no kernel for the guest in {machine.GUEST} (scripts/install_packages guest)"
    return ""


def boot(libvirt: Libvirt, name: str, image: Path) -> tuple[Guest, Agent]:
    """A guest whose agent answers."""
    folder = libvirt.folder / "boot"
    folder.mkdir()
    kernel = shutil.copy(machine.kernel(), folder)
    ramdisk = machine.make_ramdisk(folder, "", INIT, MODULES)
    libvirt.give(folder)
    line = "<cmdline>console=ttyS0 quiet panic=-1</cmdline>"
    direct = f"<kernel>{kernel}</kernel><initrd>{ramdisk}</initrd>{line}"
    more = f"{direct}</os><devices>{DEVICES.format(folder=folder)}"
    guest = libvirt.make(name, {"vda": file(image)}, more)
    agent = Agent(folder / "relay")
    deadline = time.monotonic() + 120
    while "guest_agent.0' state='connected'" not in guest.domain.XMLDesc(0):
        assert time.monotonic() < deadline, (folder / "console").read_text(errors="replace")
        time.sleep(0.05)
    return guest, agent


class Agent(threading.Thread):
    """Answers on the relay; `answers` are by command, of which an exception is an error and None silence.

    A callable is called for its answer. `said` is what came, but for libvirt's own synchronisation.
    """

    def __init__(self, relay: Path) -> None:
        super().__init__(daemon=True)
        self.answers: dict[str, Any] = {}
        self.said: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(relay))
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line.lstrip(b"\xff"))
                answer = self._answer(message["execute"], message.get("arguments", {}))
                if answer is not None:
                    self._socket.sendall(json.dumps(answer).encode() + b"\n")

    def _answer(self, command: str, arguments: dict[str, Any]) -> object:
        if command.startswith("guest-sync"):
            return {"return": arguments["id"]}
        self.said.append(command)
        answer = self.answers.get(command, Exception(f"The command {command} has not been found"))
        if callable(answer):
            answer = answer()
        if isinstance(answer, Exception):
            return {"error": {"class": "GenericError", "desc": str(answer)}}
        return None if answer is None else {"return": answer}

    def stop(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self.join(10)
        self._socket.close()
