"""First snapshot and restore against restic and Borg, and all of it with delay between a tool and its store.

With delay, island and restic use the same Swift. Borg has no Swift: Borg 1 uses `borg serve`, and Borg 2 its
own REST server, whose files are where Swift's are.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from island_fast.bench.case import MIB, Case, Context, Scale
from island_fast.bench.island_command import Island
from island_fast.bench.peers.archivers import Archiver, Borg, Borg2, Restic
from island_fast.bench.peers.servers import serve_borg, serve_rest
from island_fast.bench.report import Row
from island_fast.bench.slow_link import slow_link
from island_fast.bench.swift import Account, find_folder_in_memory, run_swift, use_account
from island_fast.bench.timing import (
    Measurement,
    describe_costs,
    flush_to_disk,
    make_row,
    run,
    run_pairs,
    warm_page_cache,
)
from island_fast.bench.volume import Volume, is_same_disk
from island_fast.errors import DamagedError

__all__ = ["CASES"]

_PEERS = ("restic", "borg", "borg2")
_ROUND_TRIPS = (0.01, 0.05)
_MOST_PAIRS = 3  # with delay
_REACH = 2.0
_CONTAINER, _RESTICS_CONTAINER = "bench", "restic"

Make = Callable[[Path], Archiver]


@dataclass(slots=True)
class _Match:
    """island and one peer on one volume. Each first snapshot begins with two new repositories.

    Making them is not timed: that of island is made by a snapshot of another, empty volume.

    `make` makes the peer for a folder; `clear` empties the stores of both if they are not in that folder and
    in island's. `where` says in the names of rows where the stores are.
    """

    context: Context
    volume: Volume
    island: Island
    make: Make
    clear: Callable[[], None]
    where: str
    pairs: int
    peer: Archiver | None = None

    def measure(self, *, increments: bool) -> Iterator[Row]:
        """Yield the rows of the first snapshot, of increments if asked for, and of restores."""
        volume = self.volume
        try:
            found = run_pairs(self.pairs, self._take_snapshot, self._back_up, self._begin)
            yield self._make_row("first snapshot, zstd", found, _REACH)
            if increments:
                found = run_pairs(self.pairs, self._take_snapshot, self._back_up, self._edit)
                yield self._make_row("increment of 1 %", found, None)
            targets = [self.context.scratch / name for name in ("ours.raw", "theirs.raw")]
            found = run_pairs(
                self.pairs,
                lambda: self._check(targets[0], self._restore_ours(targets[0])),
                lambda: self._check(targets[1], self._restore_theirs(targets[1])),
            )
            yield self._make_row("restore to raw", found, _REACH)
        finally:
            self._end()
            self.island("unpin", volume.image)

    def _begin(self) -> None:
        """Begin again with new repositories."""
        self._end()
        self.island("unpin", self.volume.image)
        self.island.remove()
        self.clear()
        empty = self.context.scratch / "empty.qcow2"
        if not empty.exists():
            run(["qemu-img", "create", "-q", "-f", "qcow2", empty, "1M"])
        self.island("snapshot", empty, "--no-pin")
        self.peer = self.make(self._folder)
        self.peer.prepare()
        warm_page_cache(self.volume.raw)

    def _end(self) -> None:
        if self.peer:
            self.peer.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _edit(self) -> None:
        self.volume.edit()
        warm_page_cache(self.volume.raw)

    @property
    def _folder(self) -> Path:
        return self.context.scratch / "theirs"

    def _take_snapshot(self) -> Measurement:
        return self.island("snapshot", self.volume.image)[0]

    def _back_up(self) -> Measurement:
        assert self.peer
        cost = self.peer.back_up(self.volume.raw)
        flush_to_disk(self._folder)  # or the next flush of island would wait for it
        return cost

    def _restore_ours(self, target: Path) -> Measurement:
        latest = f"{self.volume.image.stem}@latest"
        return self.island("restore", latest, target, "--format", "raw")[0]

    def _restore_theirs(self, target: Path) -> Measurement:
        assert self.peer
        return self.peer.restore(self.volume.raw, target)

    def _check(self, target: Path, cost: Measurement) -> Measurement:
        """Compare a restored file with the volume, and remove it. Raises DamagedError if they differ."""
        if not is_same_disk(target, self.volume.raw, ("raw", "raw")):
            raise DamagedError(f"the restored {target.name} differs from the volume; report this fault")
        target.unlink()
        return cost

    def _make_row(self, work: str, found: list[tuple[Measurement, Measurement]], reach: float | None) -> Row:
        assert self.peer
        name = f"{work}, {self.volume.size} of data{self.where}"
        times = [(our.wall, their.wall) for our, their in found]
        reach = self.context.target_unless_quick(reach) if reach else None
        return make_row(name, self.peer.name, times, reach=reach, notes=[describe_costs(found)])


def _make_volume(context: Context) -> Volume:
    size = context.scale.small
    context.show_progress(f"making a volume of {size.volume // MIB} MiB with {size} of data")
    return Volume.make(context.scratch, size, context.seed)


def _measure_near(context: Context) -> Iterator[Row]:
    """Yield the rows with all repositories in folders."""
    volume = _make_volume(context)
    kinds: dict[str, Callable[..., Archiver]] = {"restic": Restic, "borg": Borg, "borg2": Borg2}
    for name in filter(context.has_peer, _PEERS):
        context.show_progress(f"first snapshot and restore, against {name}")
        make = functools.partial(kinds[name], program=context.peers[name].program)
        island = Island(context.scratch / "ours")
        match = _Match(context, volume, island, make, lambda: None, "", volume.size.pairs)
        yield from match.measure(increments=False)
        island.remove()


def _measure_far(context: Context, round_trip: float) -> Iterator[Row]:
    """Yield the rows with a round trip of so many seconds to the stores."""
    volume = _make_volume(context)
    where = f", {round_trip * 1000:.0f} ms to the store"
    pairs = min(volume.size.pairs, _MOST_PAIRS)
    for name in filter(context.has_peer, _PEERS):
        context.show_progress(f"first snapshot, increment and restore{where}, against {name}")
        with (
            run_swift(_CONTAINER) as account,
            slow_link(account.port, round_trip) as port,
            use_account(account.through(port)),
            _reach_far(name, context.peers[name].program, account, round_trip) as (make, clear),
        ):
            island = Island(context.scratch / "ours", location=f"swift://{_CONTAINER}/ours")

            def clear_both(clear: Callable[[], None] = clear, account: Account = account) -> None:
                account.remove_objects(_CONTAINER)
                clear()

            match = _Match(context, volume, island, make, clear_both, where, pairs)
            yield from match.measure(increments=True)
            island.remove()


@contextlib.contextmanager
def _reach_far(
    name: str, program: str, account: Account, round_trip: float
) -> Iterator[tuple[Make, Callable[[], None]]]:
    """Yield what makes the peer with a store that is so far away, and what empties that store."""
    if name == "restic":
        location = f"swift:{_RESTICS_CONTAINER}:/"
        yield (
            lambda folder: Restic(folder, program, location),
            lambda: account.remove_objects(_RESTICS_CONTAINER),
        )
        return
    with tempfile.TemporaryDirectory(prefix="island-bench-", dir=find_folder_in_memory()) as made:
        store = Path(made) / "store"
        store.mkdir()
        serve = serve_borg(program) if name == "borg" else serve_rest(store)
        with serve as near, slow_link(near, round_trip) as port:

            def make(folder: Path) -> Archiver:
                if name == "borg":
                    return Borg(folder, program, path=store / "repository", port=port)
                return Borg2(folder, program, location=f"http://127.0.0.1:{port}/")

            def clear() -> None:
                for path in store.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

            yield make, clear


def _space(scale: Scale) -> int:
    """Return the bytes of the qcow2 and the raw file, a restored one, and two repositories."""
    return 5 * scale.small.allocated


CASES = (
    Case("first snapshot and restore, against archivers", _measure_near, ("qemu-img",), _space),
    *(
        Case(
            f"{round_trip * 1000:.0f} ms to the store",
            functools.partial(_measure_far, round_trip=round_trip),
            ("qemu-img",),
            _space,
            swift=True,
        )
        for round_trip in _ROUND_TRIPS
    ),
)
