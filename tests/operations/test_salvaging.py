"""What is left of a damaged snapshot is restored: every block that can be proved intact, and no other one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import UNREADABLE, DamagedObjectError, NotFoundError, StoreError
from island_fast.formats.pack import INDEX_ROW
from island_fast.repository.local_state import LocalState
from island_fast.results import Salvaged
from island_fast.stores.checked_read import READS
from tests.operations.conftest import PACK
from tests.support import qemu
from tests.support.memory_store import MemoryStore, Stored

BLOCK = 65536


def make_content(blocks: int, tail: int = 512) -> bytes:
    """Blocks of text, so packs are small; block 1 does not compress, block 3 is zero, the last is short."""
    content = b"".join(f"{n} ".encode().ljust(16, b"x") * (BLOCK // 16) for n in range(blocks))
    noise = random.Random(5).randbytes(BLOCK)
    content = content[:BLOCK] + noise + content[2 * BLOCK : 3 * BLOCK] + bytes(BLOCK) + content[4 * BLOCK :]
    return content + b"tail" * (tail // 4)


class Volume:
    """A snapshot of the raw volume `vol`, which nobody's cache knows."""

    def __init__(self, folder: Path, store: MemoryStore, blocks: int) -> None:
        self.folder, self.store, self.content = folder, store, make_content(blocks)
        image = folder / "vol.raw"
        image.write_bytes(self.content)
        self.owner = self.open("owner")
        self.id = self.owner.snapshot(image, image_format="raw", volume="vol").snapshot
        self.objects = dict(store.objects)

    def open(self, host: str) -> Repository:
        return Repository(self.store, LocalState(self.folder / host), create=True)

    def name(self, what: str) -> str:
        (name,) = (one for one in self.objects if f"/{what}/" in one)
        return name

    def change(self, name: str, change: Callable[[bytearray], object] | None) -> None:
        """Damage one object; all others are intact again."""
        self.store.objects = dict(self.objects)
        if change is None:
            del self.store.objects[name]
        else:
            data = bytearray(self.objects[name].data)
            change(data)
            self.store.objects[name] = Stored(bytes(data), 0.0)

    def salvage(self, host: str | None = None, repository: Repository | None = None) -> Salvaged:
        """Salvage it as a host that knows nothing; what comes is right or listed, and otherwise zero."""
        again = repository or self.open(host or f"stranger-{next(_NUMBERS)}")
        target = self.folder / "salvaged.raw"
        found = again.restore(f"vol@{self.id}", target, image_format="raw", salvage=True)
        assert isinstance(found, Salvaged)
        self.check(target, found)
        target.unlink()
        return found

    def check(self, target: Path, found: Salvaged) -> None:
        wanted = bytearray(self.content)
        for start, length in found.extents_lost:
            assert any(wanted[start : start + length])
            wanted[start : start + length] = bytes(length)
        assert target.read_bytes() == wanted
        assert found.bytes_lost == sum(length for _, length in found.extents_lost)
        assert list(found.extents_lost) == sorted(found.extents_lost)
        assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(found.extents_lost))


_NUMBERS = itertools.count()


@pytest.fixture
def volume(tmp_path: Path, store: MemoryStore) -> Volume:
    return Volume(tmp_path, store, 40)


def flip(at: int, length: int = 1) -> Callable[[bytearray], object]:
    def change(data: bytearray) -> None:
        for i in range(at, at + length):
            data[i] ^= 0x55

    return change


def front_end(data: bytes) -> int:
    """Return where the index of a pack ends."""
    row = data[72 + 40 : 72 + 80]
    return int.from_bytes(row[8:16], "little") + int.from_bytes(row[16:24], "little")


def test_four_bad_bytes_cost_one_block(tmp_path: Path, store: MemoryStore) -> None:
    """Of 744 blocks of a pack, 743 are good."""
    volume = Volume(tmp_path, store, 744)
    name = volume.name("packs")
    volume.change(name, flip(front_end(volume.objects[name].data) + 10_000, 4))
    with pytest.raises(DamagedObjectError, match="is damaged"):
        volume.open("other").restore(volume.id, tmp_path / "not.raw", image_format="raw")
    found = volume.salvage()
    assert found.extents_lost == ((BLOCK, BLOCK),)
    assert found.bytes_written == 743 * BLOCK  # there are 745, of which one is zero and one is lost
    assert found.objects_damaged == (name,)
    assert not (tmp_path / "not.raw").exists()


