"""Random lives of a volume, against a model that holds its bytes.

The model is a bytearray per point in time and knows nothing of qcow2 or of our formats. Every live snapshot
must restore to exactly its bytes, and the candidates of every snapshot must contain every block that really
changed since its parent. A failure prints its seed: HISTORY_SEED=n runs that one life again.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from island_fast.api import Repository
from island_fast.images.qcow2_source import Qcow2Source
from island_fast.images.source import TABLE_DIFF, Change
from island_fast.repository.local_state import LocalState
from island_fast.stores.base import Store
from tests.conftest import OpenSwift
from tests.support import qemu

BLOCK = 65536
LIVES = [int(os.environ["HISTORY_SEED"])] if "HISTORY_SEED" in os.environ else range(8)


class Life:
    """One volume, its model, and the snapshots that should be there."""

    def __init__(self, seed: int, store: Store, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        work.mkdir()
        self.draw = random.Random(seed)
        self.work = work
        self.repository = Repository(store, LocalState(work / "state"), create=True)
        self.clusters = self.draw.choice([4096, 65536, 65536, 262144])
        size = self.draw.randrange(1, 120) * BLOCK + self.draw.choice([0, 512, 4096, 65024])
        self.bytes = bytearray(size)
        self.image = work / "volume.qcow2"
        extended = "on" if self.clusters >= 16384 and self.draw.random() < 0.3 else "off"
        qemu.create(self.image, size, cluster_size=self.clusters, lazy_refcounts="on", extended_l2=extended)
        self.truth: dict[str, bytes] = {}
        self.times_back = 0
        self.rules: list[str] = []
        self.changes: list[Change] = []
        real = Qcow2Source.find_change

        def spied(source: Qcow2Source, *args: object, **named: object) -> Change:
            self.changes.append(real(source, *args, **named))  # type: ignore[arg-type]
            return self.changes[-1]

        monkeypatch.setattr(Qcow2Source, "find_change", spied)

    # What a guest does.

    def span(self, unit: int = 512) -> tuple[int, int]:
        units = len(self.bytes) // unit
        if not units:
            return 0, 0
        first = self.draw.randrange(units)
        return first * unit, self.draw.randrange(1, min(units - first, (3 << 20) // unit) + 1) * unit

    def write(self) -> None:
        at, length = self.span()
        pattern = self.draw.randrange(256)
        qemu.io(self.image, f"write -P {pattern} {at} {length}")
        self.bytes[at : at + length] = bytes([pattern]) * length

    def write_zeroes(self) -> None:
        at, length = self.span()
        qemu.io(self.image, f"write -z {at} {length}")
        self.bytes[at : at + length] = bytes(length)

    def discard(self) -> None:
        at, length = self.span(max(self.clusters, BLOCK))
        if length:
            qemu.io(self.image, f"discard {at} {length}")
            self.bytes[at : at + length] = bytes(length)

    def rewrite(self) -> None:
        """The same bytes again: a candidate, and no change."""
        at, length = self.span()
        place = self.work / "same"
        place.write_bytes(self.bytes[at : at + length])
        qemu.io(self.image, f"write -s {place} {at} {length}")

    def resize(self) -> None:
        size = max(512, len(self.bytes) + self.draw.randrange(-20, 30) * 32768 // 512 * 512)
        shrink = ["--shrink"] if size < len(self.bytes) else []
        qemu.run("qemu-img", "resize", "-q", "-f", "qcow2", *shrink, self.image, size)
        end = len(self.bytes)
        self.bytes = self.bytes[:size] + bytearray(max(0, size - end))
        tail = min(-end % self.clusters, size - end)
        if tail > 0:  # qemu 7.2 shows a shrunk volume's old bytes again when it grows within a cluster
            qemu.io(self.image, f"write -P 0 {end} {tail}")

    # What an operator does.

    def snapshot(self) -> None:
        full = self.draw.random() < 0.1
        taken = self.repository.snapshot(
            self.image, volume=self.repository.lineage("volume").name, full=full, label="x"
        )
        self.check_candidates(taken.parent, self.changes.pop())
        assert all("is the image of volume" in note for note in taken.notes), "it was moved: see go_back"
        self.truth[taken.snapshot] = bytes(self.bytes)
        self.rules.append(taken.rule)

    def check_candidates(self, parent: str | None, change: Change) -> None:
        before = self.truth[parent] if parent else b""
        size = -(-len(self.bytes) // BLOCK) * BLOCK
        old = np.frombuffer(before[:size].ljust(size, b"\0"), np.uint8).reshape(-1, BLOCK)
        new = np.frombuffer(bytes(self.bytes).ljust(size, b"\0"), np.uint8).reshape(-1, BLOCK)
        really = set(np.flatnonzero((old != new).any(axis=1)).tolist())
        if change.rule == TABLE_DIFF:
            assert really <= set(change.candidates.indices().tolist())
        assert set(np.flatnonzero(new.any(axis=1)).tolist()) & really <= set(change.data.indices().tolist())

    def delete(self) -> None:
        if len(self.truth) > 1:
            snapshot = self.draw.choice(sorted(self.truth))
            self.repository.delete([snapshot])
            del self.truth[snapshot]

    def sweep(self) -> None:
        self.repository.sweep(grace=0)

    def go_back(self) -> None:
        """Work goes on in an image restored from some snapshot: a branch, unless it is the newest."""
        if self.truth:
            snapshot = self.draw.choice(sorted(self.truth))
            self.times_back += 1
            target = self.work / f"back{self.times_back}.qcow2"
            self.repository.restore(snapshot, target)
            self.image.unlink()
            self.image = target
            self.clusters = max(self.clusters, BLOCK)
            self.bytes = bytearray(self.truth[snapshot])
            qemu.check(self.image)

    def verify(self) -> None:
        assert {s.snapshot for s in self.repository.snapshots()} == set(self.truth)
        for snapshot, content in self.truth.items():
            target = self.work / "verify.raw"
            self.repository.restore(snapshot, target, image_format="raw")
            assert target.read_bytes() == content, f"snapshot {snapshot} restores other bytes"
            target.unlink()

    def live(self, steps: int) -> None:
        deeds = [
            (self.write, 8), (self.write_zeroes, 2), (self.discard, 2), (self.rewrite, 2), (self.resize, 1),
            (self.snapshot, 7), (self.delete, 3), (self.sweep, 2), (self.go_back, 1),
        ]  # fmt: skip
        self.write()
        self.snapshot()
        for _ in range(steps):
            self.draw.choices([d for d, _ in deeds], [w for _, w in deeds])[0]()
        self.snapshot()
        self.verify()
        qemu.check(self.image)
        self.sweep()
        self.verify()


@pytest.mark.parametrize("seed", LIVES)
def test_every_snapshot_restores_from_a_directory(
    seed: int, directory_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life(seed, directory_store, tmp_path / "work", monkeypatch)
    life.live(steps=40)
    assert TABLE_DIFF in life.rules


@pytest.mark.parametrize("seed", [100, 101])
def test_every_snapshot_restores_from_swift(
    seed: int, swift_store: OpenSwift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life(seed, swift_store(), tmp_path / "work", monkeypatch)
    life.live(steps=25)
    assert TABLE_DIFF in life.rules
