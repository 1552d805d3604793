"""A volume's first, full snapshot, and restoring it, until all is on disk, against a copy by qemu-img."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from island_fast.bench.case import MIB, Context, Scale, Work
from island_fast.bench.island_command import Island
from island_fast.bench.report import Row
from island_fast.bench.timing import Measured, costs, pairs, row, run
from island_fast.bench.volume import Volume, is_same
from island_fast.errors import DamagedError

__all__ = ["WORKS"]

_PEER = "qemu-img convert and sync"
_NAMES = {"none": "not compressed", "zstd": "zstd"}
_FIRST_REACH = {"none": 1.2, "zstd": 1.6}
_RESTORE_REACH = {"none": 1.2, "zstd": 1.5}
_COPY = 'qemu-img convert -f qcow2 -O qcow2 "$1" "$2" && sync "$2"'


def _volume(context: Context) -> Volume:
    size = context.scale.small
    context.tell(f"making a volume of {size.volume // MIB} MiB with {size} of data")
    return Volume.make(context.scratch, size, context.seed)


def _copy(image: Path, target: Path) -> Callable[[], Measured]:
    """What copies the image with qemu-img, until the copy is on disk."""
    return lambda: run(["sh", "-c", _COPY, "sh", image, target])


def _first(context: Context) -> Iterator[Row]:
    volume = _volume(context)
    copy = context.scratch / "copy.qcow2"
    for compression, reach in _FIRST_REACH.items():
        island = Island(context.scratch / "ours", compression)
        name = f"first snapshot, {_NAMES[compression]}, {volume.size} of data"

        def before(island: Island = island) -> None:
            island("unpin", volume.image)
            island.forget()
            copy.unlink(missing_ok=True)

        def ours(island: Island = island) -> Measured:
            return island("snapshot", volume.image)[0]

        context.tell(name)
        found = pairs(volume.size.pairs, ours, _copy(volume.image, copy), before)
        _check(volume, island, context.scratch / "back.qcow2")
        yield _row(context, name, found, reach)


def _restore(context: Context) -> Iterator[Row]:
    volume = _volume(context)
    copy, back = context.scratch / "copy.qcow2", context.scratch / "back.qcow2"
    for compression, reach in _RESTORE_REACH.items():
        island = Island(context.scratch / compression, compression)
        island("snapshot", volume.image)
        name = f"restore to qcow2, {_NAMES[compression]}, {volume.size} of data"

        def before() -> None:
            if back.exists():
                _compare(volume, back)
            copy.unlink(missing_ok=True)

        def ours(island: Island = island) -> Measured:
            return island("restore", f"{volume.image.stem}@latest", back)[0]

        context.tell(name)
        found = pairs(volume.size.pairs, ours, _copy(volume.image, copy), before)
        before()
        yield _row(context, name, found, reach)


def _row(context: Context, name: str, found: list[tuple[Measured, Measured]], reach: float) -> Row:
    times = [(our.wall, their.wall) for our, their in found]
    notes = [costs(found)]
    return row(name, _PEER, times, better="lower", reach=context.reach(reach), notes=notes)


def _check(volume: Volume, island: Island, target: Path) -> None:
    """Restore what was stored last, and compare it with the volume."""
    island("restore", f"{volume.image.stem}@latest", target)
    _compare(volume, target)


def _compare(volume: Volume, target: Path) -> None:
    """Compare what was restored with the volume, and remove it."""
    if not is_same(target, volume.raw):
        raise DamagedError("what was restored differs from the volume; report this fault")
    target.unlink()


def _space(scale: Scale) -> int:
    """The raw file and the qcow2, two repositories, a copy and what is restored."""
    return 6 * scale.small.allocated


WORKS = (
    Work("first snapshot", _first, ("qemu-img",), _space),
    Work("restore", _restore, ("qemu-img",), _space),
)
