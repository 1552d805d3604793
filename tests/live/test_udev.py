"""What the host's own udev makes of what tenants write: a real udevd, with and without our rule.

It runs in a mount namespace of its own, where it reads the distribution's rules and keeps its links and
records out of the machine's sight.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from island_fast.cinder.attach.selftest import check_data_path
from island_fast.cinder.attach.udev import RULE
from island_fast.errors import IslandError
from island_fast.qemu.programs import run_program
from tests.live.actor import ROOT
from tests.live.conftest import Host

UDEVD = next(
    (p for p in ("/usr/lib/systemd/systemd-udevd", "/lib/systemd/systemd-udevd") if Path(p).exists()), None
)
PREPARE = """
mkdir -p /run/udev /etc/udev/rules.d /dev/disk
for place in /run/udev /etc/udev/rules.d /dev/disk; do mount -t tmpfs tmpfs $place; done
[ -z "$RULE" ] || cp "$RULE" /etc/udev/rules.d
$UDEVD >/dev/null 2>&1 & udevd=$!
for n in $(seq 200); do [ -S /run/udev/control ] && break; sleep 0.05; done
udevadm settle
"$@"; status=$?
kill $udevd; wait $udevd
exit $status
"""
SCRIPT = """
import json, os, struct, subprocess, sys, time, uuid, zlib
from pathlib import Path
from island_fast.cinder.attach.exports import Exports
from island_fast.cinder.attach.selftest import check_data_path
from island_fast.errors import IslandError
from island_fast.qemu.programs import run_program

run, links, images, image = map(Path, sys.argv[1:])
exports, volume = Exports(run, links, run_program, "loop"), str(uuid.uuid4())

def physical_volume(device):
    # the label of LVM2, libblkid's lvm.c: its CRC is over all of the sector after the CRC's own field
    sector = bytearray(512)
    sector[20:32] = struct.pack("<I8s", 32, b"LVM2 001")
    sector[32:64] = b"A" * 32
    crc = zlib.crc32(bytes(sector[20:]), 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    sector[:20] = struct.pack("<8sQI", b"LABELONE", 1, crc)
    with open(device, "r+b", buffering=0) as file:
        file.seek(512)
        file.write(sector)

answer = {}
try:
    device = exports.attach(volume, image).resolve()
    for name, make in (
        ("ext4", ["mkfs.ext4", "-q", "-F", "-L", "hostroot", device]),
        ("swap", ["mkswap", "-L", "hostswap", device]),
        ("lvm", None),
    ):
        physical_volume(device) if make is None else subprocess.run(make, check=True, capture_output=True)
        entry = f"/sys/block/{device.name}"
        subprocess.run(["udevadm", "trigger", "--action=change", "--settle", entry], check=True)
        shown = subprocess.check_output(["udevadm", "info", "--query=property", entry], text=True)
        properties = dict(line.partition("=")[::2] for line in shown.splitlines())
        found = [str(p) for p in Path("/dev/disk").rglob("*") if p.is_symlink() and p.resolve() == device]
        found = [link for link in found if "by-diskseq" not in link]  # not by content
        answer[name] = {"type": properties.get("ID_FS_TYPE"), "links": found}
    number = device.stat().st_rdev
    watch = Path("/run/udev/watch", f"b{os.major(number)}:{os.minor(number)}")
    answer["watched"] = watch.is_symlink()
    exports.stop(volume)
    try:
        check_data_path(run, links, images, run_program, "loop")
        answer["refused"] = ""
    except IslandError as error:
        answer["refused"] = str(error)
finally:
    exports.stop(volume)
print(json.dumps(answer))
"""


def udev(host: Host, rule: str) -> dict[str, Any]:
    """What a udevd with this rule makes of a volume, and whether the driver starts beside it."""
    if UDEVD is None or shutil.which("udevadm") is None:
        pytest.skip("udev is not installed (scripts/install_packages udev)")
    _, image = host.volume()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RULE": rule, "UDEVD": UDEVD}
    words = [sys.executable, "-P", "-c", SCRIPT, host.run, host.links, host.images, image]
    there = Path("/dev/disk").exists()
    try:
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", PREPARE, "sh", *words],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        if not there:
            Path("/dev/disk").rmdir()
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_without_the_rule_udev_reads_what_tenants_write_and_the_driver_does_not_start(
    root_host: Host,
) -> None:
    """So that the other test tests something."""
    answer = udev(root_host, "")
    assert [answer[name]["type"] for name in ("ext4", "swap", "lvm")] == ["ext4", "swap", "LVM2_member"]
    assert "/dev/disk/by-label/hostroot" in answer["ext4"]["links"]
    assert answer["watched"]
    assert "udev on this host reads what tenants write" in answer["refused"]
    assert f"copy {RULE} to /etc/udev/rules.d" in answer["refused"]


def test_with_the_rule_udev_reads_nothing(root_host: Host) -> None:
    answer = udev(root_host, str(RULE))
    for name in ("ext4", "swap", "lvm"):
        assert answer[name] == {"type": "island_volume", "links": []}
    assert not answer["watched"]
    assert answer["refused"] == ""


def test_where_no_udev_can_be_seen_there_is_nothing_to_ask(
    root_host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A udev that has not handled any event yet is not taken for one that has the rule."""
    from island_fast.cinder.attach import udev as asked

    monkeypatch.setattr(asked, "_RUN", tmp_path)
    check_data_path(root_host.run, root_host.links, root_host.images, run_program, "loop")
    (tmp_path / "control").touch()
    monkeypatch.setattr(asked, "_PATIENCE", 0.2)
    with pytest.raises(IslandError, match="udev on this host reads"):
        check_data_path(root_host.run, root_host.links, root_host.images, run_program, "loop")
    assert root_host.exports.volumes() == []


def test_devices_of_others_are_left_to_udev(tmp_path: Path) -> None:
    """The host's own loop devices keep their links; only a path of ours makes one a volume's."""
    if shutil.which("udevadm") is None:
        pytest.skip("udev is not installed (scripts/install_packages udev)")
    text = RULE.read_text()
    pattern = text.split('ATTR{loop/backing_file}=="')[1].split('"')[0]
    import fnmatch

    ours = f"/run/island/island/daemons/{uuid.uuid4()}/disk"
    assert fnmatch.fnmatchcase(ours, pattern)
    for path in ("/var/lib/snapd/snaps/core_1.snap", "/srv/disk", f"/srv/{uuid.uuid4()}/disk.img"):
        assert not fnmatch.fnmatchcase(path, pattern)
