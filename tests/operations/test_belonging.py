"""What belongs together: an image and its volume, a repository and its place, a host and its local state."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import ConflictError, DamagedError, RefusedError, StoreError
from island_fast.images import device_names
from island_fast.operations import image_of_volume
from island_fast.operations.retain import Keep
from island_fast.repository import identity
from island_fast.repository.identity import Machine
from island_fast.repository.local_state import LocalState
from tests.operations.conftest import PACK, check
from tests.support import qemu
from tests.support.memory_store import MemoryStore

MIB = 1 << 20
BLOCK = 65536

Be = Callable[[str], None]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "vol.qcow2", 4 * MIB, lazy_refcounts="on")
    qemu.noise(path, 0, MIB, 1)
    return path


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> Be:
    """`on_host(name)`: from here on this is the machine of that name."""

    def be(name: str) -> None:
        monkeypatch.setattr(identity, "_read_machine", lambda: Machine(f"id of {name}", "", name))

    be("one")
    return be


def at_host(store: MemoryStore, state: Path) -> Repository:
    return Repository(store, LocalState(state), create=True)


# Images.


def test_a_copy_of_an_image_gets_into_no_volume_but_its_own(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    first = repository.snapshot(image)
    copy = Path(shutil.copy(image, tmp_path / "copy.qcow2"))
    qemu.noise(copy, MIB, BLOCK, 2)
    for volume in (None, "vol"):
        with pytest.raises(RefusedError, match=r"whose image is another file, .*--volume.*island adopt vol"):
            repository.snapshot(copy, volume=volume)
    assert "whose image is another file" in repository.outlook(copy).next_reason
    assert [one.snapshot for one in repository.snapshots()] == [first.snapshot]
    assert repository.snapshot(copy, volume="own").volume == "own"
    assert repository.snapshot(copy).volume == "own", "it is known from now on"
    assert repository.snapshot(copy, pin=False).volume == "own"
    assert repository.snapshot(image).rule == "table-diff"
    repository.adopt("vol")
    shutil.copy(image, copy)
    assert repository.snapshot(copy, volume="vol").rule == "table-diff", "it takes the original's place"
    with pytest.raises(RefusedError, match="whose image is another file"):
        repository.snapshot(image)


def test_two_copies_of_a_template_that_is_gone_do_not_share_its_volume(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    repository.snapshot(image)
    one, two = (Path(shutil.copy(image, tmp_path / f"{name}.qcow2")) for name in ("one", "two"))
    image.unlink()
    (note,) = repository.snapshot(one).notes
    assert note == f"{one} is the image of volume vol from now on; {image} is gone"
    with pytest.raises(RefusedError, match=f"whose image is another file, {one}"):
        repository.snapshot(two)
    assert repository.snapshot(one).notes == ()


def test_an_image_that_is_renamed_stays_its_volumes(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    first = repository.snapshot(image)
    moved = image.rename(tmp_path / "moved.qcow2")
    for pin in (True, False):
        taken = repository.snapshot(moved, pin=pin)
        assert (taken.volume, taken.parent, taken.notes) == ("vol", first.snapshot, ())
        first = taken
    hard = tmp_path / "hard.qcow2"
    os.link(moved, hard)
    assert repository.snapshot(hard).volume == "vol"


def test_images_that_swap_their_names_keep_their_volumes(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    other = qemu.create(tmp_path / "other.qcow2", 4 * MIB, lazy_refcounts="on")
    repository.snapshot(image)
    repository.snapshot(other)
    image.rename(tmp_path / "x")
    other.rename(image)
    (tmp_path / "x").rename(other)
    for path, volume in ((image, "other"), (other, "vol"), (image, "other"), (other, "vol")):
        taken = repository.snapshot(path)
        assert (taken.volume, taken.rule, taken.notes) == (volume, "table-diff", ())


def test_a_raw_image_that_is_renamed_stays_its_volumes(repository: Repository, tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"\1" * MIB)
    repository.snapshot(raw, image_format="raw")
    moved = raw.rename(tmp_path / "moved.raw")
    assert repository.snapshot(moved, image_format="raw").volume == "disk"
    shutil.copy(moved, raw)
    with pytest.raises(RefusedError, match="already has a volume disk"):
        repository.snapshot(raw, image_format="raw")


def test_an_image_with_the_inode_of_a_deleted_one_is_another(repository: Repository, tmp_path: Path) -> None:
    """A file system gives an inode out again at once: to the next guest's image."""
    for kind in ("raw", "qcow2"):
        for number in range(64):
            old, new = (tmp_path / f"{name}-{kind}-{number}" for name in ("old", "new"))
            qemu.run("qemu-img", "create", "-q", "-f", kind, old, MIB)
            first = repository.snapshot(old, image_format=kind)
            inode = old.stat().st_ino
            old.unlink()
            qemu.run("qemu-img", "create", "-q", "-f", kind, new, MIB)
            if new.stat().st_ino == inode:
                break
        else:
            pytest.skip("this file system does not give inodes out again at once")
        with pytest.raises(RefusedError, match="not known as its image"):
            repository.snapshot(new, volume=first.volume, image_format=kind)
        assert repository.snapshot(new, image_format=kind).volume == new.name
        assert [one.snapshot for one in repository.snapshots(first.volume)] == [first.snapshot]


