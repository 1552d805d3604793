"""Verifying finds damage in every kind of object, tells whom it touches, and reads each object once."""

from __future__ import annotations

import copy
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import DamagedError, RefusedError
from island_fast.formats.catalog import CHECKPOINT_EVERY
from island_fast.operations.verify import CheckItem, select_for_reading
from island_fast.repository.local_state import LocalState
from island_fast.results import Damage, Verified
from island_fast.stores.base import MAX_OBJECT, ObjectInfo, Range, Views
from island_fast.stores.checked_read import READS
from tests.operations.conftest import PACK, in_small_packs
from tests.support.memory_store import MemoryStore, Stored

BLOCK = 65536
BLOCKS = 4 * PACK
DAY = 86400.0


class NamedCalls(MemoryStore):
    """Counts calls by verb and name, too."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[tuple[str, str]] = Counter()

    def get(self, name: str, *, newest: bool = False, limit: int = MAX_OBJECT) -> memoryview:
        self.by_name["get", name] += 1
        return super().get(name, newest=newest, limit=limit)

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> Views:
        self.by_name["get_ranges", name] += 1
        return super().get_ranges(name, ranges)

    def head(self, name: str) -> ObjectInfo | None:
        self.by_name["head", name] += 1
        return super().head(name)

    def of(self, *kinds: str) -> Counter[tuple[str, str]]:
        """Calls for objects of these kinds (folders)."""
        return Counter({k: n for k, n in self.by_name.items() if any(f"/{kind}/" in k[1] for kind in kinds)})


class History:
    """Two snapshots of the raw volume `vol`: the first three packs serve both, and a block of the fourth."""

    def __init__(self, store: NamedCalls, folder: Path) -> None:
        self.store = store
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.raw = folder / "vol.raw"
        self.raw.write_bytes(random.Random(1).randbytes(BLOCKS * BLOCK - 100))
        self.repository = self.opened("owner", create=True)
        self.first = self.snapshot()
        self.write(BLOCKS - PACK, PACK - 1)
        self.second = self.snapshot()

    def opened(self, host: str, *, create: bool = False) -> Repository:
        return Repository(self.store, LocalState(self.folder / host), create=create)

    def stranger(self) -> Repository:
        return self.opened(f"stranger-{os.urandom(4).hex()}")

    def write(self, block: int, count: int, seed: int = 2) -> None:
        with open(self.raw, "r+b") as file:
            file.seek(block * BLOCK)
            file.write(random.Random(seed).randbytes(count * BLOCK))

    def snapshot(self) -> str:
        return self.repository.snapshot(self.raw, image_format="raw").snapshot

    def names(self, kind: str) -> list[str]:
        return sorted(name for name in self.store.objects if f"/{kind}/" in name)

    def pack(self, snapshot: str, number: int) -> str:
        return f"vol/packs/{snapshot}/0-{number:08d}"

    def spoil(self, name: str, change: Callable[[bytearray], object]) -> None:
        """Change an object's bytes where they lie."""
        data = bytearray(self.store.objects[name].data)
        change(data)
        self.store.objects[name] = Stored(bytes(data), self.store.objects[name].at)


