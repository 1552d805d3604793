"""Memory does not grow with the volume: a sparse one with 1 GiB of data stays under 150 MiB, both ways."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import qemu

TIB = 1 << 40
BLOCK = 65536
LIMIT = 150 << 20
LIMIT_OF_COPIES = 190 << 20  # they hold packs that come, and packs that go

PROGRAM = r"""
import re, sys
from pathlib import Path
from island_fast.api import Repository
url, verb, *names = sys.argv[1:]
with Repository.open(url, create=True) as repository:
    if verb == "snapshot":
        told = repository.snapshot(names[0])
    elif verb == "copy":
        with Repository.open(names[0], create=True) as far:
            told = repository.copy(far, ["copy@latest"])[0]
    elif verb == "onto":
        told = repository.restore_onto(names[0], names[1])
    else:
        told = repository.restore(names[0], names[1])
most = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())  # ru_maxrss counts the parent's
print(told.volume_size, int(most[1]) * 1024)
"""


def peak(size: int, *argv: str | Path) -> int:
    """Peak resident bytes of one verb on a volume of `size` bytes in a process of its own."""
    words = [str(a) for a in argv]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    told, most = map(int, done.stdout.split())
    assert told == size
    return most


@pytest.fixture
def image(size: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    piece = folder / "piece"
    piece.write_bytes(os.urandom(4 << 20))
    draw = random.Random(7)
    path = qemu.create(folder / "large.qcow2", size, lazy_refcounts="on")
    places = [i * (size // 256) + draw.randrange(1000) * 65536 for i in range(256)]
    qemu.io(path, *(f"write -q -s {piece} {at} 4M" for at in places))
    return path


@pytest.mark.parametrize("size", [16 * TIB])
@pytest.mark.parametrize(
    "kind", ["directory", pytest.param("swift", marks=pytest.mark.swift_only("a Ceph makes no difference"))]
)
def test_a_sparse_volume_stays_within_150_mib(
    kind: str,
    size: int,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    url = request.getfixturevalue("swift_url") if kind == "swift" else str(tmp_path / "repository")
    monkeypatch.setenv("ISLAND_STATE", str(tmp_path / "state"))
    volume = Path(tmp_path / "copy.qcow2")
    qemu.run("cp", "--sparse=always", image, volume)
    assert peak(size, url, "snapshot", volume) < LIMIT
    assert peak(size, url, "snapshot", volume) < LIMIT
    target = tmp_path / "restored.qcow2"
    assert peak(size, url, "restore", "copy@latest", target) < LIMIT
    qemu.check(target)
    qemu.run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", volume, target)
    qemu.io(target, qemu.write(5 * TIB, BLOCK, 7))
    assert peak(size, url, "onto", "copy@latest", target) < LIMIT
    if kind == "swift":
        assert peak(size, url, "copy", tmp_path / "far") < LIMIT_OF_COPIES
    for path in (volume, target):
        path.unlink()
