"""The units in docs/systemd: systemd has nothing to say against them, and they do what they are for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from island_fast.api import Repository
from tests.live.actor import ROOT
from tests.live.booted import boot, ground
from tests.support import qemu

UNITS = ROOT / "docs/systemd"
SERVICES = [
    "island-snapshot@.service",
    "island-retain.service",
    "island-sweep.service",
    "island-verify.service",
    "island-copy.service",
    "island-snapshot-domain@.service",
]
REPORT = "island-failed@.service"
TIMERS = [name.replace(".service", ".timer") for name in SERVICES]
MOST_EXPOSED = 35  # of 100, by systemd's count; a service that says nothing has 96

ISLAND = """#!/bin/sh
export PYTHONPATH={root} PYTHONDONTWRITEBYTECODE=1 PATH={path}
exec {python} -P -m island_fast "$@"
"""
CONFIGURATION = """
repository = "{folder}/repository"

[retain]
keep-last = 1
"""
CHECK = """[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
Environment=PATH={path}
ExecStart={python} {folder}/check.py
StandardOutput=append:{folder}/log
StandardError=append:{folder}/log
"""
SCRIPT = """
import json, subprocess
from pathlib import Path

folder, image = Path({folder!r}), {image!r}

def run(*words):
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()

def instance(template, path):
    return run("systemd-escape", "-p", f"--template={{template}}", path)

def start(unit):
    run("systemctl", "start", unit)
    shown = run("systemctl", "show", "-p", "Result", "-p", "ExecMainStatus", "-p", "ActiveState", unit)
    return dict(line.split("=") for line in shown.splitlines())

told = {{}}
snapshot = instance("island-snapshot@.service", image)
told["first"] = start(snapshot)
told["second"] = start(snapshot)
told["missing"] = start(instance("island-snapshot@.service", image + ".not"))
told["state"] = sorted(path.name for path in Path("/var/lib/island").iterdir())
told["retain"] = start("island-retain.service")
told["sweep"] = start("island-sweep.service")
told["verify"] = start("island-verify.service")
told["copy"] = start("island-copy.service")
told["inside"], told["outside"] = start("inside.service"), start("outside.service")
timers = ["island-retain.timer", "island-sweep.timer", instance("island-snapshot@.timer", image)]
told["timers"] = [start(timer)["ActiveState"] for timer in timers]
(folder / "part.json").write_text(json.dumps(told))
(folder / "part.json").rename(folder / "told.json")
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with ground() as folder:
        yield folder


@pytest.fixture
def units(folder: Path) -> Path:
    """The units as they are, but for the places of what they name: all are below `folder`."""
    command = folder / "island"
    command.write_text(ISLAND.format(root=ROOT, path=os.environ["PATH"], python=sys.executable))
    command.chmod(0o755)
    places = {
        "/usr/local/bin/island": str(command),
        "/etc/island": str(folder),
        "/srv/snapshots": str(folder / "repository"),
    }
    for name in [*SERVICES, *TIMERS, REPORT]:
        text = (UNITS / name).read_text()
        for place, mine in places.items():
            assert (place in text) == (name in SERVICES)
            text = text.replace(place, mine)
        if name == REPORT:  # no journal runs there
            assert "logger -p daemon.err -t island" in text
            text = text.replace("logger -p daemon.err -t island", f">>{folder}/reports echo")
        (folder / name).write_text(text)
    return folder


def test_systemd_has_nothing_to_say_against_them(units: Path) -> None:
    found = {path.name for path in UNITS.iterdir()}
    assert found == {*SERVICES, *TIMERS, REPORT, "README.md"}
    for name in [*SERVICES, *TIMERS, REPORT]:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", units / name],
            capture_output=True,
            text=True,
            check=False,
        )
        ours = [line for line in (done.stdout + done.stderr).splitlines() if "island" in line]
        assert (done.returncode, ours) == (0, []), "it may have things to say about the distribution's units"


def test_a_mistake_in_a_unit_would_be_seen(units: Path) -> None:
    name = units / SERVICES[1]
    name.write_text(name.read_text().replace("ProtectSystem=strict", "ProtectSystems=strict"))
    verify = ["systemd-analyze", "verify", "--man=no", name]
    assert "ProtectSystems" in subprocess.run(verify, capture_output=True, text=True, check=False).stderr


@pytest.mark.parametrize("name", SERVICES)
def test_they_may_do_little(units: Path, name: str) -> None:
    judge = ["systemd-analyze", "security", "--offline=yes", "--no-pager", f"--threshold={MOST_EXPOSED}"]
    done = subprocess.run([*judge, units / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_real_systemd_runs_them(units: Path) -> None:
    """The image is in a folder with a name that systemd, a shell and an ExecStart line would all spoil."""
    images = units / "my images $HOME %i 50%"
    images.mkdir()
    image = qemu.create(images / "web1.qcow2", 1 << 20, lazy_refcounts="on")
    qemu.io(image, qemu.write(0, 65536, 1))
    shutil.chown(image, "nobody")
    image.chmod(0o600)
    (units / "repository").mkdir()
    (units / "config.toml").write_text(CONFIGURATION.format(folder=units))
    (units / "environment").write_text(f"ISLAND_COPY_TO={units}/repository/far\n")
    places = {"folder": str(units), "path": os.environ["PATH"], "python": sys.executable}
    (units / "check.service").write_text(CHECK.format(**places))
    (units / "check.py").write_text(SCRIPT.format(folder=str(units), image=str(image)))
    for name, place in (("inside", units / "repository/probe"), ("outside", units / "probe")):
        text = (
            (units / SERVICES[1])
            .read_text()
            .replace(f"{units / 'island'} retain", f"/usr/bin/env touch {place}")
        )
        (units / f"{name}.service").write_text(text)
    copy = f"mount -t tmpfs tmpfs /var/lib && cp {units}/*.timer /run/systemd/system"
    boot(units, "check.service", units / "told.json", copy)
    told = json.loads((units / "told.json").read_text())
    well = {"Result": "success", "ExecMainStatus": "0", "ActiveState": "inactive"}
    assert [told[step] for step in ("first", "second", "retain", "sweep", "verify", "copy")] == (
        [well] * 6
    ), (units / "log").read_text()
    assert told["missing"]["Result"] != "success"
    reports = (units / "reports").read_text()
    assert "my\\x20images" in reports
    assert reports.count(" failed: see journalctl") == 2, "the missing image, and the one that is confined"
    assert (told["inside"], told["outside"]["Result"]) == (well, "exit-code"), "they are confined"
    assert not (units / "probe").exists()
    assert "writer" in told["state"], "local state is where the command looks for it"
    assert told["timers"] == ["active"] * 3
    with Repository.open(str(units / "repository")) as repository:
        (left,) = repository.snapshots()
    assert left.volume == "web1"
    assert left.parent is None
    names = [path.name for path in (units / "repository/web1/manifests").rglob("*") if path.is_file()]
    assert [name.partition("-")[0] for name in names] == [left.snapshot], "the other is swept"
    assert [one["name"].endswith(left.snapshot) for one in qemu.info(image)["snapshots"]] == [True]
