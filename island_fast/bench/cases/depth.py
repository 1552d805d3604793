"""What a long history costs: a restore after many increments, a delete in a long lineage."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from island_fast.api import Repository
from island_fast.bench.case import Case, Context, Scale
from island_fast.bench.counting_store import CountingStore
from island_fast.bench.island_command import Island
from island_fast.bench.report import Counter, Row
from island_fast.bench.swift import run_swift, use_account
from island_fast.bench.synthetic_volume import SyntheticVolume
from island_fast.bench.timing import flush_to_disk, make_row, run_pairs
from island_fast.bench.volume import is_same_disk
from island_fast.errors import DamagedError
from island_fast.repository.local_state import LocalState
from island_fast.stores.directory import DirectoryStore
from island_fast.stores.swift import SwiftStore

__all__ = ["CASES"]

BLOCK = 65536
_INCREMENTS, _QUICK_INCREMENTS = 100, 20
_LONG, _QUICK_LONG, _SHORT = 200, 31, 3


def _measure_restores(context: Context) -> Iterator[Row | Counter]:
    size = context.scale.small
    increments = _QUICK_INCREMENTS if context.quick else _INCREMENTS
    blocks = size.allocated // BLOCK
    deep, flat = Island(context.scratch / "deep"), Island(context.scratch / "flat")
    context.show_progress(f"taking {increments} increments")
    volume = SyntheticVolume(context.scratch / "vol.qcow2", blocks, context.seed)
    with _open_repository(deep.folder) as repository:
        volume.snapshot(repository)
        for _ in range(increments):
            volume.edit(blocks // 100)
            volume.snapshot(repository)
    with _open_repository(flat.folder) as repository:
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

    context.show_progress("restores")
    found = run_pairs(size.pairs, restore(0, deep), restore(1, flat), lambda: flush_to_disk(context.scratch))
    if not is_same_disk(targets[0], targets[1], ("qcow2", "qcow2")):
        raise DamagedError("the restores differ; report this fault")
    work = f"restore of {size} after {increments} increments of 1 %"
    yield make_row(
        work,
        "the same state in one full snapshot",
        found,
        better="lower",
        reach=context.target_unless_quick(1.15),
    )
    yield Counter(f"bytes read for it ({size}), of those of one full snapshot", read[0] / read[1], reach=1.05)


def _open_repository(folder: Path) -> Repository:
    return Repository.open(str(folder / "repository"), state=LocalState(folder / "state"), create=True)


def _count_restores_from_swift(context: Context) -> Iterator[Row | Counter]:
    size = context.scale.small
    increments = _QUICK_INCREMENTS if context.quick else _INCREMENTS
    blocks = size.allocated // BLOCK
    volume = SyntheticVolume(context.scratch / "vol.qcow2", blocks, context.seed)
    with run_swift("bench") as account, use_account(account):
        context.show_progress(f"sending {increments} increments to Swift")
        deep = _open_in_swift("bench/deep", context.scratch / "state")
        volume.snapshot(deep)
        for _ in range(increments):
            volume.edit(blocks // 100)
            volume.snapshot(deep)
        flat = _open_in_swift("bench/flat", context.scratch / "state")
        volume.snapshot(flat)
        context.show_progress("restores from Swift")
        requests, packs, read = _count_restore(deep, context.scratch / "deep.qcow2")
        _, _, whole = _count_restore(flat, context.scratch / "flat.qcow2")
    work = f"restore of {size} from Swift after {increments} increments"
    notes = (f"{requests} requests, {packs} packs",)
    yield Counter(f"{work}: requests more than live packs", requests - packs, reach=3, notes=notes)
    yield Counter(f"{work}: bytes, of those of one full snapshot", read / whole, reach=1.1)


def _count_restore(repository: Repository, target: Path) -> tuple[int, int, int]:
    """Restore, and return the requests, the packs that the snapshot needs, and the bytes read."""
    with repository:
        found = repository.find("vol@latest")
        packs = len(found.lineage.manifest(found.row).packs)
        store = repository.store
        assert isinstance(store, CountingStore)
        store.requests = 0
        restored = repository.restore("vol@latest", target)
        return store.requests, packs, restored.bytes_read


def _open_in_swift(path: str, state: Path) -> Repository:
    return Repository(CountingStore(SwiftStore.open(path)), LocalState(state), create=True)


def _count_deletes(context: Context) -> Iterator[Row | Counter]:
    length = _QUICK_LONG if context.quick else _LONG
    context.show_progress(f"deleting in lineages of {_SHORT} and {length}")
    short = _count_delete_requests(context.scratch / "short", _SHORT, context.seed)
    long = _count_delete_requests(context.scratch / "long", length, context.seed)
    bound = 2 * math.log2(length) + 34
    work = f"requests of a delete in a lineage of {length}, more than in one of {_SHORT}"
    yield Counter(work, long[0] - short[0], reach=0, notes=(f"{short[0]} requests",))
    yield Counter("the same without local state", long[1] - short[1], reach=bound)
    yield Counter("the same, with listings that show nothing yet", long[2] - short[1], reach=bound)


def _count_delete_requests(folder: Path, length: int, seed: int) -> tuple[int, int, int]:
    """Return how many requests it takes to delete the last but one of `length` snapshots.

    The three numbers are with warm local state, with none, and with none and late listings. The files below
    `folder` are not removed.
    """
    counts = []
    volume = SyntheticVolume(folder / "vol.qcow2", 32, seed)
    home, place = folder / "state", folder / "repository"
    with Repository.open(str(place), state=LocalState(home), create=True) as repository:
        taken = []
        for _ in range(length):
            taken.append(volume.snapshot(repository).snapshot)
            volume.edit(1)
    for name, late in (("warm", False), ("cold", False), ("late", True)):
        state, copy = home, folder / f"{name}-repository"
        shutil.copytree(place, copy)
        if name != "warm":
            state = folder / f"{name}-state"
            state.mkdir()
            shutil.copy(home / "writer", state)
        store = CountingStore(DirectoryStore(str(copy)), late=late)
        with Repository(store, LocalState(state)) as repository:
            store.requests = 0
            repository.delete([f"vol@{taken[-2]}"])
            counts.append(store.requests)
    return counts[0], counts[1], counts[2]


def _space(scale: Scale) -> int:
    return 6 * scale.small.allocated


CASES = (
    Case("restore after many increments", _measure_restores, ("qemu-img",), _space),
    Case("restore from Swift after many increments", _count_restores_from_swift, (), _space, swift=True),
    Case("delete in a long lineage", _count_deletes, (), lambda scale: 1 << 29),
)
