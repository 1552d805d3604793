"""A snapshot compared with its pin in the image: whatever the snapshot missed is found, block by block."""

from __future__ import annotations

from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.dirtymap import DirtyMap
from island_fast.errors import NotFoundError, RefusedError, UsageError
from island_fast.images.qcow2_source import Qcow2Source
from island_fast.images.source import Change
from island_fast.operations import snapshot
from island_fast.operations.sample import Sample
from island_fast.repository.local_state import LocalState
from island_fast.results import Damage, Verified
from tests.operations.conftest import PACK
from tests.support import qemu
from tests.support.daemon import StorageDaemon, needs_storage_daemon
from tests.support.memory_store import MemoryStore, Stored

pytestmark = [qemu.needs_qemu, pytest.mark.usefixtures("small_packs")]

BLOCK = 65536
SIZE = 8 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "vol.qcow2", SIZE, lazy_refcounts="on")
    qemu.noise(path, 0, 2 * PACK * BLOCK, 1)
    return path


def only(found: Verified) -> Damage:
    (damage,) = found.damages
    return damage


def missing(blocks: list[int], patch: pytest.MonkeyPatch) -> None:
    """From now on the scan and the table diff miss these blocks, and so does the sample that tests it."""
    real = Qcow2Source.find_change

    def change(self: Qcow2Source, *arguments: object) -> Change:
        found = real(self, *arguments)  # type: ignore[arg-type]
        left_out = DirtyMap.from_indices(found.candidates.blocks, blocks)
        kept = found.candidates - left_out
        return Change(found.rule, found.reason, kept, found.data - left_out, kept.runs())

    patch.setattr(Qcow2Source, "find_change", change)
    patch.setattr(snapshot, "compare_sample", lambda *_: Sample(0, None))


def test_a_snapshot_is_what_its_pin_holds_and_no_pack_data_is_read(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    repository.snapshot(image)
    qemu.noise(image, BLOCK, BLOCK, 2)
    taken = repository.snapshot(image)
    qemu.noise(image, 0, SIZE // 2, 3)  # the image may go on
    reader = Repository(store, LocalState(tmp_path / "other"))
    before = store.received
    found = reader.verify(taken.snapshot, against=image)
    assert found.damages == ()
    assert found.bytes_compared == 2 * PACK * BLOCK
    assert store.received - before < 4 * BLOCK, "records, a manifest and the fronts of three packs"


def test_a_block_that_a_table_diff_missed(
    repository: Repository, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.snapshot(image)
    for block in (3, 5, 6, 100):
        qemu.noise(image, block * BLOCK, BLOCK, 2)
    with monkeypatch.context() as patch:
        missing([5, 6, 100], patch)
        taken = repository.snapshot(image)
    assert (taken.rule, taken.blocks_changed) == ("table-diff", 1)
    assert repository.verify(sample=1.0).damages == (), "what is stored is sound; what is missing is not"
    damage = only(repository.verify(taken.snapshot, against=image))
    assert damage.kind == "differs"
    (one,) = damage.snapshots
    assert (one.snapshot, one.extents) == (
        taken.snapshot, ((5 * BLOCK, 2 * BLOCK), (100 * BLOCK, BLOCK)),
    )  # fmt: skip
    assert "--full" in damage.remedy
    mended = repository.snapshot(image, full=True)
    assert repository.verify(mended.snapshot, against=image).damages == ()


def test_blocks_that_became_zero_and_were_missed(
    repository: Repository, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.snapshot(image)
    qemu.io(image, qemu.zeroes(4 * BLOCK, BLOCK), qemu.discard(9 * BLOCK, BLOCK))
    with monkeypatch.context() as patch:
        missing([4, 9], patch)
        taken = repository.snapshot(image)
    (one,) = only(repository.verify(taken.snapshot, against=image)).snapshots
    assert one.extents == ((4 * BLOCK, BLOCK), (9 * BLOCK, BLOCK))


def test_only_the_snapshots_own_pin_will_do(repository: Repository, image: Path, tmp_path: Path) -> None:
    first = repository.snapshot(image)
    second = repository.snapshot(image)
    with pytest.raises(NotFoundError, match="does not hold the pin"):
        repository.verify(first.snapshot, against=image)
    back = tmp_path / "back.qcow2"
    repository.restore(first.snapshot, back)
    assert repository.verify(first.snapshot, against=back).damages == ()
    with pytest.raises(UsageError, match="one snapshot"):
        repository.verify(against=image)
    assert repository.verify(second.snapshot, against=image).damages == ()


def test_packs_whose_digests_are_lost_are_damage_and_no_difference(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    taken = repository.snapshot(image)
    name = f"vol/packs/{taken.snapshot}/0-00000001"
    data = bytearray(store.objects[name].data)
    data[250] ^= 1
    store.objects[name] = Stored(bytes(data), 0.0)
    reader = Repository(store, LocalState(tmp_path / "other"))
    damage = only(reader.verify(taken.snapshot, against=image))
    assert (damage.object, damage.kind) == (name, "index")


def test_an_image_with_backing_files(repository: Repository, tmp_path: Path) -> None:
    base = qemu.create(tmp_path / "base.qcow2", SIZE)
    qemu.noise(base, 0, 4 * BLOCK, 1)
    top = tmp_path / "top.qcow2"
    qemu.run(qemu.QEMU_IMG, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top)
    qemu.noise(top, BLOCK, BLOCK, 2)
    taken = repository.snapshot(top, backing=[f"qcow2:{base}"])
    found = repository.verify(taken.snapshot, against=top, backing=[f"qcow2:{base}"])
    assert (found.damages, found.bytes_compared) == ((), 4 * BLOCK)
    with pytest.raises(RefusedError, match="--backing"):
        repository.verify(taken.snapshot, against=top)
    qemu.noise(base, 2 * BLOCK, BLOCK, 3)
    with pytest.raises(RefusedError, match="were written to since"):
        repository.verify(taken.snapshot, against=top, backing=[f"qcow2:{base}"])


@needs_storage_daemon
def test_an_image_in_use_is_compared_and_mends(
    repository: Repository, store: MemoryStore, image: Path
) -> None:
    with StorageDaemon(image) as daemon:
        taken = repository.snapshot(image, qmp=daemon.qmp_socket)
        daemon.write(0, BLOCK, 7)
        assert repository.verify(taken.snapshot, against=image).damages == ()
        del store.objects[f"vol/packs/{taken.snapshot}/0-00000000"]
        assert only(repository.verify(taken.snapshot, heal=True)).mended
    assert repository.verify(sample=1.0).damages == ()
