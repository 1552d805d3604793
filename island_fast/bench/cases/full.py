"""The first, full snapshot of a volume, and its restore, until all is on disk, against a copy by qemu-img."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from island_fast.bench.case import MIB, Case, Context, Scale
from island_fast.bench.island_command import Island
from island_fast.bench.report import Row
from island_fast.bench.timing import Measurement, describe_costs, make_row, run, run_pairs
from island_fast.bench.volume import Volume, is_same_disk
from island_fast.errors import DamagedError

__all__ = ["CASES"]

_PEER = "qemu-img convert and sync"
_NAMES = {"none": "not compressed", "zstd": "zstd"}
_FIRST_REACH = {"none": 1.2, "zstd": 1.6}
_RESTORE_REACH = {"none": 1.2, "zstd": 1.5}
_COPY = 'qemu-img convert -f qcow2 -O qcow2 "$1" "$2" && sync "$2"'


def _make_volume(context: Context) -> Volume:
    size = context.scale.small
    context.show_progress(f"making a volume of {size.volume // MIB} MiB with {size} of data")
    return Volume.make(context.scratch, size, context.seed)


def _make_copier(image: Path, target: Path) -> Callable[[], Measurement]:
    """Return a function that copies the image with qemu-img, until the copy is on disk."""
    return lambda: run(["sh", "-c", _COPY, "sh", image, target])


def _measure_first(context: Context) -> Iterator[Row]:
    volume = _make_volume(context)
    copy = context.scratch / "copy.qcow2"
    for compression, reach in _FIRST_REACH.items():
        island = Island(context.scratch / "ours", compression)
        name = f"first snapshot, {_NAMES[compression]}, {volume.size} of data"

        def before(island: Island = island) -> None:
            island("unpin", volume.image)
            island.remove()
            copy.unlink(missing_ok=True)

        def ours(island: Island = island) -> Measurement:
            return island("snapshot", volume.image)[0]

        context.show_progress(name)
        found = run_pairs(volume.size.pairs, ours, _make_copier(volume.image, copy), before)
        back = context.scratch / "back.qcow2"
        island("restore", f"{volume.image.stem}@latest", back)
        _compare(volume, back)
        yield _make_copy_row(context, name, found, reach)


def _measure_restore(context: Context) -> Iterator[Row]:
    volume = _make_volume(context)
    copy, back = context.scratch / "copy.qcow2", context.scratch / "back.qcow2"
    for compression, reach in _RESTORE_REACH.items():
        island = Island(context.scratch / compression, compression)
        island("snapshot", volume.image)
        name = f"restore to qcow2, {_NAMES[compression]}, {volume.size} of data"

        def before() -> None:
            if back.exists():
                _compare(volume, back)
            copy.unlink(missing_ok=True)

        def ours(island: Island = island) -> Measurement:
            return island("restore", f"{volume.image.stem}@latest", back)[0]

        context.show_progress(name)
        found = run_pairs(volume.size.pairs, ours, _make_copier(volume.image, copy), before)
        before()
        yield _make_copy_row(context, name, found, reach)


def _make_copy_row(
    context: Context, name: str, found: list[tuple[Measurement, Measurement]], reach: float
) -> Row:
    times = [(our.wall, their.wall) for our, their in found]
    notes = [describe_costs(found)]
    return make_row(name, _PEER, times, better="lower", reach=context.target_unless_quick(reach), notes=notes)


def _compare(volume: Volume, target: Path) -> None:
    """Compare a restored image with the volume, and remove it. Raises DamagedError if they differ."""
    if not is_same_disk(target, volume.raw):
        raise DamagedError("the restored image differs from the volume; report this fault")
    target.unlink()


def _space(scale: Scale) -> int:
    """Return the bytes of the raw file, the qcow2, two repositories, a copy, and a restored image."""
    return 6 * scale.small.allocated


CASES = (
    Case("first snapshot", _measure_first, ("qemu-img",), _space),
    Case("restore", _measure_restore, ("qemu-img",), _space),
)