def flip(at: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[at] ^= 1

    return change


def cut(data: bytearray) -> None:
    del data[len(data) // 2 :]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[History, Path]:
    """A history that is made once, and a copy of its files."""
    folder = tmp_path_factory.mktemp("verifying")
    store = NamedCalls()
    with pytest.MonkeyPatch.context() as patch:
        in_small_packs(store, patch)
        history = History(store, folder / "made")
    shutil.copytree(folder / "made", folder / "kept")
    return history, folder / "kept"


@pytest.fixture
def history(template: tuple[History, Path], monkeypatch: pytest.MonkeyPatch) -> History:
    """That history as if it had just been made; nothing was asked of its store."""
    made, kept = template
    shutil.rmtree(made.folder)
    shutil.copytree(kept, made.folder)
    again = copy.copy(made)
    again.store = NamedCalls()
    in_small_packs(again.store, monkeypatch)
    again.store.objects |= made.store.objects
    again.repository = again.opened("owner")
    again.store.by_name.clear()
    return again


@pytest.fixture
def store(history: History) -> NamedCalls:
    return history.store


def only(found: Verified) -> Damage:
    (damage,) = found.damages
    return damage


def test_looking_asks_for_every_object_and_reads_no_pack(history: History, store: NamedCalls) -> None:
    found = history.repository.verify()
    assert (found.snapshots, found.damages, found.bytes_compared) == (2, (), 0)
    packs, manifests, records = map(history.names, ("packs", "manifests", "catalog"))
    assert found.objects == len(packs) + len(manifests) + len(records)
    assert store.of("packs", "manifests") == Counter({("head", name): 1 for name in packs + manifests})
    assert {name for verb, name in store.of("catalog") if verb == "get"} == set(records)
    assert found.objects_unproved == len(packs) + len(manifests)


def test_a_host_without_caches_reads_the_manifests_to_know_what_they_name(
    history: History, store: NamedCalls
) -> None:
    found = history.stranger().verify()
    assert found.damages == ()
    assert store.of("manifests") == Counter({("get", name): 1 for name in history.names("manifests")})
    assert store.of("packs") == Counter({("head", name): 1 for name in history.names("packs")})


def test_each_object_is_read_once_however_many_snapshots_share_it(
    history: History, store: NamedCalls
) -> None:
    for _ in range(3):
        history.snapshot()
    store.by_name.clear()
    found = history.repository.verify(sample=1.0)
    objects = history.names("packs") + history.names("manifests")
    assert store.of("packs", "manifests") == Counter({("get", name): 1 for name in objects})
    assert (found.objects_read, found.objects_unproved) == (found.objects, 0)
    assert found.bytes_read == sum(len(s.data) for n, s in store.objects.items() if "/" in n)


def test_one_snapshot_needs_its_own_objects(history: History, store: NamedCalls) -> None:
    history.repository.verify(history.second, sample=1.0)
    asked = {name for _, name in store.of("packs", "manifests")}
    last = history.pack(history.first, 3)  # of which the second snapshot still needs a block
    assert asked == {*history.names("packs"), f"vol/manifests/{history.second}-0"}
    history.write(BLOCKS - 1, 1)
    third = history.snapshot()
    store.by_name.clear()
    history.repository.verify(third)
    assert last not in {name for _, name in store.by_name}


PACK_DAMAGE = {
    "missing": None,
    "truncated": cut,
    "index": flip(250),  # the first rows of the index lie behind about 350 bytes of header and metadata
    "rot": flip(3 * BLOCK),
}


@pytest.mark.parametrize("kind", PACK_DAMAGE)
@pytest.mark.parametrize("host", ["owner", "stranger"])
def test_a_damaged_pack_is_told_with_whom_it_touches(history: History, kind: str, host: str) -> None:
    name, change = history.pack(history.first, 1), PACK_DAMAGE[kind]
    if change is None:
        del history.store.objects[name]
    else:
        history.spoil(name, change)
    reader = history.repository if host == "owner" else history.stranger()
    damage = only(reader.verify(sample=1.0))
    assert (damage.object, damage.kind, damage.volume, damage.mended) == (name, kind, "vol", False)
    assert {one.snapshot for one in damage.snapshots} == {history.first, history.second}
    assert "heal" in damage.remedy
    start, whole = PACK * BLOCK, PACK * BLOCK
    for one in damage.snapshots:
        assert (one.extents_left_out, one.bytes) == (0, sum(n for _, n in one.extents))
        if kind == "rot":
            assert one.extents == ((start + 2 * BLOCK, BLOCK),)
        elif kind == "truncated":
            assert one.extents[0][0] > start
            assert 0 < one.bytes < whole
        else:
            assert one.extents == ((start, whole),)


def test_what_looking_can_see_it_sees(history: History) -> None:
    history.store.objects.pop(history.pack(history.first, 0))
    history.spoil(history.pack(history.first, 1), cut)
    history.spoil(history.pack(history.first, 2), flip(3 * BLOCK))
    history.store.objects.pop(f"vol/manifests/{history.first}-0")
    found = history.repository.verify()
    assert {one.kind for one in found.damages} == {"missing", "truncated"}
    assert len(found.damages) == 3, "and goes on after the first"


def test_what_was_found_damaged_is_read_every_time(history: History, store: NamedCalls) -> None:
    name = history.pack(history.first, 2)
    history.spoil(name, flip(3 * BLOCK))
    assert only(history.repository.verify(sample=1.0)).object == name
    store.by_name.clear()
    assert only(history.opened("owner").verify()).object == name
    assert store.by_name["get", name] == READS + 1
    assert set(store.of("packs")) - {("get", name)} == {
        ("head", other) for other in history.names("packs") if other != name
    }
    history.spoil(name, flip(3 * BLOCK))  # the disk is well again
    assert history.repository.verify().damages == ()


def test_the_last_blocks_extent_ends_with_the_volume(history: History) -> None:
    history.store.objects.pop(history.pack(history.first, 3))
    first, second = sorted(only(history.repository.verify()).snapshots, key=lambda one: one.bytes)
    assert (first.snapshot, first.extents) == (
        history.second, (((BLOCKS - 1) * BLOCK, BLOCK - 100),)
    )  # fmt: skip
    assert second.extents == (((BLOCKS - PACK) * BLOCK, PACK * BLOCK - 100),)


def test_another_packs_bytes_under_its_name(history: History) -> None:
    name, other = history.pack(history.first, 1), history.pack(history.first, 2)
    assert len(history.store.objects[name].data) == len(history.store.objects[other].data)
    history.store.objects[name] = history.store.objects[other]
    assert history.repository.verify().damages == (), "looking sees names and sizes only"
    damage = only(history.stranger().verify(sample=1.0))
    assert damage.object == name
    assert "another object's bytes" in damage.message


def test_damage_that_no_block_suffers_from_is_damage(history: History) -> None:
    history.spoil(history.pack(history.first, 1), flip(60))  # in the checksum of the whole
    damage = only(history.repository.verify(sample=1.0))
    assert (damage.kind, damage.snapshots) == ("index", ()) or damage.snapshots == ()


@pytest.mark.parametrize("kind", ["missing", "truncated", "rot"])
@pytest.mark.parametrize("host", ["owner", "stranger"])
def test_a_damaged_manifest(history: History, kind: str, host: str) -> None:
    name = f"vol/manifests/{history.second}-0"
    if kind == "missing":
        del history.store.objects[name]
    else:
        history.spoil(name, cut if kind == "truncated" else flip(200))
    reader = history.repository if host == "owner" else history.stranger()
    damage = only(reader.verify(sample=1.0))
    assert (damage.object, damage.kind) == (name, kind)
    (one,) = damage.snapshots
    assert (one.snapshot, one.bytes) == (history.second, BLOCKS * BLOCK - 100)


@pytest.mark.parametrize("host", ["owner", "stranger"])
def test_a_damaged_record_or_checkpoint(history: History, host: str) -> None:
    while len(history.names("catalog")) < CHECKPOINT_EVERY + 3:
        history.snapshot()
    for number in (CHECKPOINT_EVERY, CHECKPOINT_EVERY + 1):
        name = f"vol/catalog/000000-{number:08d}"
        whole = history.store.objects.pop(name)
        for kind in ("missing", "rot"):
            reader = history.opened("owner") if host == "owner" else history.stranger()
            damage = only(reader.verify())
            assert (damage.object, damage.kind) == (name, kind)
            assert "sweep anything" in damage.remedy
            assert (len(damage.snapshots) > 30) == (host == "owner"), "a stranger cannot know them"
            history.store.objects[name] = whole
            history.spoil(name, flip(300))
        history.store.objects[name] = whole
    history.spoil("vol/catalog/000000-00000003", flip(100))  # nobody reads it any more
    assert history.stranger().verify(sample=1.0).damages == ()


def test_a_record_that_another_host_knows_otherwise(history: History) -> None:
    name = history.names("catalog")[-1]
    other = History(NamedCalls(), history.folder / "other")
    history.store.objects[name] = other.store.objects[name]
    damage = only(history.repository.verify())
    assert (damage.object, damage.kind) == (name, "contradiction")


def test_the_first_record_of_all_is_missing(history: History) -> None:
    for name in history.names("catalog"):
        del history.store.objects[name]
    damage = only(history.stranger().verify())
    assert (damage.object, damage.kind) == ("vol/catalog/000000-00000000", "missing")


@pytest.mark.parametrize("missing", [True, False])
def test_the_object_repository(history: History, missing: bool) -> None:
    if missing:
        del history.store.objects["repository"]
    else:
        history.spoil("repository", flip(80))
    with pytest.raises(DamagedError, match=r"repository.*put it back from a copy"):
        history.stranger()


def test_what_ends_an_epoch(history: History) -> None:
    other = history.opened("other")
    other.adopt("vol")
    del history.store.objects["vol/catalog/000000-stop"]
    damage = only(other.verify())
    assert (damage.object, damage.kind) == ("vol/catalog/000000-stop", "missing")
    assert only(other.verify(heal=True)).mended
    assert other.verify().damages == ()


def test_volumes_do_not_hide_each_other(history: History, tmp_path: Path) -> None:
    (tmp_path / "b.raw").write_bytes(b"x" * BLOCK)
    history.repository.snapshot(tmp_path / "b.raw", image_format="raw")
    history.spoil("b/catalog/000000-00000001", flip(100))
    history.spoil(history.pack(history.first, 1), cut)
    found = history.stranger().verify()
    assert {(one.volume, one.kind) for one in found.damages} == {("b", "rot"), ("vol", "truncated")}
    assert found.snapshots == 2


def test_what_a_newer_version_wrote_is_left_out_and_no_damage(history: History) -> None:
    name = history.names("catalog")[-1]
    history.spoil(name, lambda data: data.__setitem__(8, 2))
    reader = history.stranger()
    assert reader.verify().damages == ()
    assert [type(error) for error in reader.left_out] != []
    assert all(isinstance(error, RefusedError) for error in reader.left_out)


# A share at a time.


def test_a_share_per_run_gets_round(history: History, store: NamedCalls) -> None:
    objects = {name: len(store.objects[name].data) for kind in ("packs", "manifests")
               for name in history.names(kind)}  # fmt: skip
    read: Counter[str] = Counter()
    for run in range(4):
        store.by_name.clear()
        found = history.opened("owner").verify(sample=0.25)  # what was read is known to a later process
        mine = {name for verb, name in store.of("packs", "manifests") if verb == "get"}
        assert sum(objects[name] for name in mine) >= 0.25 * sum(objects.values())
        assert not (mine & set(read)) or set(read) | mine == set(objects), "the longest unread come first"
        read.update(mine)
        assert found.objects_unproved == len(objects) - len(read), run
    assert set(read) == set(objects)


def test_since_passes_over_what_was_read(history: History, store: NamedCalls) -> None:
    history.repository.verify(sample=0.5)
    half = {name for verb, name in store.of("packs") if verb == "get"}
    store.by_name.clear()
    history.repository.verify(since=DAY)
    rest = {name for verb, name in store.of("packs") if verb == "get"}
    assert half
    assert half & rest == set()
    assert half | rest == set(history.names("packs"))
    store.by_name.clear()
    history.repository.verify(since=DAY, sample=1.0)
    assert store.of("packs") == Counter({("head", name): 1 for name in history.names("packs")})
    history.repository.verify(since=0)
    assert {name for verb, name in store.of("packs") if verb == "get"} == set(history.names("packs"))


@pytest.mark.parametrize(
    ("sample", "since", "names"),
    [
        (None, None, "x"),
        (1.0, None, "abcx"),
        (0.01, None, "ax"),
        (0.5, None, "acx"),
        (None, 50.0, "abcx"),
        (None, 1000.0, "acx"),
        (0.3, 1000.0, "ax"),
    ],
)
def test_which_objects_are_due(sample: float | None, since: float | None, names: str) -> None:
    """`a` was never read, `b` long ago, `c` in the future: that clock was wrong; `x` is damaged."""
    items = [
        CheckItem("b", 10, 100.0),
        CheckItem("a", 10, 0.0),
        CheckItem("c", 10, 5000.0),
        CheckItem("x", 1, 999.0, damaged=True),
    ]
    assert select_for_reading(items, sample, since, now=1000.0) == set(names)


def test_notes_that_are_damaged_count_as_none(history: History) -> None:
    history.repository.verify(sample=1.0)
    (notes,) = (history.folder / "owner").glob("*/vol/cache/proved-*")
    for text in (b"", b"[]", b'{"packs/x": "y"}', b"\xff"):
        notes.write_bytes(text)
        found = history.opened("owner").verify()
        assert found.objects_unproved == len(history.names("packs")) + len(history.names("manifests"))


def test_a_copy_file_by_file_is_read_for_itself(history: History) -> None:
    """Both have one id, and so one folder of local state."""
    history.repository.verify(sample=1.0)
    mirror = NamedCalls()
    mirror.location, mirror.objects = "mirror", dict(history.store.objects)
    name = history.names("packs")[0]
    damaged = bytearray(mirror.objects[name].data)
    damaged[-1] ^= 1
    mirror.objects[name] = Stored(bytes(damaged), 0.0)
    state = LocalState(history.folder / "owner")
    assert only(Repository(mirror, state).verify(since=1000.0)).object == name
    found = history.opened("owner").verify()
    assert (found.damages, found.objects_unproved) == ((), 0)
    assert only(Repository(mirror, state).verify()).object == name, "what is right there is not right here"


def test_notes_of_an_earlier_version_are_taken_over(history: History) -> None:
    history.repository.verify(sample=1.0)
    (notes,) = (history.folder / "owner").glob("*/vol/cache/proved-*")
    notes.rename(notes.with_name("proved"))
    assert history.opened("owner").verify().objects_unproved == 0
    assert not notes.with_name("proved").exists()
    assert history.opened("owner").verify().objects_unproved == 0


# Beside others.


def test_a_sweep_that_repacks_meanwhile_is_no_damage(history: History, store: NamedCalls) -> None:
    owner, stranger = history.opened("owner"), history.stranger()

    def sweeps(phase: str, done: int, total: int) -> None:
        if history.first in {one.snapshot for one in owner.snapshots()}:
            owner.delete([history.first])
            (swept,) = owner.sweep()
            assert swept.packs_repacked == 1
            assert swept.objects_removed == 2, "the repacked pack's old copy and the manifest"

    found = stranger.verify(sample=1.0, progress=sweeps)
    assert found.damages == ()
    assert history.stranger().verify(sample=1.0).damages == ()


def test_verifying_changes_nothing_in_the_store(history: History, store: NamedCalls) -> None:
    history.spoil(history.pack(history.first, 1), cut)
    before = dict(store.objects)
    history.repository.verify(sample=1.0)
    assert store.objects == before
