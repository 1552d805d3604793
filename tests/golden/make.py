"""How the golden repository was made: `python -m tests.golden.make`, once, by the first version.

It is never made again (this refuses to overwrite it): what it is worth is that an old version wrote it. A
format that comes later gets a golden repository of its own beside this one.

What each snapshot should hold comes from this script's own model of the bytes, which qemu-img confirms
when they are written; none of our readers has a part in `expected.json`.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from pathlib import Path
from unittest import mock

from island_fast.api import Repository
from island_fast.repository.local_state import LocalState
from tests.support import qemu

HERE = Path(__file__).parent
REPOSITORY = HERE / "repository"
EXPECTED = HERE / "expected.json"
BLOCK = 65536


class Volume:
    """An image and the model of its bytes."""

    def __init__(self, path: Path, data: bytes, **options: object) -> None:
        self.path = path
        self.data = bytearray(data)
        if not path.exists():
            qemu.create(path, len(data), **options)

    def write(self, block: int, data: bytes) -> None:
        source = self.path.with_suffix(".bytes")
        source.write_bytes(data)
        qemu.write_file(self.path, block * BLOCK, source)
        self.data[block * BLOCK : block * BLOCK + len(data)] = data

    def text(self, tag: str, *blocks: int) -> None:
        """Fill blocks (the last of the volume as far as it goes), each with a text of its own."""
        for block in blocks:
            line = f"block {block}, {tag}\n".encode()
            content = (line * (BLOCK // len(line) + 1))[:BLOCK]
            self.write(block, content[: len(self.data) - block * BLOCK])

    def noise(self, seed: int, block: int, length: int = BLOCK) -> None:
        """Begin a block with bytes that do not compress."""
        self.write(block, random.Random(seed).randbytes(length))

    def zero(self, block: int, *, discard: bool) -> None:
        command = qemu.discard if discard else qemu.zeroes
        qemu.io(self.path, command(block * BLOCK, BLOCK))
        self.data[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)

    def resize(self, size: int) -> None:
        qemu.resize(self.path, size)
        self.data = self.data[:size] + bytes(max(0, size - len(self.data)))


class Lineage:
    """What the snapshots of one lineage should be: kept by the order of events alone."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.live: dict[str, dict[str, object]] = {}
        self.epoch = 0

    def take(self, repository: Repository, volume: Volume, parent: str | None, **how: object) -> str:
        assert qemu.content(volume.path) == volume.data
        snapshot = repository.snapshot(volume.path, volume=self.name, **how).snapshot  # type: ignore[arg-type]
        self.live[snapshot] = {
            "parent": parent,
            "label": how.get("label", ""),
            "properties": how.get("properties", {}),
            "volume_size": len(volume.data),
            "sha256": hashlib.sha256(volume.data).hexdigest(),
        }
        return snapshot

    def delete(self, repository: Repository, snapshot: str) -> None:
        repository.delete([f"{self.name}@{snapshot}"])
        gone = self.live.pop(snapshot)
        for row in self.live.values():
            if row["parent"] == snapshot:
                row["parent"] = gone["parent"]


