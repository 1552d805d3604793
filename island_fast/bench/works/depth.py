"""What depth costs: a restore after many increments, a delete in a long lineage."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from island_fast.bench.context import Context, Scale, Work
from island_fast.bench.edited import EditedVolume
from island_fast.bench.measuring import pairs, row, until_on_disk
from island_fast.bench.ours import Island
from island_fast.bench.results import Counter, Row
from island_fast.bench.volume import is_same
from island_fast.errors import DamagedError
from island_fast.local import LocalState
from island_fast.repository import Repository
from island_fast.stores.base import ObjectInfo, Range, Views
from island_fast.stores.directory import DirectoryStore

__all__ = ["WORKS", "CountingDirectory", "delete_requests"]

BLOCK = 65536
_INCREMENTS, _QUICK_INCREMENTS = 100, 20
_LONG, _SHORT = 200, 3


def _restores(context: Context) -> Iterator[Row | Counter]:
    size = context.scale.small
    increments = _QUICK_INCREMENTS if context.quick else _INCREMENTS
    blocks = size.allocated // BLOCK
    deep, flat = Island(context.scratch / "deep"), Island(context.scratch / "flat")
    context.tell(f"taking {increments} increments")
    volume = EditedVolume(context.scratch / "vol.qcow2", blocks, context.seed)
    with _opened(deep.folder) as repository:
        volume.snapshot(repository)
        for _ in range(increments):
            volume.edit(blocks // 100)
            volume.snapshot(repository)
    with _opened(flat.folder) as repository:
        volume.snapshot(repository)
    targets = [context.scratch / "deep.qcow2", context.scratch / "flat.qcow2"]
    read: list[int] = [0, 0]

    def restore(which: int, island: Island) -> Callable[[], float]:
        def work() -> float:
            targets[which].unlink(missing_ok=True)
            shutil.rmtree(island.folder / "state", ignore_errors=True)
            cost, answer = island("restore", "vol@latest", targets[which])
            read[which] = answer["bytes_read"]
            return cost.wall

        return work

    context.tell("restores")
    found = pairs(size.pairs, restore(0, deep), restore(1, flat), lambda: until_on_disk(context.scratch))
    if not is_same(targets[0], targets[1], ("qcow2", "qcow2")):
        raise DamagedError("the restores differ; report this fault")
    work = f"restore of {size} after {increments} increments of 1 %"
    reach = None if context.quick else 1.15
    yield row(work, "the same state in one full snapshot", found, better="lower", reach=reach)
    yield Counter(f"bytes read for it ({size}), of those of one full snapshot", read[0] / read[1], reach=1.05)


def _opened(folder: Path) -> Repository:
    return Repository.open(str(folder / "repository"), state=LocalState(folder / "state"), create=True)


class CountingDirectory(DirectoryStore):
    """Counts what it is asked. With `late`, its listings show nothing."""

    requests = 0
    late = False

    def put(self, name: str, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """See Store.put."""
        self.requests += 1
        super().put(name, parts)

    def get(self, name: str, *, newest: bool = False) -> memoryview:
        """See Store.get."""
        self.requests += 1
        return super().get(name, newest=newest)

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> Views:
        """See Store.get_ranges."""
        self.requests += 1
        return super().get_ranges(name, ranges)

    def head(self, name: str) -> ObjectInfo | None:
        """See Store.head."""
        self.requests += 1
        return super().head(name)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store.list."""
        self.requests += 1
        return iter(()) if self.late else super().list(prefix)


def _deletes(context: Context) -> Iterator[Row | Counter]:
    context.tell(f"deleting in lineages of {_SHORT} and {_LONG}")
    short = delete_requests(context.scratch / "short", _SHORT, context.seed)
    long = delete_requests(context.scratch / "long", _LONG, context.seed)
    bound = 2 * math.log2(_LONG) + 34
    yield Counter(
        f"requests of a delete in a lineage of {_LONG}, more than in one of {_SHORT}", long[0] - short[0],
        reach=0, notes=(f"{short[0]} requests",),
    )  # fmt: skip
    yield Counter("the same without local state", long[1] - short[1], reach=bound)
    yield Counter("the same, with listings that show nothing yet", long[2] - short[1], reach=bound)


def delete_requests(folder: Path, length: int, seed: int) -> tuple[int, int, int]:
    """Requests that the delete of the last but one of `length` snapshots makes.

    With warm local state; with none; with none and late listings. What is below `folder` is left there.
    """
    counts = []
    volume = EditedVolume(folder / "vol.qcow2", 32, seed)
    home, place = folder / "state", folder / "repository"
    with Repository.open(str(place), state=LocalState(home), create=True) as repository:
        taken = []
        for _ in range(length):
            taken.append(volume.snapshot(repository).snapshot)
            volume.edit(1)
    for name, late in (("warm", False), ("cold", False), ("late", True)):
        state, copy = folder / f"{name}-state", folder / f"{name}-repository"
        shutil.copytree(place, copy)
        if name == "warm":
            shutil.copytree(home, state)
        else:
            state.mkdir()
            shutil.copy(home / "writer", state)
        with contextlib.closing(CountingDirectory(str(copy))) as store:
            repository = Repository(store, LocalState(state))
            store.requests, store.late = 0, late
            repository.delete([f"vol@{taken[-2]}"])
            counts.append(store.requests)
    return counts[0], counts[1], counts[2]


def _space(scale: Scale) -> int:
    return 6 * scale.small.allocated


WORKS = (
    Work("restore after many increments", _restores, ("qemu-img",), _space),
    Work("delete in a long lineage", _deletes, (), lambda scale: 1 << 29),
)
