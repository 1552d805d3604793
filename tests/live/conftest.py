"""Volumes that are really attached, by root and by another user: qemu-storage-daemon, loop and NBD devices.

What a test leaves is looked for after it: no daemon, no mount and no device of its own may stay. The kind of
device is the environment's ISLAND_LIVE_KIND, loop without it; test_nbd.py runs these tests on its kernel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from island_fast.cinder.attach.exports import Exports
from island_fast.qemu.programs import run_program
from tests.live.actor import KIND, ROOT, USER, Remote
from tests.support.daemon import create_qcow2

SIZE = 64 << 20


def missing() -> str:
    """What this machine lacks for these tests, in words; "" where it lacks nothing."""
    if os.geteuid() != 0:
        return "block devices need root"
    for node in ("/dev/fuse", "/dev/loop-control") if KIND == "loop" else ():
        if not os.path.exists(node):
            return f"this machine has no {node}"
    for program in ("qemu-storage-daemon", "qemu-io", "fusermount3", "mke2fs", "setpriv"):
        if shutil.which(program) is None:
            return f"{program} is not installed (scripts/install_packages qemu daemon fuse mkfs)"
    return ""


@pytest.fixture(autouse=True, scope="session")
def machine() -> None:
    if reason := missing():
        pytest.skip(reason)


@dataclass(frozen=True)
class Host:
    """One host's folders, its exports and who works them: root in this process, or nobody in another."""

    run: Path
    links: Path
    images: Path
    exports: Any
    uid: int

    def volume(self, size: int = SIZE, **options: object) -> tuple[str, Path]:
        """A new volume: its id and its image, empty."""
        name = str(uuid.uuid4())
        image = create_qcow2(self.images / name, size, **options)
        os.chown(image, self.uid, self.uid)
        return name, image

    def control(self, volume: str) -> Path:
        return self.run / volume / "control"

    def devices(self) -> list[str]:
        """Devices over anything of this host's, those that wait for their last user too."""
        sysfs = Path("/sys/block")
        paths = [*sysfs.glob("loop*/loop/backing_file"), *sysfs.glob("nbd*/backend")]
        found = [p.parts[3] for p in paths if p.read_text().startswith(str(self.run))]
        # of VDUSE the kernel knows no path: these tests have their machine to themselves
        left = list(Path("/sys/class/vduse").glob("island-*"))
        disks = [disk.name for one in left for disk in one.glob("*/virtio*/block/*")]
        return sorted([*found, *(disks or [one.name for one in left])])


@pytest.fixture(params=["root", "nobody"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    yield from host_of(request.param)


@pytest.fixture
def root_host() -> Iterator[Host]:
    """A host worked by root in this process, so that faults can be planted in it."""
    yield from host_of("root")


@pytest.fixture
def nobody_host() -> Iterator[Host]:
    yield from host_of("nobody")


def host_of(user: str) -> Iterator[Host]:
    """Folders and exports for one test, and a look at what it left."""
    with (
        tempfile.TemporaryDirectory(prefix="island-live-") as folder,
        tempfile.TemporaryDirectory(prefix="island-links-", dir="/dev/shm") as links,
    ):
        yield from _host_in(user, Path(folder), Path(links))


def _host_in(user: str, folder: Path, links: Path) -> Iterator[Host]:
    run, images, uid = folder / "run", folder / "images", 0 if user == "root" else USER
    images.mkdir()
    for place in (folder, images, links):
        os.chown(place, uid, uid)
    if uid and not _may_read(uid):
        pytest.skip(f"the user nobody may not read {ROOT}")
    exports = Remote(run, links) if uid else Exports(run, links, run_program, KIND)
    host = Host(run, links, images, exports, uid)
    try:
        yield host
    finally:
        for volume in exports.volumes():
            exports.stop(volume)
        if uid:
            exports.close()
    assert not host.devices()
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()
    assert not list(links.iterdir())


def _may_read(uid: int) -> bool:
    words = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "test", "-r"]
    return subprocess.run([*words, ROOT / "island_fast/__init__.py"]).returncode == 0
