"""Damage is mended from what this host still has: the image, other packs, its caches; and never by halves."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import DamagedError
from island_fast.repository.local_state import LocalState
from island_fast.results import Damage, Verified
from tests.operations.conftest import PACK, in_small_packs
from tests.support import qemu
from tests.support.memory_store import MemoryStore, Stored

pytestmark = qemu.needs_qemu

BLOCK = 65536
SIZE = 8 << 20


class Volume:
    """Three snapshots of the qcow2 volume `vol`: two packs, then two times a block written over in the first.

    `truth` has what each holds, oldest first. Block 0 is of the first alone, block 1 of the first two.
    """

    def __init__(self, folder: Path, store: MemoryStore) -> None:
        self.folder = folder
        self.store = store
        self.image = qemu.create(folder / "vol.qcow2", SIZE, lazy_refcounts="on")
        self.truth: dict[str, bytes] = {}
        self.owner = self.opened("owner", create=True)
        qemu.noise(self.image, 0, 2 * PACK * BLOCK, 1)
        self.snapshot()
        for block in (0, 1):
            qemu.noise(self.image, block * BLOCK, BLOCK, 10 + block)
            self.snapshot()

    def opened(self, host: str, *, create: bool = False) -> Repository:
        return Repository(self.store, LocalState(self.folder / host), create=create)

    def stranger(self) -> Repository:
        return self.opened(f"stranger-{os.urandom(4).hex()}")

    def snapshot(self) -> str:
        taken = self.owner.snapshot(self.image)
        self.truth[taken.snapshot] = qemu.content(self.image)
        return taken.snapshot

    @property
    def ids(self) -> list[str]:
        return list(self.truth)

    def pack(self, number: int) -> str:
        """Name of a pack that the first snapshot wrote."""
        return f"vol/packs/{self.ids[0]}/0-{number:08d}"

    def damage(self, name: str, change: Callable[[bytearray], object] | None) -> None:
        if change is None:
            del self.store.objects[name]
        else:
            data = bytearray(self.store.objects[name].data)
            change(data)
            self.store.objects[name] = Stored(bytes(data), 0.0)

    def heals(self, **options: object) -> Verified:
        return self.owner.verify(sample=1.0, heal=True, **options)  # type: ignore[arg-type]

    def check(self) -> None:
        """A host that knows nothing finds no damage and restores every snapshot; also after a late sweep."""
        for _ in range(2):
            assert self.stranger().verify(sample=1.0).damages == ()
            for snapshot, content in self.truth.items():
                self.restores(snapshot, content)
            self.store.now += 3 * 86400
            self.owner.sweep()

    def restores(self, snapshot: str, content: bytes) -> None:
        target = self.folder / "restored.raw"
        self.stranger().restore(f"vol@{snapshot}", target, image_format="raw")
        assert target.read_bytes() == content
        target.unlink()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Volume, Path]:
    """A volume that is made once, and a copy of its files."""
    folder = tmp_path_factory.mktemp("healing")
    (folder / "made").mkdir()
    store = MemoryStore()
    with pytest.MonkeyPatch.context() as patch:
        in_small_packs(store, patch)
        volume = Volume(folder / "made", store)
    shutil.copytree(folder / "made", folder / "kept")
    return volume, folder / "kept"


@pytest.fixture
def volume(template: tuple[Volume, Path], monkeypatch: pytest.MonkeyPatch) -> Volume:
    """That volume as if it had just been made."""
    made, kept = template
    shutil.rmtree(made.folder)
    shutil.copytree(kept, made.folder)
    again = copy.copy(made)
    again.store, again.truth = MemoryStore(), dict(made.truth)
    again.store.objects |= made.store.objects
    in_small_packs(again.store, monkeypatch)
    again.owner = again.opened("owner")
    return again


def only(found: Verified) -> Damage:
    (damage,) = found.damages
    return damage


def flip(at: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[at] ^= 1

    return change


def cut(data: bytearray) -> None:
    del data[len(data) // 2 :]


ROT_IN_BLOCK_3 = flip(-(PACK - 3) * BLOCK + 9)
DAMAGES = {"missing": None, "truncated": cut, "index": flip(250), "rot": ROT_IN_BLOCK_3, "foreign": flip(40)}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_pack_is_mended_from_the_image_and_all_snapshots_are_whole(volume: Volume, kind: str) -> None:
    name = volume.pack(1)  # of which the image still has every block
    volume.damage(name, DAMAGES[kind])
    damage = only(volume.heals())
    assert (damage.object, damage.mended, damage.remedy) == (name, True, "")
    assert {one.snapshot for one in damage.snapshots} == set(volume.ids)
    assert any(other.startswith(name + ".") for other in volume.store.objects), "its next generation"
    volume.check()
    assert name not in volume.store.objects, "what was damaged is garbage, which a sweep removes"
    volume.stranger().restore("vol@latest", volume.folder / "newest.qcow2")
    qemu.compare(volume.image, volume.folder / "newest.qcow2", other_format="qcow2")


def test_many_objects_at_once(volume: Volume) -> None:
    for number in (0, 1):
        volume.damage(volume.pack(number), flip(-1))
    volume.damage(f"vol/manifests/{volume.ids[1]}-0", None)
    volume.damage("vol/catalog/000000-00000001", flip(200))
    found = volume.heals()
    assert [one.mended for one in found.damages] == [True] * 4
    assert volume.owner.verify(sample=1.0).damages == ()
    volume.check()


def test_what_was_written_over_stays_lost_and_is_never_taken_for_good(volume: Volume) -> None:
    first, second, third = volume.ids
    volume.damage(volume.pack(0), None)
    damage = only(volume.heals())
    assert (damage.kind, damage.mended) == ("missing", False)
    assert {one.snapshot: one.extents for one in damage.snapshots} == {
        first: ((0, 2 * BLOCK),),
        second: ((BLOCK, BLOCK),),
    }
    volume.restores(third, volume.truth[third])
    for snapshot in (first, second):
        with pytest.raises(DamagedError, match="no longer holds"):
            volume.stranger().restore(f"vol@{snapshot}", volume.folder / "never.qcow2")
    for verified in (volume.stranger().verify(), volume.stranger().verify(sample=1.0), volume.owner.verify()):
        left = only(verified)
        assert (left.kind, {one.snapshot for one in left.snapshots}) == ("lost-blocks", {first, second})
    before = dict(volume.store.objects)
    assert not only(volume.heals()).mended
    assert volume.store.objects == before, "nothing is gained, so nothing is written"
    taken = volume.owner.snapshot(volume.image)
    assert (taken.blocks_candidate, taken.blocks_changed) == (0, 0), "it needs nothing of what is lost"


def test_lost_blocks_come_back_when_an_image_has_them(volume: Volume) -> None:
    first = volume.ids[0]
    old = volume.folder / "old.qcow2"
    volume.owner.restore(first, old)
    volume.damage(volume.pack(0), None)
    assert not only(volume.heals()).mended
    damage = only(volume.owner.verify(first, heal=True, against=old))
    assert (damage.kind, damage.mended) == ("lost-blocks", True)
    volume.check()


def test_deleting_what_cannot_be_mended_leaves_a_whole_volume(volume: Volume) -> None:
    volume.damage(volume.pack(0), None)
    volume.heals()
    for snapshot in volume.ids[:2]:
        volume.owner.delete([snapshot])
        del volume.truth[snapshot]
    volume.check()


def test_without_digests_there_is_no_mending_and_the_next_snapshot_is_whole(volume: Volume) -> None:
    volume.damage(volume.pack(1), None)
    shutil.rmtree(next((volume.folder / "owner").glob("*/vol/cache/packs")))
    before = dict(volume.store.objects)
    damage = only(volume.heals())
    assert not damage.mended
    assert "its index is lost" in damage.remedy
    assert volume.store.objects == before
    taken = volume.owner.snapshot(volume.image)
    assert (taken.rule, taken.blocks_candidate, taken.blocks_changed) == ("table-diff", PACK, PACK)
    volume.restores(taken.snapshot, qemu.content(volume.image))
    assert {one.snapshot for one in only(volume.owner.verify()).snapshots} == set(volume.ids)


@pytest.mark.parametrize("kind", ["missing", "rot"])
def test_the_next_snapshot_mends_what_is_known_to_be_damaged(volume: Volume, kind: str) -> None:
    volume.damage(volume.pack(1), DAMAGES[kind])
    assert not only(volume.owner.verify(sample=1.0)).mended
    qemu.noise(volume.image, 3 << 20, BLOCK, 30)
    taken = volume.owner.snapshot(volume.image)
    assert (taken.rule, taken.blocks_changed) == ("table-diff", 1), "nothing else has to be sent again"
    volume.truth[taken.snapshot] = qemu.content(volume.image)
    volume.check()


def test_what_the_next_snapshot_sends_again_mends_the_older_ones(volume: Volume) -> None:
    """The image has moved on when digests are to be had again, and the blocks are in another pack."""
    volume.damage(volume.pack(1), ROT_IN_BLOCK_3)
    volume.owner.verify(sample=1.0)
    (cache,) = (volume.folder / "owner").glob("*/vol/cache")
    front = cache / volume.pack(1).partition("/")[2]
    kept = front.read_bytes()
    front.unlink()
    index = volume.store.objects[volume.pack(1)].data
    volume.damage(volume.pack(1), flip(250))  # now no digests are to be had, and the snapshot sends again
    volume.owner.verify(sample=1.0)
    taken = volume.owner.snapshot(volume.image)
    assert taken.blocks_changed == PACK
    volume.truth[taken.snapshot] = qemu.content(volume.image)
    volume.store.objects[volume.pack(1)] = Stored(index, 0.0)
    front.write_bytes(kept)
    qemu.noise(volume.image, PACK * BLOCK, PACK * BLOCK, 40)
    volume.snapshot()
    assert volume.heals().damages == ()
    volume.check()


def test_a_full_scan_does_not_inherit_what_is_lost(volume: Volume) -> None:
    volume.damage(volume.pack(0), None)
    volume.heals()
    qemu.noise(volume.image, 0, BLOCK, 77)
    volume.owner.verify()
    taken = volume.owner.snapshot(volume.image, full=True)
    volume.restores(taken.snapshot, qemu.content(volume.image))


@pytest.mark.parametrize("change", [None, cut, flip(100)], ids=["missing", "truncated", "rot"])
def test_a_manifest_gets_its_own_bytes_again(
    volume: Volume, change: Callable[[bytearray], object] | None
) -> None:
    name = f"vol/manifests/{volume.ids[1]}-0"
    was = volume.store.objects[name].data
    volume.damage(name, change)
    assert only(volume.heals()).mended
    assert volume.store.objects[name].data == was
    volume.check()


def test_a_manifest_of_which_there_is_no_copy(volume: Volume) -> None:
    name = f"vol/manifests/{volume.ids[1]}-0"
    volume.damage(name, flip(100))
    shutil.rmtree(next((volume.folder / "owner").glob("*/vol/cache/manifests")))
    before = dict(volume.store.objects)
    damage = only(volume.heals())
    assert not damage.mended
    assert "no copy" in damage.remedy
    assert volume.store.objects == before


@pytest.mark.parametrize("change", [None, flip(100)], ids=["missing", "rot"])
@pytest.mark.parametrize("number", [0, 3])
def test_a_catalog_that_only_its_owner_can_read_is_begun_anew(
    volume: Volume, number: int, change: Callable[[bytearray], object] | None
) -> None:
    volume.damage(f"vol/catalog/000000-{number:08d}", change)
    assert only(volume.heals()).mended
    assert volume.owner.verify().damages == ()
    volume.check()
    volume.snapshot()
    volume.check()


def test_only_the_owner_mends(volume: Volume) -> None:
    volume.damage(volume.pack(1), ROT_IN_BLOCK_3)
    volume.damage(f"vol/manifests/{volume.ids[1]}-0", None)
    before = dict(volume.store.objects)
    for host in ("stranger", "other"):
        found = volume.opened(host).verify(sample=1.0, heal=True)
        assert [one.mended for one in found.damages] == [False, False]
        assert all("belongs to host" in one.remedy for one in found.damages)
    assert volume.store.objects == before


def test_slots_that_died_are_left_out_and_counted(volume: Volume) -> None:
    old = volume.pack(0)
    volume.owner.delete([volume.ids[0]])
    del volume.truth[volume.ids[0]]
    volume.damage(old, ROT_IN_BLOCK_3)
    assert only(volume.heals()).mended
    (lineage,) = volume.owner.lineages("vol")
    (name,) = [name for name in volume.store.objects if name.startswith(old + ".")]
    row = lineage.state.packs.suffix.argmax()
    assert lineage.state.packs.dead[row] == 0
    assert lineage.state.packs.size[row] == len(volume.store.objects[name].data) < PACK * BLOCK
    volume.check()


def test_an_image_that_is_gone_is_told_and_packs_still_give(
    volume: Volume, caplog: pytest.LogCaptureFixture
) -> None:
    volume.image.unlink()
    volume.damage(volume.pack(1), ROT_IN_BLOCK_3)
    assert not only(volume.heals()).mended
    assert "cannot be used for repairs" in caplog.text
