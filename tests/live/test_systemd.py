"""Under systemd each daemon is a unit of its own, and outlives the service that started it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.actor import ROOT, USER
from tests.live.booted import boot, ground
from tests.support.daemon import create_qcow2

VOLUME = "0b0c9a4e-7c9c-4b55-a6a1-3a0d6a1d5a4e"

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
from island_fast.qemu.qmp import Qmp
from tests.live.actor import Remote

volume, folder = {volume!r}, Path({folder!r})
exports = Remote(Path("/run/isl"), Path("/run/links"))

def told():
    with Qmp(Path("/run/isl", volume, "control")) as qmp:
        pid = qmp.peer_pid()
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
    with ground() as folder:
        yield folder


def prepare(folder: Path) -> None:
    image = create_qcow2(folder / "image", 64 << 20)
    shutil.chown(image, USER, USER)
    for name, after, script in (("first", "", FIRST), ("second", "first.service", SECOND)):
        places = {"name": name, "after": after, "folder": folder, "root": ROOT}
        unit = SERVICE.format(**places, python=sys.executable, path=os.environ["PATH"])
        (folder / f"{name}.service").write_text(unit)
        (folder / f"{name}.py").write_text(SCRIPT.format(volume=VOLUME, folder=str(folder)) + script)


def test_a_daemon_is_a_unit_of_its_own_and_outlives_its_starter(folder: Path) -> None:
    prepare(folder)
    places = f"mkdir -p /run/links && mkdir -m 700 /run/isl && chown {USER} /run/links /run/isl"
    boot(folder, "first.service second.service", folder / "second.json", places)
    first = json.loads((folder / "first.json").read_text())
    second = json.loads((folder / "second.json").read_text())
    assert first["cgroup"] == second["cgroup"] == f"/system.slice/island-{VOLUME}.service"
    assert first["service"] == "/system.slice/first.service"
    assert first["pid"] == second["pid"], "it ended with the service that started it"
    assert (second["state"], second["unit"], second["left"]) == ("attached", "active", "none")
    assert second["user"] == USER