def test_a_whole_snapshot_is_the_volume(volume: Volume) -> None:
    found = volume.salvage()
    assert (found.bytes_lost, found.extents_lost, found.objects_damaged) == (0, (), ())


def test_no_damaged_byte_of_a_pack_costs_more_than_a_block(volume: Volume) -> None:
    """Every seventh byte of its front, and some of its blocks: a row of the index or a block is lost."""
    name = volume.name("packs")
    data = volume.objects[name].data
    lost = set()
    for at in [*range(0, front_end(data), 7), *range(front_end(data), len(data), 1999)]:
        volume.change(name, flip(at))
        found = volume.salvage()
        assert found.bytes_lost in (0, 512, BLOCK), at
        if at < 72 + 3 * 40 + 100:
            assert not found.bytes_lost, at
        lost |= set(found.extents_lost)
    assert len(lost) > 20
    assert (40 * BLOCK, 512) in lost


@pytest.mark.parametrize("what", ["packs", "manifests"])
def test_no_damage_gives_other_content(volume: Volume, what: str) -> None:
    """Bytes flipped, cut, put in and moved at random: `salvage` checks all that comes."""
    name, chance = volume.name(what), random.Random(14)
    outcomes = set()

    def spoil(data: bytearray) -> None:
        for _ in range(chance.randrange(1, 4)):
            near = min(len(data) - 1, 2500)
            at, size = chance.randrange(near), chance.choice([1, 4, 32, 64, 512])
            match chance.randrange(4):
                case 0:
                    flip(at, min(size, len(data) - at))(data)
                case 1:
                    del data[at : at + size]
                case 2:
                    data[at:at] = chance.randbytes(size)
                case 3:
                    source = at + 32 * chance.randrange(-20, 20)
                    if 0 <= source < len(data) - size and at + size <= len(data):
                        data[at : at + size] = data[source : source + size]

    for _ in range(150):
        volume.change(name, spoil)
        try:
            outcomes.add(bool(volume.salvage().bytes_lost))
        except UNREADABLE:
            assert what == "manifests"
            outcomes.add(None)
    assert outcomes >= ({True, False} if what == "packs" else {False, None})


def test_a_missing_pack_is_lost(volume: Volume) -> None:
    name = volume.name("packs")
    volume.change(name, None)
    found = volume.salvage()
    assert found.extents_lost == ((0, 3 * BLOCK), (4 * BLOCK, 36 * BLOCK + 512))
    assert found.objects_damaged == (name,)
    assert found.bytes_written == 0


