"""A real systemd, the first process of namespaces of its own, with no units but those of a test.

What it would do to a machine at boot it must not do to this one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.actor import USER

SYSTEMD = "/lib/systemd/systemd"

# sysctls and the machine's id are kept from it; units of the distribution are not there
BOOT = """
mount -t tmpfs tmpfs /run
for d in /lib/systemd/system /etc/systemd/system; do mkdir -p $d; mount -t tmpfs tmpfs $d; done
mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys
[ ! -e /etc/machine-id ] || mount --bind {folder}/id /etc/machine-id
mkdir -p /run/systemd/system
{before}
cp {folder}/*.service {folder}/*.target /run/systemd/system
exec env -i container=docker PATH=$PATH {systemd} --system --unit=all.target --log-target=console
"""
TARGET = "[Unit]\nDefaultDependencies=no\n"
SPACES = ["--fork", "--kill-child", "--pid", "--mount", "--uts", "--ipc", "--cgroup", "--mount-proc"]


@contextlib.contextmanager
def ground() -> Iterator[Path]:
    """A folder for units and what they leave; skips where there is no systemd."""
    if not os.path.exists(SYSTEMD):
        pytest.skip("systemd is not installed")
    with tempfile.TemporaryDirectory(prefix="island-systemd-") as name:
        shutil.chown(name, USER, USER)
        there = set(_control_groups())
        yield Path(name)
        for group in set(_control_groups()) - there:  # systemd leaves its own, empty
            _remove_groups(group)


def boot(folder: Path, wants: str, until: Path, before: str = "") -> None:
    """Boot with the units in `folder`; `wants` are started. Returns, all of it gone, when `until` is there.

    `before` are commands for a shell, once the machine's own places are out of sight.
    """
    (folder / "id").write_text("0" * 31 + "1\n")
    for name in ("sysinit", "basic", "shutdown"):
        (folder / f"{name}.target").write_text(TARGET)
    (folder / "all.target").write_text(f"{TARGET}Wants={wants}\n")
    (folder / "boot").write_text(BOOT.format(folder=folder, systemd=SYSTEMD, before=before))
    with (folder / "log").open("ab") as log:
        machine = subprocess.Popen(["unshare", *SPACES, "sh", folder / "boot"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not until.exists() and machine.poll() is None:
            said = (folder / "log").read_text(errors="replace")
            if "control group" in said and "Failed" in said:
                pytest.skip("systemd may not make control groups here")
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
    finally:
        machine.send_signal(signal.SIGKILL)
        machine.wait()
    assert until.exists(), (folder / "log").read_text(errors="replace")


def _remove_groups(top: Path) -> None:
    """Remove a group and those in it, as soon as the last of their processes is gone."""
    for place in [*sorted((p for p in top.rglob("*") if p.is_dir()), reverse=True), top]:
        deadline = time.monotonic() + 60
        while place.exists():
            with contextlib.suppress(OSError):
                place.rmdir()
                break
            assert time.monotonic() < deadline, f"{place} stays"
            time.sleep(0.05)


def _control_groups() -> Iterator[Path]:
    """The groups at the top of what a systemd makes, below this process's own, in every hierarchy."""
    own = {line.rpartition(":")[2].strip("/") for line in Path("/proc/self/cgroup").read_text().splitlines()}
    hierarchies = [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/")]
    for place in {hierarchy / path for hierarchy in hierarchies for path in own}:
        yield from (place / name for name in ("init.scope", "system.slice") if (place / name).is_dir())
