"""What depth costs: a restore after many increments, a delete in a long lineage."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from island_fast.api import Repository
from island_fast.bench.case import Context, Scale, Work
from island_fast.bench.counting_store import Counting
from island_fast.bench.island_command import Island
from island_fast.bench.report import Counter, Row
from island_fast.bench.swift import serving, signed_in
from island_fast.bench.synthetic_volume import EditedVolume
from island_fast.bench.timing import pairs, row, until_on_disk
from island_fast.bench.volume import is_same
from island_fast.errors import DamagedError
from island_fast.repository.local_state import LocalState
from island_fast.stores.directory import DirectoryStore
from island_fast.stores.swift import SwiftStore

__all__ = ["WORKS"]

BLOCK = 65536
_INCREMENTS, _QUICK_INCREMENTS = 100, 20
_LONG, _QUICK_LONG, _SHORT = 200, 31, 3


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


def _restores_from_swift(context: Context) -> Iterator[Row | Counter]:
    size = context.scale.small
    increments = _QUICK_INCREMENTS if context.quick else _INCREMENTS
    blocks = size.allocated // BLOCK
    volume = EditedVolume(context.scratch / "vol.qcow2", blocks, context.seed)
    with serving("bench") as account, signed_in(account):
        context.tell(f"sending {increments} increments to Swift")
        deep = _of_swift("bench/deep", context.scratch / "state")
        volume.snapshot(deep)
        for _ in range(increments):
            volume.edit(blocks // 100)
            volume.snapshot(deep)
        flat = _of_swift("bench/flat", context.scratch / "state")
        volume.snapshot(flat)
        context.tell("restores from Swift")
        requests, packs, read = _counted(deep, context.scratch / "deep.qcow2")
        _, _, whole = _counted(flat, context.scratch / "flat.qcow2")
    work = f"restore of {size} from Swift after {increments} increments"
    noted = (f"{requests} requests, {packs} packs",)
    yield Counter(f"{work}: requests more than live packs", requests - packs, reach=3, notes=noted)
    yield Counter(f"{work}: bytes, of those of one full snapshot", read / whole, reach=1.1)


def _counted(repository: Repository, target: Path) -> tuple[int, int, int]:
    """Requests of a restore, packs that it needs, and bytes that it reads."""
    with repository:
        found = repository.find("vol@latest")
        packs = len(found.lineage.manifest(found.row).packs)
        store = repository.store
        assert isinstance(store, Counting)
        store.requests = 0
        restored = repository.restore("vol@latest", target)
        return store.requests, packs, restored.bytes_read


def _of_swift(path: str, state: Path) -> Repository:
    return Repository(Counting(SwiftStore.open(path)), LocalState(state), create=True)


def _deletes(context: Context) -> Iterator[Row | Counter]:
    length = _QUICK_LONG if context.quick else _LONG
    context.tell(f"deleting in lineages of {_SHORT} and {length}")
    short = _delete_requests(context.scratch / "short", _SHORT, context.seed)
    long = _delete_requests(context.scratch / "long", length, context.seed)
    bound = 2 * math.log2(length) + 34
    work = f"requests of a delete in a lineage of {length}, more than in one of {_SHORT}"
    yield Counter(work, long[0] - short[0], reach=0, notes=(f"{short[0]} requests",))
    yield Counter("the same without local state", long[1] - short[1], reach=bound)
    yield Counter("the same, with listings that show nothing yet", long[2] - short[1], reach=bound)


def _delete_requests(folder: Path, length: int, seed: int) -> tuple[int, int, int]:
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
        store = Counting(DirectoryStore(str(copy)), late=late)
        with Repository(store, LocalState(state)) as repository:
            store.requests = 0
            repository.delete([f"vol@{taken[-2]}"])
            counts.append(store.requests)
    return counts[0], counts[1], counts[2]


def _space(scale: Scale) -> int:
    return 6 * scale.small.allocated


WORKS = (
    Work("restore after many increments", _restores, ("qemu-img",), _space),
    Work("restore from Swift after many increments", _restores_from_swift, (), _space, swift=True),
    Work("delete in a long lineage", _deletes, (), lambda scale: 1 << 29),
)