@pytest.mark.parametrize("kept, lost", [(-1, 1), (front_end, 40), (100, 40), (0, 40)])
def test_of_a_truncated_pack_the_beginning_is_good(
    volume: Volume, kept: int | Callable[[bytes], int], lost: int
) -> None:
    name = volume.name("packs")
    length = kept if isinstance(kept, int) else kept(volume.objects[name].data)

    def cut(data: bytearray) -> None:
        del data[length:]

    volume.change(name, cut)
    found = volume.salvage()
    assert -(-found.bytes_lost // BLOCK) == lost


def test_an_index_that_this_host_remembers_stands_for_a_lost_one(volume: Volume) -> None:
    name = volume.name("packs")
    end = front_end(volume.objects[name].data)
    volume.change(name, flip(end - 40 * INDEX_ROW.itemsize, 40 * INDEX_ROW.itemsize))
    assert len(volume.salvage().extents_lost) == 2
    found = volume.salvage(repository=volume.owner)
    assert not found.bytes_lost


def test_rows_in_the_places_of_others_prove_nothing(volume: Volume) -> None:
    """Their blocks have the digests that they state, and are those of other slots."""
    name = volume.name("packs")
    end = front_end(volume.objects[name].data)

    def shift(data: bytearray) -> None:
        data[end - 32 * 32 : end - 32 * 12] = data[end - 32 * 24 : end - 32 * 4]

    volume.change(name, shift)
    assert volume.salvage().bytes_lost == 39 * BLOCK + 512


def test_a_pack_in_place_of_another_is_lost(volume: Volume, tmp_path: Path) -> None:
    """Another snapshot's pack under this one's name: all is intact, and nothing of it is this volume's."""
    (tmp_path / "again").mkdir()
    other = Volume(tmp_path / "again", MemoryStore(), 40)
    name = volume.name("packs")
    volume.change(name, lambda data: data.__setitem__(slice(None), other.objects[other.name("packs")].data))
    assert volume.salvage().bytes_lost == 39 * BLOCK + 512


def test_a_manifest_is_used_if_what_says_where_blocks_are_is_intact(volume: Volume) -> None:
    name = volume.name("manifests")
    data = volume.objects[name].data
    needed, used = set(), 0
    for at in range(0, len(data), 5):
        volume.change(name, flip(at))
        try:
            found = volume.salvage()
        except UNREADABLE:
            needed.add(at)
            assert not list(volume.folder.glob("*salvaged*"))
        else:
            used += 1
            assert (found.bytes_lost, found.objects_damaged) == (0, (name,))
    assert used > 12, "the header, and column 16"
    assert needed
    assert min(needed) > 71


def test_another_replica_can_hold_what_one_lost(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are damaged, in different places: of three reads, one has each block."""
    name = volume.name("packs")
    end = front_end(volume.objects[name].data)
    replicas = []
    for at in (end + 5, -20):
        volume.change(name, flip(at))
        replicas.append(volume.store.objects[name])
    turns = itertools.cycle(replicas)
    read = volume.store._read

    def read_some(verb: str, name_: str, most: int | None = None) -> memoryview:
        if name_ == name:
            volume.store.objects[name] = next(turns)
        return read(verb, name_, most)

    monkeypatch.setattr(volume.store, "_read", read_some)
    found = volume.salvage()
    assert (found.bytes_lost, found.objects_damaged) == (0, (name,))


def test_a_pack_is_read_a_bounded_number_of_times(volume: Volume) -> None:
    name = volume.name("packs")
    volume.change(name, flip(-1))
    again = volume.open("counting")
    before = volume.store.calls["get"] + volume.store.calls["get_ranges"]
    volume.salvage(repository=again)
    assert volume.store.calls["get"] + volume.store.calls["get_ranges"] - before <= 2 * READS + 4


def test_a_store_that_does_not_answer_has_lost_nothing(
    volume: Volume, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    volume.change(volume.name("packs"), flip(-1))
    again, get_ranges = volume.open("other"), volume.store.get_ranges

    def refuse(name: str, ranges: object) -> object:
        if "/packs/" in name:
            raise StoreError("no answer")
        return get_ranges(name, ranges)

    monkeypatch.setattr(volume.store, "get_ranges", refuse)
    with pytest.raises(StoreError):
        again.restore(f"vol@{volume.id}", tmp_path / "salvaged.raw", image_format="raw", salvage=True)
    assert not list(tmp_path.glob("*salvaged*"))


def test_a_snapshot_that_is_deleted_meanwhile_has_lost_nothing(
    volume: Volume, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    again, read, deleted = volume.open("other"), volume.store._read, []

    def delete_first(verb: str, name: str, most: int | None = None) -> memoryview:
        if "/packs/" in name and not deleted:
            deleted.append(name)
            volume.owner.delete([volume.id])
            volume.owner.sweep()
        return read(verb, name, most)

    monkeypatch.setattr(volume.store, "_read", delete_first)
    with pytest.raises(NotFoundError, match="was deleted while it was restored"):
        again.restore(f"vol@{volume.id}", tmp_path / "salvaged.raw", image_format="raw", salvage=True)
    assert not list(tmp_path.glob("*salvaged*"))


@qemu.needs_qemu
def test_a_salvaged_qcow2_holds_no_pin(volume: Volume, tmp_path: Path) -> None:
    """With one, its next snapshot would inherit what is lost; without, it is a full scan that sends it."""
    volume.change(volume.name("packs"), flip(-1))
    target = tmp_path / "salvaged.qcow2"
    found = volume.open("other").restore(f"vol@{volume.id}", target, salvage=True)
    assert isinstance(found, Salvaged)
    qemu.check(target)
    assert "snapshots" not in qemu.info(target)
    raw = tmp_path / "salvaged.raw"
    qemu.run(qemu.QEMU_IMG, "convert", "-f", "qcow2", "-O", "raw", target, raw)
    volume.check(raw, found)
    assert found.bytes_lost == 512


@pytest.mark.usefixtures("small_packs")
def test_all_packs_but_one_are_whole(tmp_path: Path, store: MemoryStore) -> None:
    """Only the blocks of that one are lost, and the figures count the others."""
    volume = Volume(tmp_path, store, 40)
    name = sorted(one for one in volume.objects if "/packs/" in one)[2]
    volume.change(name, None)
    found = volume.salvage()
    assert found.bytes_lost == PACK * BLOCK
    assert found.bytes_written == 40 * BLOCK - PACK * BLOCK