def on_the_first_host(repository: Repository, folder: Path) -> tuple[Lineage, Volume, str]:
    """Epoch 0 of vol-1: two packs in a snapshot, a branch, deletes, a repack, a dead pack, new sizes."""
    lineage = Lineage("vol-1")
    volume = Volume(folder / "main.qcow2", bytes(3 * 2**20 + 1536), lazy_refcounts="on")
    volume.noise(1, 0)
    volume.text("first", *range(2, 42), 48)
    volume.noise(2, 1, 8000)
    first = lineage.take(repository, volume, None, label="first")

    volume.text("second", 0, 4, 33)
    volume.text("first", 6)  # the same bytes again: a candidate, and inherited
    volume.noise(3, 34, 24000)
    volume.zero(3, discard=False)
    volume.zero(5, discard=True)
    second = lineage.take(repository, volume, first, label="second: zeros and a discard")

    repository.restore(f"vol-1@{second}", folder / "branch.qcow2")
    away = volume.path.rename(folder / "away.qcow2")  # a volume has one image at a time
    branch = Volume(folder / "branch.qcow2", bytes(volume.data))
    branch.text("branch", 10, 35, 46)
    branched = lineage.take(repository, branch, second, label="an abzweigung: ä branch ⑂")
    branch.text("branch, later", 11)
    lineage.take(repository, branch, branched)
    branch.path.unlink()
    away.rename(volume.path)

    volume.text("third", 7, 20, 21, 22)
    third = lineage.take(repository, volume, second, label="third")
    lineage.delete(repository, first)
    repository.sweep()  # the first pack is mostly dead, and repacked

    volume.resize(4 * 2**20 + 512)
    volume.text("grown", 50, 64)
    volume.noise(4, 51)
    grown = lineage.take(repository, volume, third, label="grown")
    volume.resize(2 * 2**20 + 1024)
    shrunk = lineage.take(repository, volume, grown, label="shrunk")
    volume.noise(5, 12, 5000)
    brief = lineage.take(repository, volume, shrunk)
    volume.text("after", 12)
    last = lineage.take(repository, volume, brief, label="after")
    lineage.delete(repository, brief)
    repository.sweep()  # the pack of `brief` goes
    lineage.delete(repository, third)
    return lineage, volume, last


def on_the_second_host(repository: Repository, lineage: Lineage, volume: Volume, parent: str) -> None:
    """Epoch 1 of vol-1: more than 32 records, deletes before and after the checkpoint."""
    repository.adopt(lineage.name)
    lineage.epoch = 1
    volume.text("adopted", 2, 13)
    parent = lineage.take(repository, volume, parent, label="adopted")
    volume.text("deleted before the checkpoint", 14, 15)
    first = lineage.take(repository, volume, parent)
    volume.text("kept", 14)
    kept = lineage.take(repository, volume, first, label="kept")
    lineage.delete(repository, first)
    for number in range(14):
        empty = lineage.take(repository, volume, kept, label=f"unchanged {number}")
        lineage.delete(repository, empty)
    repository.sweep()
    volume.text("behind the checkpoint", 16, 17, 18)
    behind = lineage.take(repository, volume, kept, label="behind the checkpoint")
    volume.text("the last", 17)
    lineage.take(repository, volume, behind, label="the last")
    lineage.delete(repository, behind)


def other_lineages(repository: Repository, folder: Path) -> list[Lineage]:
    """A small one without a pin, with properties; and a volume that was never written."""
    other, empty = Lineage("Other.volume_2"), Lineage("empty")
    volume = Volume(folder / "other.qcow2", bytes(2 * BLOCK + 512), cluster_size=4096)
    volume.text("other", 0, 2)
    properties = {"colour": "blue", "note": "käse"}
    snapshot = other.take(repository, volume, None, pin=False, properties=properties)
    volume.text("other, again", 0)
    other.take(repository, volume, snapshot, pin=False, label="scanned in full")
    empty.take(repository, Volume(folder / "empty.qcow2", bytes(2**20)), None)
    return [other, empty]


def make(repository: Path, expected: Path) -> None:
    """Make both files of the golden repository, at paths that must not exist."""
    for path in (repository, expected):
        if path.exists():
            raise SystemExit(f"{path} is there, and is never made again")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Small packs, so that a small snapshot has two; their size is no part of the format.
        with (
            mock.patch("island_fast.repository.pack_writer.MAX_SLOTS", 32),
            mock.patch("socket.gethostname", return_value="golden"),
        ):
            with Repository.open(str(repository), state=LocalState(folder / "host1"), create=True) as opened:
                lineage, volume, last = on_the_first_host(opened, folder)
                lineages = [lineage, *other_lineages(opened, folder)]
            with Repository.open(str(repository), state=LocalState(folder / "host2")) as opened:
                on_the_second_host(opened, lineage, volume, last)
                contents = {"id": opened.id} | {
                    "lineages": {one.name: {"epoch": one.epoch, "live": one.live} for one in lineages}
                }
    shutil.rmtree(repository / ".tmp~")
    expected.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    make(REPOSITORY, EXPECTED)
