"""What root may be asked to do: Cinder's own rootwrap, with the filters that the package brings."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from oslo_rootwrap import wrapper

from island_fast.cinder.attach import daemon
from island_fast.cinder.attach.daemon import Daemon
from tests.live.actor import ROOT
from tests.live.conftest import Host

FILTERS = ROOT / "island_fast/etc/rootwrap.d"
VOLUME = "0b0c9a4e-7c9c-4b55-a6a1-3a0d6a1d5a4e"
EXEC_DIRS = ["/usr/sbin", "/sbin", "/usr/bin", "/bin", *os.environ["PATH"].split(":")]


def allowed(command: list[str]) -> bool:
    filters = wrapper.load_filters([str(FILTERS)])
    try:
        found = wrapper.match_filter(filters, command, EXEC_DIRS)
    except wrapper.NoFilterMatched:
        return False
    except wrapper.FilterMatchNotExecutable:  # allowed, and the program is not installed
        return True
    return found.run_as == "root"


SELFTEST = "5e1f7e57-0000-4000-8000-000000000000"
BENCH = ["-c", "16", "-d", "4", "-s", "1048576", "-S", "1048576"]


def loop(command: str, *more: str, path: str = f"/run/island/{VOLUME}/disk") -> list[str]:
    return ["island-loop", command, path, *more]


def nbd(command: str, *more: str, path: str = f"/run/island/{VOLUME}/nbd/0123456789abcdef") -> list[str]:
    return ["island-nbd", command, path, *more]


def vduse(command: str, *more: str, path: str = f"/run/island/{VOLUME}/vduse/0123456789abcdef") -> list[str]:
    return ["island-vduse", command, path, *more]


def unit(
    *, name: str = VOLUME, user: str = "cinder", script: str = f"/run/island/{VOLUME}/start"
) -> list[str]:
    flags = ["--quiet", "--collect", f"--unit=island-{name}", f"--uid={user}", "--gid=cinder"]
    return ["systemd-run", *flags, "--", "/bin/sh", script]


@pytest.mark.parametrize(
    "command",
    [
        loop("attach"),
        loop("attach", path=f"/var/lib/cinder/island.d/run-1/{VOLUME}/disk"),
        loop("grow"),
        loop("release"),
        loop("abandon"),
        loop("exercise", path=f"/run/island/{SELFTEST}/disk"),
        loop("digest", path=f"/run/island/{SELFTEST}/disk"),
        loop("bench", *BENCH, path=f"/run/island/{SELFTEST}/disk"),
        nbd("exercise", path=f"/run/island/{SELFTEST}/nbd/0123456789abcdef"),
        nbd("digest", path=f"/run/island/{SELFTEST}/nbd/0123456789abcdef"),
        nbd("bench", *BENCH, path=f"/run/island/{SELFTEST}/nbd/0123456789abcdef"),
        nbd("connect", "1073741824"),
        nbd("resume", "1073741824"),
        nbd("release"),
        nbd("abandon"),
        nbd("loosen"),
        vduse("create"),
        vduse("attach"),
        vduse("release"),
        vduse("exercise", path=f"/run/island/{SELFTEST}/vduse/0123456789abcdef"),
        vduse("digest", path=f"/run/island/{SELFTEST}/vduse/0123456789abcdef"),
        vduse("bench", *BENCH, path=f"/run/island/{SELFTEST}/vduse/0123456789abcdef"),
        unit(),
        unit(name=f"{VOLUME}-0123abcd"),
    ],
)
def test_what_the_driver_needs_is_allowed(command: list[str]) -> None:
    assert allowed(command)


@pytest.mark.parametrize(
    "command",
    [
        loop("attach", path="/etc/shadow"),
        loop("attach", path=f"/run/island/../../etc/{VOLUME}/disk"),
        loop("attach", path=f"/run/island/{VOLUME}/disk/../../shadow"),
        loop("attach", path=f"relative/{VOLUME}/disk"),
        loop("attach", path=f"/run/island/{VOLUME.upper()}/disk"),
        loop("attach", path="/dev/sda"),
        loop("attach", "/dev/sda"),
        loop("release", path="/dev/loop0"),
        loop("exercise"),
        loop("bench", *BENCH),
        loop("bench", *BENCH, "/dev/sda", path=f"/run/island/{SELFTEST}/disk"),
        nbd("exercise"),
        ["losetup", "--find", "--show", "--nooverlap", "--direct-io=off", f"/run/island/{VOLUME}/disk"],
        ["losetup", "--detach", "/dev/loop0"],
        ["losetup", "--set-capacity", "/dev/loop0"],
        ["chown", "0:0", "/etc/shadow"],
        ["chown", "64060:64060", "/dev/loop7"],
        ["chown", "64060:64060", "/dev/nbd15"],
        nbd("connect"),
        nbd("connect", "-1"),
        nbd("release", "4096"),
        nbd("erase"),
        nbd("release", path="/dev/nbd0"),
        nbd("release", path=f"/run/../{VOLUME}/nbd/0123456789abcdef"),
        nbd("release", path=f"/run/island/{VOLUME}/nbd/../../secret"),
        ["nbd-client", "-d", "/dev/nbd0"],
        vduse("abandon"),
        vduse("exercise"),
        vduse("bench", *BENCH),
        vduse("release", "4096"),
        vduse("release", path="/dev/vda"),
        vduse("release", path=f"island-{VOLUME}-0123456789abcdef"),
        vduse("release", path=f"/run/island/{VOLUME}/vduse/../../secret"),
        vduse("attach", path=f"/run/../{VOLUME}/vduse/0123456789abcdef"),
        vduse("create", path=f"/run/island/{VOLUME}/nbd/0123456789abcdef"),
        ["vdpa", "dev", "del", "stranger"],
        ["setfacl", "-m", "u:cinder:rw", "/dev/vduse/control"],
        unit(name=f"{VOLUME}-ssh"),
        unit(user="root"),
        unit(user="0"),
        unit(name="ssh"),
        unit(script="/tmp/start"),
        unit(script=f"/tmp/../{VOLUME}/start"),
        [*unit()[:-2], "/bin/bash", f"/run/island/{VOLUME}/start"],
        ["systemd-run", "/bin/sh", f"/run/island/{VOLUME}/start"],
        ["qemu-storage-daemon"],
        ["mount", "/dev/loop0", "/mnt"],
        ["sh", "-c", "id"],
    ],
)
def test_anything_else_is_refused(command: list[str]) -> None:
    assert not allowed(command)


def test_a_whole_life_asks_root_for_nothing_else(nobody_host: Host) -> None:
    volume, image = nobody_host.volume()
    exports = nobody_host.exports
    exports.check_data_path(nobody_host.images)
    exports.attach(volume, image)
    exports.grow(volume, 128 << 20)
    exports.detach(volume)
    exports.stop(volume)
    asked = exports.became_root
    verbs = ("attach", "grow", "release", "exercise", "digest")
    assert {tuple(words[:2]) for words in asked} >= {("island-loop", verb) for verb in verbs}
    assert [words for words in asked if not allowed(words)] == []


def test_under_systemd_each_daemon_is_a_unit_of_its_own(
    root_host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """systemd itself does not run here: what it would be asked for is looked at, and done in its place."""
    asked = []

    def execute(command, /, *, root=False, env=None):
        asked.append((list(command), root))
        start = command[command.index("--") + 1 :]
        return subprocess.run(["setsid", "--fork", *start], capture_output=True, text=True, check=True)

    monkeypatch.setattr(daemon, "SYSTEMD", tmp_path)
    monkeypatch.setattr(daemon, "_user_and_group", lambda: ("cinder", "cinder"))
    volume, image = root_host.volume()
    (root_host.run / volume).mkdir(parents=True)
    root_host.run.chmod(0o700)
    one = Daemon(root_host.run / volume, execute)
    one.start(image, "loop")
    assert one.is_running()
    assert asked == [(unit(name=volume, script=f"{root_host.run / volume}/start"), True)]
    assert allowed(asked[0][0])
    one.quit()
    assert not one.is_running()
