"""Images as qemu makes them: every feature that is read, and every pair of features that go together.

`RECIPES` names them, `make` makes one and says what is in it, at every point, as qemu reads it.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import qemu

AXES: dict[str, tuple[object, ...]] = {
    "cluster": (512, 4096, 16384, 65536, 262144, 2 << 20),
    "kind": ("v3", "v2", "lazy", "dirty", "corrupt", "bitmaps"),
    "refcount": (16, 1, 2, 4, 64),
    "tables": ("standard", "extended"),
    "compression": ("zlib", "zstd"),
    "preallocation": ("off", "metadata", "falloc", "full"),
    "size": ("even", "odd"),
    "past": ("plain", "snapshots", "reverted", "grown", "shrunk", "packed"),
}
LEAST = 110
_SNAPSHOT_PASTS = ("snapshots", "reverted", "grown", "shrunk")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One image: a value for each axis."""

    number: int
    choices: dict[str, object] = field(hash=False)

    @property
    def name(self) -> str:
        return f"{self.number:03}-" + "-".join(str(value) for value in self.choices.values())


@dataclass(frozen=True, slots=True)
class Made:
    """An image and its truth: the volume's bytes by internal snapshot name, None for the volume now."""

    path: Path
    contents: dict[str | None, bytes]


def possible(choices: dict[str, object]) -> bool:
    """Whether qemu makes such an image."""
    kind, past = choices["kind"], choices["past"]
    if kind == "v2" and (
        (choices["refcount"], choices["tables"], choices["compression"]) != (16, "standard", "zlib")
        or past in ("grown", "shrunk")
    ):
        return False
    if choices["tables"] == "extended" and choices["cluster"] in (512, 4096):
        return False
    if past in _SNAPSHOT_PASTS and choices["refcount"] == 1:
        return False
    if past == "reverted" and choices["refcount"] == 2:
        return False
    # convert -c goes together with no preallocation.
    return past != "packed" or choices["preallocation"] == "off"


def _recipes() -> list[Recipe]:
    """Rows that hold every possible pair of values of two axes; then others until there are enough."""
    chance = random.Random(1)
    missing = {
        frozenset([(one, a), (other, b)])
        for one, other in itertools.combinations(AXES, 2)
        for a in AXES[one]
        for b in AXES[other]
    }
    rows: list[dict[str, object]] = []
    while missing or len(rows) < LEAST:
        want = dict(min(missing, key=lambda pair: sorted(map(repr, pair)))) if missing else {}
        tries = [{axis: chance.choice(values) for axis, values in AXES.items()} | want for _ in range(300)]
        tries = [row for row in tries if possible(row)]
        if not tries:
            missing.discard(frozenset(want.items()))
            continue
        row = max(tries, key=lambda row: len(missing & _pairs(row)))
        missing -= _pairs(row)
        rows.append(row)
    return [Recipe(number, row) for number, row in enumerate(rows)]


def _pairs(row: dict[str, object]) -> set[frozenset[tuple[str, object]]]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


RECIPES = _recipes()


def make(recipe: Recipe, folder: Path) -> Made:
    """Make the image in `folder`; the same recipe gives the same content."""
    choices, chance = recipe.choices, random.Random(recipe.number)
    cluster = int(str(choices["cluster"]))
    size = max(1 << 20, 4 * cluster) + (1536 if choices["size"] == "odd" else 0)
    path = folder / f"{recipe.name}.qcow2"
    qemu.create(path, size, **_options(choices))
    names: list[str | None] = [None]
    # Reference counts of 2 bits count to 3, and going back to a snapshot adds one for a moment.
    snapshots = 1 if choices["refcount"] == 2 else 2
    for number in range(snapshots if choices["past"] in _SNAPSHOT_PASTS else 0):
        _live(path, chance, size, cluster)
        names.append(f"s{number}")
        qemu.snapshot_create(path, f"s{number}")
        if choices["past"] in ("grown", "shrunk"):
            size = size * 2 + 512 if choices["past"] == "grown" else size // 2 // 512 * 512
            qemu.resize(path, size)
    if choices["past"] == "reverted":
        qemu.snapshot_apply(path, "s0")
    _live(path, chance, size, cluster)
    if choices["past"] == "packed":
        packed = folder / f"{recipe.name}.packed"
        qemu.convert(path, packed, compress=True, **_options(choices))
        packed.rename(path)
    # A reverting copy is refused once there are bitmaps, so the truth is asked for before.
    contents = {name: qemu.content(path, name) for name in names}
    _mark(path, str(choices["kind"]))
    return Made(path, contents)


def _options(choices: dict[str, object]) -> dict[str, object]:
    """For qemu-img create."""
    options = {"cluster_size": choices["cluster"], "preallocation": choices["preallocation"]}
    if choices["kind"] == "v2":
        return options | {"compat": "0.10"}
    options |= {"refcount_bits": choices["refcount"], "compression_type": choices["compression"]}
    options |= {"extended_l2": "on" if choices["tables"] == "extended" else "off"}
    return options | {"lazy_refcounts": "on" if choices["kind"] in ("lazy", "dirty") else "off"}


def _live(path: Path, chance: random.Random, size: int, cluster: int) -> None:
    """Writes, zeros of both kinds and discards, aligned and not; then a compressed write by itself."""
    commands = []
    for make_command in (qemu.write, qemu.write, qemu.write, qemu.zeroes, qemu.zeroes, qemu.discard):
        step = chance.choice((512, cluster))
        offset = chance.randrange(size // step) * step
        length = min(size - offset, max(step, chance.randrange(150 << 10) // step * step))
        extra: dict[str, object] = {}
        if make_command is qemu.write:
            extra = {"pattern": chance.randrange(1, 256)}
        elif make_command is qemu.zeroes:
            extra = {"unmap": chance.random() < 0.5}
        commands.append(make_command(offset, length, **extra))
    offset = chance.randrange(size // cluster) * cluster
    qemu.io(path, *commands, qemu.discard(offset, cluster))
    qemu.io(path, qemu.write(offset, cluster, chance.randrange(1, 256), compressed=True))


def _mark(path: Path, kind: str) -> None:
    """What is not done by writing: bits of the header, bitmaps."""
    if kind == "bitmaps":
        qemu.run(qemu.QEMU_IMG, "bitmap", "--add", "-f", "qcow2", path, "recording")
        qemu.run(qemu.QEMU_IMG, "bitmap", "--add", "--disable", "-f", "qcow2", path, "disabled")
    bit = {"dirty": 1, "corrupt": 2}.get(kind, 0)
    if bit:
        with open(path, "r+b") as file:
            file.seek(79)
            flags = file.read(1)[0]
            file.seek(79)
            file.write(bytes([flags | bit]))
