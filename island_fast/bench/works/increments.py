"""An increment of 1 %, from the start of a process until it is durable, and what it stores."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from island_fast.bench.context import MIB, Context, Scale, Size, Work
from island_fast.bench.measuring import Measured, pairs, row
from island_fast.bench.ours import Island
from island_fast.bench.peers.archivers import Borg, Keeper, Restic
from island_fast.bench.results import Counter, Row
from island_fast.bench.volume import Volume, is_same
from island_fast.errors import DamagedError

__all__ = ["WORKS"]

_KEEPERS: dict[str, Callable[[Path], Keeper]] = {"restic": Restic, "borg": Borg}
_REACH = {"small": {"restic": 12, "borg": 9, "cinder": 30}, "large": {"restic": 20, "borg": 15, "cinder": 50}}
_STORED_REACH = 0.75


@dataclass(frozen=True, slots=True)
class _Run:
    """One snapshot or what a peer did instead: its cost, and the bytes it added to its repository."""

    cost: Measured
    stored: int


def _small(context: Context) -> Iterator[Row | Counter]:
    yield from _against_all(context, context.scale.small, _REACH["small"])


def _large(context: Context) -> Iterator[Row | Counter]:
    if context.scale.large:
        yield from _against_all(context, context.scale.large, _REACH["large"])


def _against_all(context: Context, size: Size, reach: dict[str, int]) -> Iterator[Row]:
    """Rows against each peer, on one volume, whose increments go on from peer to peer."""
    context.tell(f"making a volume with {size}")
    volume = Volume.make(context.scratch, size, context.seed)
    island = Island(context.scratch / "ours")
    island("snapshot", volume.image)
    work = f"increment of 1 % of {size.volume // MIB} MiB, {size} allocated"
    edited: list[tuple[float, float]] = []
    for name, make in _KEEPERS.items():
        if context.has(name):
            peer = make(context.scratch / name)
            context.tell(f"{work}, against {name}")
            found = _paired(volume, island, peer)
            yield row(
                work,
                name,
                [(our.cost.wall, their.cost.wall) for our, their in found],
                reach=None if context.quick else reach[name],
            )
            yield row(
                f"bytes stored for it ({size})",
                name,
                [(our.stored / MIB, their.stored / MIB) for our, their in found],
                unit="MiB",
            )
            edited += [(our.stored / MIB, volume.edited / MIB) for our, _ in found]
            if size is context.scale.small:
                _check_peer(volume, peer, context.scratch)
            shutil.rmtree(context.scratch / name)
    if edited:
        yield row(
            f"bytes stored for it ({size})",
            "bytes edited",
            edited,
            unit="MiB",
            better="lower",
            reach=_STORED_REACH,
        )
    _check_ours(volume, island, context.scratch)


def _paired(volume: Volume, island: Island, peer: Keeper) -> Sequence[tuple[_Run, _Run]]:
    """Increments of both on the same states; the peer's first, whole one is taken before."""
    peer.take(volume.raw)

    def ours() -> _Run:
        cost, answer = island("snapshot", volume.image)
        if answer["rule"] != "table-diff":
            raise DamagedError(f"the snapshot was no increment ({answer['reason']}); report this fault")
        return _Run(cost, answer["bytes_stored"])

    def theirs() -> _Run:
        before = peer.stored()
        cost = peer.take(volume.raw)
        return _Run(cost, peer.stored() - before)

    return pairs(volume.size.pairs, ours, theirs, volume.edit)


def _check_ours(volume: Volume, island: Island, scratch: Path) -> None:
    """Restore the last snapshot and compare it with the volume: speed that loses data is none."""
    target = scratch / "back.qcow2"
    island("restore", f"{volume.image.stem}@latest", target)
    if not is_same(target, volume.raw):
        raise DamagedError("what was restored differs from the volume; report this fault")
    target.unlink()


def _check_peer(volume: Volume, peer: Keeper, scratch: Path) -> None:
    """The same for a peer, so that it is known to have done the whole work."""
    target = scratch / "back.raw"
    peer.give_back(volume.raw, target)
    if not is_same(target, volume.raw, ("raw", "raw")):
        raise DamagedError(f"what {peer.name} restored differs from the volume; it is used wrongly here")
    target.unlink()


def _space(size: Size | None) -> int:
    """The qcow2, the raw file, our repository, a peer's and a restored volume."""
    return 5 * size.allocated + size.volume if size else 0


def _small_space(scale: Scale) -> int:
    return _space(scale.small)


def _large_space(scale: Scale) -> int:
    return _space(scale.large)


WORKS = (
    Work("increment, small volume", _small, ("qemu-img",), _small_space),
    Work("increment, large volume", _large, ("qemu-img",), _large_space),
)
