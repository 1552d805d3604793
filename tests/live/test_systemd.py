"""Under systemd each daemon is a unit of its own, and outlives the service that started it.

A real systemd, the first process of namespaces of its own, with no units but those of the test: what it would
do to a machine at boot it must not do to this one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import create_qcow2
from tests.live.actor import ROOT, USER

SYSTEMD = "/lib/systemd/systemd"
VOLUME = "0b0c9a4e-7c9c-4b55-a6a1-3a0d6a1d5a4e"

# sysctls and the machine's id are kept from it; units of the distribution are not there
BOOT = """
mount -t tmpfs tmpfs /run
for d in /lib/systemd/system /etc/systemd/system; do mkdir -p $d; mount -t tmpfs tmpfs $d; done
mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys
[ ! -e /etc/machine-id ] || mount --bind {folder}/id /etc/machine-id
mkdir -p /run/systemd/system /run/links && mkdir -m 700 /run/isl && chown {user} /run/links /run/isl
cp {folder}/*.service {folder}/*.target /run/systemd/system
exec env -i container=docker PATH=$PATH {systemd} --system --unit=all.target --log-target=console
"""
TARGET = "[Unit]\nDefaultDependencies=no\n"
SERVICE = """[Unit]
DefaultDependencies=no
After={after}
[Service]
Type=oneshot
Environment=PATH={path}
ExecStart={python} -P {folder}/{name}.py
WorkingDirectory=/
Environment=PYTHONPATH={root}
Environment=PYTHONDONTWRITEBYTECODE=1
StandardOutput=append:{folder}/log
StandardError=append:{folder}/log
"""
SCRIPT = """
import json, subprocess
from pathlib import Path
from island_fast.host.qmp import Qmp
from tests.live.actor import Remote

volume, folder = {volume!r}, Path({folder!r})
exports = Remote(Path("/run/isl"), Path("/run/links"))

def told():
    with Qmp(Path("/run/isl", volume, "control")) as qmp:
        pid = qmp.peer()
    own = lambda process: Path(f"/proc/{{process}}/cgroup").read_text().split()[-1].rpartition(":")[2]
    show = ["systemctl", "show", "-p", "ActiveState", "--value", f"island-{{volume}}.service"]
    user = Path(f"/proc/{{pid}}").stat().st_uid
    state = subprocess.run(show, capture_output=True, text=True).stdout.strip()
    return {{"pid": pid, "cgroup": own(pid), "service": own("self"), "unit": state, "user": user}}
"""
FIRST = """
exports.attach(volume, folder / "image")
(folder / "first.json").write_text(json.dumps(told()))
exports.close()
"""
SECOND = """
answer = {"state": exports.state(volume).value, **told()}
exports.stop(volume)
answer["left"] = exports.state(volume).value
exports.close()
(folder / "second.json").write_text(json.dumps(answer))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    if not os.path.exists(SYSTEMD):
        pytest.skip("systemd is not installed")
    with tempfile.TemporaryDirectory(prefix="island-systemd-") as name:
        shutil.chown(name, USER, USER)
        there = set(control_groups())
        yield Path(name)
        for group in set(control_groups()) - there:  # systemd leaves its own, empty
            remove_groups(group)


def remove_groups(top: Path) -> None:
    """Remove a group and those in it, as soon as the last of their processes is gone."""
    for place in [*sorted((p for p in top.rglob("*") if p.is_dir()), reverse=True), top]:
        deadline = time.monotonic() + 60
        while place.exists():
            with contextlib.suppress(OSError):
                place.rmdir()
                break
            assert time.monotonic() < deadline, f"{place} stays"
            time.sleep(0.05)


def control_groups() -> Iterator[Path]:
    """The groups at the top of what a systemd makes, below this process's own, in every hierarchy."""
    own = {line.rpartition(":")[2].strip("/") for line in Path("/proc/self/cgroup").read_text().splitlines()}
    hierarchies = [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/")]
    for place in {hierarchy / path for hierarchy in hierarchies for path in own}:
        yield from (place / name for name in ("init.scope", "system.slice") if (place / name).is_dir())


def prepare(folder: Path) -> None:
    image = create_qcow2(folder / "image", 64 << 20)
    shutil.chown(image, USER, USER)
    (folder / "id").write_text("0" * 31 + "1\n")
    for name in ("sysinit", "basic", "shutdown"):
        (folder / f"{name}.target").write_text(TARGET)
    (folder / "all.target").write_text(TARGET + "Wants=first.service second.service\n")
    for name, after, script in (("first", "", FIRST), ("second", "first.service", SECOND)):
        places = {"name": name, "after": after, "folder": folder, "root": ROOT}
        unit = SERVICE.format(**places, python=sys.executable, path=os.environ["PATH"])
        (folder / f"{name}.service").write_text(unit)
        (folder / f"{name}.py").write_text(SCRIPT.format(volume=VOLUME, folder=str(folder)) + script)
    boot = BOOT.format(folder=folder, user=USER, systemd=SYSTEMD)
    (folder / "boot").write_text(boot)


def test_a_daemon_is_a_unit_of_its_own_and_outlives_its_starter(folder: Path) -> None:
    prepare(folder)
    spaces = ["--fork", "--kill-child", "--pid", "--mount", "--uts", "--ipc", "--cgroup", "--mount-proc"]
    with (folder / "log").open("ab") as log:
        machine = subprocess.Popen(["unshare", *spaces, "sh", folder / "boot"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "second.json").exists() and machine.poll() is None:
            said = (folder / "log").read_text(errors="replace")
            if "control group" in said and "Failed" in said:
                pytest.skip("systemd may not make control groups here")
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
    finally:
        machine.send_signal(signal.SIGKILL)
        machine.wait()
    first = json.loads((folder / "first.json").read_text())
    second = json.loads((folder / "second.json").read_text())
    assert first["cgroup"] == second["cgroup"] == f"/system.slice/island-{VOLUME}.service"
    assert first["service"] == "/system.slice/first.service"
    assert first["pid"] == second["pid"], "it ended with the service that started it"
    assert (second["state"], second["unit"], second["left"]) == ("attached", "active", "none")
    assert second["user"] == USER