def test_a_note_of_a_file_that_was_replaced_by_one_with_its_inode(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    for _ in range(64):
        repository.snapshot(image)
        inode = image.stat().st_ino
        image.unlink()
        qemu.create(image, 4 * MIB)
        if image.stat().st_ino == inode:
            break
    else:
        pytest.skip("this file system does not give inodes out again at once")
    assert "is not the file of the last snapshot" in repository.snapshot(image).notes[0]


def test_raw_images_that_swap_their_names_keep_their_volumes(repository: Repository, tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        path.write_bytes(path.name.encode() * MIB)
        repository.snapshot(path, image_format="raw")
    paths[0].rename(tmp_path / "x")
    paths[1].rename(paths[0])
    (tmp_path / "x").rename(paths[1])
    for path, volume in zip(paths, ("two", "one"), strict=True):
        taken = repository.snapshot(path, image_format="raw")
        assert (taken.volume, taken.blocks_changed) == (volume, 0)


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two files of other content, to make loop devices of."""
    if os.geteuid() or not Path("/dev/loop-control").exists():
        pytest.skip("a loop device needs root and /dev/loop-control")
    files = tmp_path / "disk1", tmp_path / "disk2"
    for number, file in enumerate(files, 1):
        file.write_bytes(bytes([number]) * MIB)
    yield files
    for file in files:
        for device in qemu.run("losetup", "--noheadings", "--output", "NAME", "-j", file).split():
            qemu.run("losetup", "--detach", device)


def test_a_device_whose_number_is_another_ones_is_not_it(
    repository: Repository, disks: tuple[Path, Path]
) -> None:
    """As at a restart, where /dev/dm-3 becomes another volume."""
    device = Path(qemu.run("losetup", "--find", "--show", disks[0]).strip())
    first = repository.snapshot(device, image_format="raw")
    qemu.run("losetup", "--detach", device)
    qemu.run("losetup", device, disks[1])
    for volume in (None, first.volume):
        with pytest.raises(
            RefusedError, match=f"{device} is another device .*{disks[0]}, and is .*{disks[1]}"
        ):
            repository.snapshot(device, volume=volume, image_format="raw")
    moved = Path(qemu.run("losetup", "--find", "--show", disks[0]).strip())
    taken = repository.snapshot(moved, image_format="raw")
    assert (taken.volume, taken.parent, taken.blocks_changed) == (first.volume, first.snapshot, 0)
    repository.adopt(first.volume)
    assert repository.snapshot(device, volume=first.volume, image_format="raw").blocks_changed == 16


def test_a_device_without_a_name_is_known_by_its_number(
    repository: Repository, disks: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_of_volume, "find_stable_name", lambda _: "")
    node = tmp_path / "node"
    for number, file in enumerate(disks):
        device = Path(qemu.run("losetup", "--find", "--show", file).strip())
        os.mknod(node, stat.S_IFBLK | 0o600, device.stat().st_rdev)
        if number == 0:
            first = repository.snapshot(node, image_format="raw")
            assert repository.snapshot(device, volume="node", image_format="raw").parent == first.snapshot
            repository.snapshot(node, image_format="raw")
            node.unlink()
    with pytest.raises(RefusedError, match=r"another device .* it was number 7:\d+, and is number 7:"):
        repository.snapshot(node, image_format="raw")


def test_what_an_older_version_knows_of_a_device_is_enough(
    repository: Repository, disks: tuple[Path, Path]
) -> None:
    device = Path(qemu.run("losetup", "--find", "--show", disks[0]).strip())
    first = repository.snapshot(device, image_format="raw")
    note = repository.lineage(first.volume).files.folder / "image"
    status = device.stat()
    for value in (
        f'{{"path": "{device}"}}',
        f'{{"path": "{device}", "device": {status.st_dev}, "inode": {status.st_ino}}}',
    ):
        note.write_text(value)
        assert repository.snapshot(device, image_format="raw").notes == ()
        assert f'"name": "loop/backing_file {disks[0]}"' in note.read_text()


def test_the_names_that_devices_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_names, "SYSFS_DEVICES", tmp_path)
    for number, (key, value) in enumerate(
        [
            ("dm/uuid", "LVM-x"),
            ("dm/name", "crypt"),
            ("wwid", "eui.1"),
            ("device/wwid", "naa.5"),
            ("serial", "s1"),
        ]
    ):
        file = tmp_path / f"8:{number}" / key
        file.parent.mkdir(parents=True)
        file.write_text(f"{value}\n")
        (tmp_path / f"8:{number}" / "part3").mkdir()
        (tmp_path / f"8:{number}/part3/partition").write_text("3\n")
        (tmp_path / f"9:{number}").symlink_to(f"8:{number}/part3")
        assert device_names.find_stable_name(os.makedev(8, number)) == f"{key} {value}"
        assert device_names.find_stable_name(os.makedev(9, number)) == f"{key} {value} part 3"
    assert device_names.find_stable_name(os.makedev(10, 0)) == ""


def test_an_image_that_is_replaced_goes_on(repository: Repository, image: Path, tmp_path: Path) -> None:
    first = repository.snapshot(image)
    repository.restore(first.snapshot, tmp_path / "back.qcow2")
    (tmp_path / "back.qcow2").rename(image)
    taken = repository.snapshot(image)
    assert (taken.parent, taken.rule, taken.notes) == (first.snapshot, "table-diff", ())
    qemu.run("qemu-img", "convert", "-O", "qcow2", image, tmp_path / "compact.qcow2")
    (tmp_path / "compact.qcow2").rename(image)
    taken = repository.snapshot(image)
    assert (taken.volume, taken.rule) == ("vol", "full-scan")
    assert "is not the file of the last snapshot" in taken.notes[0]
    assert repository.snapshot(image).notes == ()


def test_a_restored_image_beside_the_old_one_is_a_copy(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    first = repository.snapshot(image)
    back = tmp_path / "back.qcow2"
    repository.restore(first.snapshot, back)
    with pytest.raises(RefusedError, match="whose image is another file"):
        repository.snapshot(back)
    image.unlink()
    assert repository.snapshot(back).rule == "table-diff"


def test_two_copies_at_the_same_moment(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any image may continue the volume, both look, and one is faster."""
    repository.snapshot(image)
    copy = Path(shutil.copy(image, tmp_path / "copy.qcow2"))
    repository.adopt("vol")
    real, refused = Repository.remember, []

    def remember(self: Repository) -> None:
        real(self)
        if not refused:
            refused.append(True)
            at_host(store, repository.state.root).snapshot(copy)

    monkeypatch.setattr(Repository, "remember", remember)
    with pytest.raises(RefusedError, match=f"whose image is another file, {copy}"):
        repository.snapshot(image)


def test_an_image_of_another_hosts_volume_begins_none_in_silence(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    first = repository.snapshot(image)
    moved = image.rename(tmp_path / "web.qcow2")
    other = at_host(store, tmp_path / "other")
    with pytest.raises(ConflictError, match=r"pin of volume vol, .*'island adopt vol'.*--volume"):
        other.snapshot(moved)
    assert [one.volume for one in repository.snapshots()] == ["vol"]
    assert "island adopt vol" in other.outlook(moved).next_reason
    other.adopt("vol")
    taken = other.snapshot(moved)
    assert (taken.volume, taken.parent, taken.rule) == ("vol", first.snapshot, "table-diff")
    with pytest.raises(ConflictError, match="belongs to host"):
        repository.snapshot(moved)


def test_what_an_older_version_knows_of_an_image_is_enough(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    repository.snapshot(image)
    note = repository.lineage("vol").files.folder / "image"
    note.write_text(f'{{"path": "{image}"}}')
    copy = Path(shutil.copy(image, tmp_path / "copy.qcow2"))
    with pytest.raises(RefusedError, match="whose image is another file"):
        repository.snapshot(copy)
    assert repository.snapshot(image).notes == ()
    assert f'"inode": {image.stat().st_ino}' in note.read_text()


# Hosts.


def test_a_cloned_host_owns_nothing(
    store: MemoryStore, image: Path, tmp_path: Path, on_host: Be, caplog: pytest.LogCaptureFixture
) -> None:
    first = at_host(store, tmp_path / "one").snapshot(image)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    twin = Path(shutil.copy(image, tmp_path / "twin.qcow2"))
    on_host("two")
    clone = at_host(store, tmp_path / "two")
    for verb in (
        lambda: clone.snapshot(twin),
        lambda: clone.snapshot(image, volume="vol"),
        lambda: clone.delete([first.snapshot]),
        lambda: clone.sweep(),
        lambda: clone.retain(Keep(last=1)),
        lambda: clone.retain(Keep(last=1), volume="vol"),
    ):
        with pytest.raises(ConflictError, match="island adopt"):
            verb()
    assert "made on another machine, one" in caplog.text
    assert len(clone.snapshots()) == 1
    on_host("one")
    assert at_host(store, tmp_path / "one").snapshot(image).parent == first.snapshot


def test_a_clone_that_cannot_be_told_apart_is_found_by_what_it_writes(
    store: MemoryStore, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that kept its machine-id, whose copies have names of their own."""
    name = "one"
    monkeypatch.setattr(identity, "_read_machine", lambda: Machine("a" * 32, "", name))
    at_host(store, tmp_path / "one").snapshot(image)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "one").rename(tmp_path / "elsewhere")  # each machine has one folder
    name = "two"
    at_host(store, tmp_path / "two").snapshot(image)
    name = "one"
    (tmp_path / "two").rename(tmp_path / "elsewhere2")
    (tmp_path / "elsewhere").rename(tmp_path / "one")
    at_host(store, tmp_path / "one").snapshot(image)
    name = "two"
    (tmp_path / "one").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere2").rename(tmp_path / "two")
    for _ in range(2):
        with pytest.raises(ConflictError, match="island adopt vol"):
            at_host(store, tmp_path / "two").snapshot(image)
    name = "one"
    (tmp_path / "two").rename(tmp_path / "elsewhere2")
    (tmp_path / "elsewhere").rename(tmp_path / "one")
    assert at_host(store, tmp_path / "one").snapshot(image).volume == "vol"


@pytest.mark.usefixtures("small_packs")
def test_local_state_that_was_put_back_uses_no_id_again(
    repository: Repository, store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The interrupted snapshot was finished, copied, deleted and swept since."""
    image = qemu.create(tmp_path / "vol.qcow2", 64 * MIB, lazy_refcounts="on")
    qemu.noise(image, 0, 4 * PACK * BLOCK, 1)
    repository.snapshot(image)
    qemu.noise(image, 0, 4 * PACK * BLOCK, 2)
    with monkeypatch.context() as patch:
        real, sent = MemoryStore.put, []

        def put(self: MemoryStore, name: str, parts: list[bytes]) -> None:
            if len(sent) == 2:
                raise StoreError("the store does not answer")
            sent.append(name)
            real(self, name, parts)

        patch.setattr(MemoryStore, "put", put)
        with pytest.raises(StoreError):
            repository.snapshot(image)
    kept = shutil.copytree(repository.state.root, tmp_path / "kept")
    shutil.copy(image, tmp_path / "kept.qcow2")
    used = repository.snapshot(image)
    assert used.attempt == 1
    far = at_host(MemoryStore(location="far"), repository.state.root)
    repository.copy(far)
    repository.delete([used.snapshot])
    repository.sweep()
    shutil.rmtree(repository.state.root)
    shutil.copytree(kept, repository.state.root)
    (tmp_path / "kept.qcow2").rename(image)
    qemu.noise(image, 0, BLOCK, 3)
    back = at_host(store, repository.state.root)
    taken = back.snapshot(image)
    assert (taken.snapshot != used.snapshot, taken.attempt, taken.blocks_kept) == (True, 0, 0)
    check(back, taken.snapshot, qemu.content(image), tmp_path)


def test_local_state_that_is_older_than_the_catalog_forgets_what_was_in_progress(
    repository: Repository, store: MemoryStore, image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a revert of the disk that it is on: no folder and no file is another one."""
    repository.snapshot(image)
    files = repository.lineage("vol").files
    old = (files.folder / "newest").read_bytes()
    repository.snapshot(image)
    (files.folder / "newest").write_bytes(old)
    (files.folder / "running" / ("5" * 32)).write_text("{}")
    with caplog.at_level(logging.WARNING):
        repository.snapshot(image)
    assert "local state is older" in caplog.text
    assert files.registrations.all() == []
    caplog.clear()
    repository.snapshot(image)
    assert not caplog.records


def test_what_other_processes_of_the_host_append_is_its_own(
    repository: Repository, store: MemoryStore, image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also what a process that died left to be settled, and what an older version appended."""
    first = repository.snapshot(image)
    lineage = repository.existing_lineage("vol")
    other = at_host(store, repository.state.root)
    with pytest.MonkeyPatch.context() as dying:
        dying.setattr(type(lineage.files), "set_newest_record", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            other.delete([first.snapshot])
    repository.snapshot(image)
    other.snapshot(image)
    (lineage.files.folder / "newest").unlink()
    repository.snapshot(image)
    assert not caplog.records


def test_a_volume_that_is_gone_from_its_repository_is_not_begun_again(
    repository: Repository, store: MemoryStore, image: Path
) -> None:
    repository.snapshot(image)
    for name in [name for name in store.objects if name.startswith("vol/")]:
        del store.objects[name]
    shutil.rmtree(repository.lineage("vol").files.folder / "cache")
    with pytest.raises(DamagedError, match="volume vol is gone"):
        repository.snapshot(image, volume="vol")


# Repositories.


def test_no_repository_is_begun_where_one_was(image: Path, tmp_path: Path) -> None:
    """Its disk is not mounted, or it is the next disk's turn."""
    place, state = tmp_path / "mnt", tmp_path / "state"

    def opened(**how: bool) -> Repository:
        return Repository.open(place, state=state, create=True, **how)

    with opened() as repository:
        repository.snapshot(image)
        first = repository.id
    place.rename(tmp_path / "first")
    for _ in range(2):
        with pytest.raises(RefusedError, match=r"there is no repository.*--create"):
            opened()
        assert not place.exists() or not list(place.iterdir())
        place.mkdir(exist_ok=True)
    with opened(create_anew=True) as repository:
        repository.snapshot(image, volume="second")
        assert repository.id != first
    for disk in ("second", "first"):
        place.rename(tmp_path / "other")
        (tmp_path / "first").rename(place)
        (tmp_path / "other").rename(tmp_path / "first")
        with opened() as repository:
            repository.snapshot(image, volume=disk if disk == "second" else "vol")


def test_another_repository_than_the_known_one_is_not_used_in_silence(image: Path, tmp_path: Path) -> None:
    place, state = tmp_path / "mnt", tmp_path / "state"
    with Repository.open(place, state=state, create=True) as repository:
        repository.snapshot(image)
    place.rename(tmp_path / "away")
    with Repository.open(place, state=tmp_path / "another", create=True) as repository:
        repository.snapshot(image, volume="theirs")
    with pytest.raises(RefusedError, match=r"holds a different repository.*--create"):
        Repository.open(place, state=state, create=True)
    with Repository.open(place, state=state) as repository:
        assert len(repository.snapshots()) == 1, "it can be read"


def test_a_copy_begins_no_repository_where_one_was(image: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with Repository.open(tmp_path / "near", state=state, create=True) as near:
        near.snapshot(image)
        with Repository.open(tmp_path / "far", state=state, create=True) as far:
            near.copy(far)
        shutil.rmtree(tmp_path / "far")
        with pytest.raises(RefusedError, match="there is no repository"):
            Repository.open(tmp_path / "far", state=state, create=True)


def test_a_place_is_the_same_from_everywhere(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    with Repository.open("repo", state=tmp_path / "state", create=True) as repository:
        repository.snapshot(image)
    shutil.rmtree(tmp_path / "here" / "repo")
    for place in (tmp_path / "here" / "repo", tmp_path / "link" / "repo"):
        with pytest.raises(RefusedError, match="there is no repository"):
            Repository.open(place, state=tmp_path / "state", create=True)
    monkeypatch.chdir(tmp_path)
    with Repository.open("repo", state=tmp_path / "state", create=True) as repository:
        assert repository.snapshot(image).volume == "vol", "another place of that name"


# Copies.


def test_one_id_with_two_contents_is_not_taken_for_a_copy(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However two hosts came to use one id, a copy of the one is not there because the other is."""
    far_store = MemoryStore(location="far")
    far = at_host(far_store, tmp_path / "state of far")
    first = repository.snapshot(image)
    repository.copy(far)
    twin = at_host(MemoryStore(location="twin"), tmp_path / "state of twin")
    lineage = far.existing_lineage("vol")
    other = qemu.create(tmp_path / "other.qcow2", 4 * MIB, lazy_refcounts="on")
    qemu.noise(other, 0, MIB, 9)
    with monkeypatch.context() as patch:
        patch.setattr("island_fast.operations.snapshot.make_id", lambda: first.snapshot)
        patch.setattr("os.urandom", _seeded(lineage.seed))
        twin.snapshot(other, volume="vol")
    assert twin.existing_lineage("vol").seed == lineage.seed
    second = twin.snapshot(other)
    copied = twin.copy(far)
    (error,) = twin.left_out
    assert isinstance(error, DamagedError)
    assert f"{first.snapshot} of volume vol in far is not a copy" in str(error)
    assert [(one.snapshot, one.parent) for one in copied] == [(second.snapshot, first.snapshot)]
    check(far, first.snapshot, qemu.content(image), tmp_path)
    check(far, second.snapshot, qemu.content(other), tmp_path)


def _seeded(seed: int) -> Callable[[int], bytes]:
    """What os.urandom gives while a lineage is made: the seed that is wanted, and random ids."""
    real = os.urandom
    return lambda size: (seed << 1).to_bytes(8) if size == 8 else real(size)
