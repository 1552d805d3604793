"""A volume's life on its host, and on others: real images, daemons, devices and commands."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.cinder.attach.exports import State
from island_fast.cinder.records import SnapshotRef, VolumeRecord
from island_fast.cinder.volumes import is_snapshot_running
from island_fast.errors import DamagedError, IslandError, NotFoundError, RefusedError
from island_fast.qemu.image_lock import ImageLock
from tests.cinder.volumes.conftest import MIB, Host, new_id, read, write
from tests.support import qemu

SIZE = 64 * MIB


def made(host: Host, content: bytes = b"", size: int = SIZE) -> str:
    """A new volume with `content` at 1 MiB, detached again."""
    volume = new_id()
    host.volumes.create(volume, VolumeRecord(size))
    if content:
        write(host.volumes.attach(volume), MIB, content)
        host.volumes.detach(volume)
    return volume


def content(host: Host, volume: str, length: int) -> bytes:
    """What the volume has at 1 MiB."""
    found = read(host.volumes.attach(volume), MIB, length)
    host.volumes.detach(volume)
    return found


def test_a_volume_is_a_record_until_it_is_attached(host: Host) -> None:
    volume = made(host)
    assert os.listdir(host.volumes.records.folder_of(volume)) == ["volume.json"]
    assert host.volumes.provisioned_bytes() == SIZE
    host.volumes.extend(volume, 2 * SIZE)
    path = host.volumes.attach(volume)
    assert path.name == volume
    with open(path, "rb") as device:
        assert device.seek(0, os.SEEK_END) == 2 * SIZE
    assert host.exports.state(volume) is State.ATTACHED
    host.volumes.detach(volume)
    assert host.exports.state(volume) is State.NONE
    mode = host.volumes.records.image_path(volume).stat().st_mode & 0o777
    assert mode == 0o600
    host.volumes.delete(volume)
    host.volumes.delete(volume)
    assert host.volumes.records.volumes() == []
    assert not host.volumes.records.folder_of(volume).exists()


def test_an_image_may_have_to_be_made_at_once(new_host: Callable[..., Host]) -> None:
    host = new_host(lazy=False)
    volume = made(host)
    assert host.volumes.records.image_path(volume).exists()
    host.volumes.create(volume, VolumeRecord(SIZE))  # again
    assert host.volumes.records.read(volume).made


def test_snapshots_of_an_attached_volume_are_incremental_and_restore(host: Host) -> None:
    volume = made(host)
    path = host.volumes.attach(volume)
    write(path, MIB, b"monday")
    first = host.volumes.snapshot(volume, "one")
    write(path, MIB, b"tuesday")
    second = host.volumes.snapshot(volume, "two")
    assert (first.lineage, second.lineage) == (volume, volume)
    assert host.exports.state(volume) is State.ATTACHED
    rows = host.repositories[""].list_snapshots(volume)
    assert [row["label"] for row in rows] == ["one", "two"]
    assert rows[1]["parent"] == rows[0]["snapshot"]
    for origin, expected in ((first, b"monday"), (second, b"tuesday")):
        copy = new_id()
        host.volumes.create(copy, VolumeRecord(SIZE, origin=origin))
        assert content(host, copy, len(expected)) == expected
        host.volumes.delete(copy)


def test_a_snapshot_of_a_detached_volume_leaves_no_daemon(host: Host) -> None:
    volume = made(host, b"content")
    host.volumes.snapshot(volume, "one")
    assert host.exports.state(volume) is State.NONE
    assert host.volumes.volumes_with_pins() == [volume]
    image = host.volumes.records.image_path(volume)
    assert host.volumes.provisioned_bytes() == SIZE + image.stat().st_blocks * 512
    qemu.check(image)


def test_a_volume_that_was_never_attached_can_be_snapshotted(host: Host) -> None:
    volume = made(host)
    origin = host.volumes.snapshot(volume, "nothing")
    copy = new_id()
    host.volumes.create(copy, VolumeRecord(2 * SIZE, origin=origin))
    assert content(host, copy, 8) == bytes(8)
    with open(host.volumes.attach(copy), "rb") as device:
        assert device.seek(0, os.SEEK_END) == 2 * SIZE
    host.volumes.detach(copy)


def test_a_snapshot_is_kept_for_volumes_that_are_not_made_yet(host: Host) -> None:
    volume = made(host, b"content")
    origin = host.volumes.snapshot(volume, "one")
    copy, clone = new_id(), new_id()
    host.volumes.create(copy, VolumeRecord(SIZE, origin=origin))
    host.volumes.clone(copy, clone, SIZE)
    assert host.volumes.find_dependants(origin) == sorted([copy, clone])
    with pytest.raises(RefusedError, match=copy):
        host.volumes.delete_snapshot(volume, origin)
    assert content(host, copy, 7) == content(host, clone, 7) == b"content"
    host.volumes.delete_snapshot(volume, origin)
    host.volumes.delete_snapshot(volume, origin)
    assert host.repositories[""].list_snapshots(volume) == []
    assert host.volumes.volumes_with_pins() == [volume]  # a volume from a snapshot of another begins anew


def test_a_clone_is_a_copy_of_now_while_the_source_is_written(host: Host) -> None:
    volume = made(host)
    path = host.volumes.attach(volume)
    write(path, MIB, b"before")
    clone = new_id()
    host.volumes.clone(volume, clone, 2 * SIZE)
    write(path, MIB, b"after!")
    assert content(host, clone, 6) == b"before"
    assert content(host, volume, 6) == b"after!"
    assert qemu.info(host.volumes.records.image_path(volume)).get("snapshots", []) == []
    assert qemu.info(host.volumes.records.image_path(clone))["virtual-size"] == 2 * SIZE
    host.volumes.clone(volume, clone, 2 * SIZE)  # again: it is there
    assert content(host, clone, 6) == b"before"


def test_what_a_killed_copy_left_in_the_image_goes_with_the_next(host: Host, tmp_path: Path) -> None:
    volume = made(host, b"content")
    image = host.volumes.records.image_path(volume)
    for name in ("copy-0123456789abcdef", "somebody's"):
        qemu.snapshot_create(image, name)
    host.volumes.export(volume, tmp_path / "raw", "raw")
    assert [one["name"] for one in qemu.info(image)["snapshots"]] == ["somebody's"]


def test_export_writes_a_raw_file(host: Host, tmp_path: Path) -> None:
    volume = made(host, b"content")
    target = tmp_path / "raw"
    host.volumes.export(volume, target, "raw")
    assert target.stat().st_size == SIZE
    assert target.read_bytes()[MIB : MIB + 7] == b"content"


def test_extend_while_attached(host: Host) -> None:
    volume = made(host, b"content")
    path = host.volumes.attach(volume)
    host.volumes.extend(volume, 2 * SIZE)
    host.volumes.extend(volume, 2 * SIZE)
    with open(path, "rb") as device:
        assert device.seek(0, os.SEEK_END) == 2 * SIZE
    write(path, 2 * SIZE - 512, b"z" * 512)
    host.volumes.detach(volume)
    assert content(host, volume, 7) == b"content"


def test_revert_goes_back_and_the_next_snapshot_is_a_branch(host: Host) -> None:
    volume = made(host, b"first")
    one = host.volumes.snapshot(volume, "one")
    write(host.volumes.attach(volume), MIB, b"other")
    host.volumes.detach(volume)
    two = host.volumes.snapshot(volume, "two")
    host.volumes.revert(volume, host.volumes.records.read(volume), one)
    assert content(host, volume, 5) == b"first"
    three = host.volumes.snapshot(volume, "three")
    parents = {row["snapshot"]: row["parent"] for row in host.repositories[""].list_snapshots(volume)}
    assert parents == {one.snapshot: None, two.snapshot: one.snapshot, three.snapshot: one.snapshot}


def test_an_image_that_is_gone_is_told_and_never_made_blank(host: Host) -> None:
    volume = made(host, b"first")
    one = host.volumes.snapshot(volume, "one")
    host.volumes.records.image_path(volume).unlink()
    with pytest.raises(NotFoundError, match="is gone"):
        host.volumes.attach(volume)
    host.volumes.revert(volume, host.volumes.records.read(volume), one)
    assert content(host, volume, 5) == b"first"


def test_what_a_killed_restore_left_goes_with_the_next(host: Host) -> None:
    origin = host.volumes.snapshot(made(host, b"content"), "one")
    copy = new_id()
    host.volumes.create(copy, VolumeRecord(SIZE, origin=origin))
    half = host.volumes.records.folder_of(copy) / f".from-{origin.snapshot}.qcow2.island-0123456789abcdef"
    half.write_bytes(bytes(4096))
    assert content(host, copy, 7) == b"content"
    assert sorted(os.listdir(half.parent)) == ["image.qcow2", "volume.json"]


def test_whoever_needs_an_image_that_is_being_made_waits_for_it(host: Host) -> None:
    volume = made(host, b"content")
    origin = host.volumes.snapshot(volume, "one")
    copy = new_id()
    host.volumes.create(copy, VolumeRecord(SIZE, origin=origin))
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(host.volumes.attach(copy))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 3
    assert len(set(paths)) == 1
    assert os.listdir(host.volumes.records.folder_of(copy)).count("image.qcow2") == 1
    assert content(host, copy, 7) == b"content"


def test_detach_while_a_snapshot_is_taken(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = made(host, b"content")
    host.volumes.attach(volume)
    own, seen = host.repositories[""], []

    class Slow:
        """The command, at whose end the volume was detached, extended and attached again."""

        def snapshot(self, *words: object) -> SnapshotRef:
            host.volumes.detach(volume)
            seen.append(host.exports.state(volume))
            host.volumes.extend(volume, 2 * SIZE)
            taken = own.snapshot(*words)  # type: ignore[arg-type]
            host.volumes.attach(volume)
            seen.append(host.exports.state(volume))
            host.volumes.detach(volume)
            seen.append(host.exports.state(volume))
            return taken

    monkeypatch.setitem(host.repositories, "", Slow())
    host.volumes.snapshot(volume, "one")
    assert seen == [State.SERVED, State.ATTACHED, State.SERVED]
    assert host.exports.state(volume) is State.NONE


def test_a_second_snapshot_waits_for_the_first(host: Host) -> None:
    volume = made(host, b"content")
    threads = [
        threading.Thread(target=host.volumes.snapshot, args=(volume, label)) for label in ("one", "two")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row["label"] for row in host.repositories[""].list_snapshots(volume)) == ["one", "two"]


def test_a_snapshot_asked_for_again_is_taken_once(host: Host) -> None:
    volume = made(host, b"content")
    first = host.volumes.snapshot(volume, "one")
    host.volumes.records.change(volume, lineage=None)  # it was taken, but nobody was told
    assert host.volumes.snapshot(volume, "one") == first
    assert host.volumes.records.read(volume).lineage == first.lineage
    assert host.volumes.snapshot(volume, "two") != first
    assert [row["label"] for row in host.repositories[""].list_snapshots(volume)] == ["one", "two"]


def test_what_a_failed_snapshot_left_goes(host: Host) -> None:
    volume = made(host, b"content")
    host.volumes.snapshot(volume, "good")
    orphan = f"island-{repository_id(host)[:8]}.{volume}-{'0' * 32}"
    qemu.snapshot_create(host.volumes.records.image_path(volume), orphan)
    host.volumes.snapshot(volume, "unknown to Cinder")
    host.volumes.forget_snapshot(volume, "unknown to Cinder")
    rows = host.repositories[""].list_snapshots(volume)
    assert [row["label"] for row in rows] == ["good"]
    names = [one["name"] for one in qemu.info(host.volumes.records.image_path(volume))["snapshots"]]
    assert orphan not in names
    host.volumes.forget_snapshot(new_id(), "of a volume that is nowhere")


def repository_id(host: Host) -> str:
    with Repository.open(str(host.folder.parent / "snapshots")) as repository:
        return repository.id


def test_a_snapshot_of_another_repository_is_read_only(host: Host) -> None:
    volume = made(host, b"content")
    origin = host.volumes.snapshot(volume, "one")
    far = SnapshotRef(origin.lineage, origin.snapshot, "far")
    copy = new_id()
    host.volumes.create(copy, VolumeRecord(SIZE, origin=far), at_once=True)
    assert content(host, copy, 7) == b"content"
    with pytest.raises(NotFoundError, match="no repository 'nowhere'"):
        host.volumes.repository_of(SnapshotRef("a", "0" * 32, "nowhere"))


def test_dropping_pins_aborts_a_running_snapshot_first(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = made(host, b"content")
    host.volumes.snapshot(volume, "one")
    assert host.volumes.drop_pins(volume, abort_snapshot=True) == 1
    assert host.volumes.volumes_with_pins() == []
    host.volumes.snapshot(volume, "two")
    own, under_way = host.repositories[""], threading.Event()

    class Slow:
        """The command, which is not done before it is told to end."""

        unpin = own.unpin

        def snapshot(self, image: Path, *words: object) -> SnapshotRef:
            *_, cancelled = words
            with ImageLock(image):
                under_way.set()
                while not cancelled():  # type: ignore[operator]
                    time.sleep(0.01)
            return own.snapshot(image, *words)  # type: ignore[arg-type]

    monkeypatch.setitem(host.repositories, "", Slow())
    with ThreadPoolExecutor() as pool:
        third = pool.submit(host.volumes.snapshot, volume, "three")
        under_way.wait()
        assert host.volumes.drop_pins(volume, abort_snapshot=False) == 0
        assert not third.done()
        assert host.volumes.drop_pins(volume, abort_snapshot=True) == 0
        with pytest.raises(IslandError, match="was aborted because the host's disk is nearly full"):
            third.result()
    assert host.volumes.drop_pins(volume, abort_snapshot=True) == 1
    assert [row["label"] for row in own.list_snapshots(volume)] == ["one", "two"]


def test_pins_are_dropped_though_a_snapshot_ended_just_now(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = made(host, b"content")
    host.volumes.snapshot(volume, "one")
    lock = ImageLock(host.volumes.records.image_path(volume))
    lock.__enter__()

    def ended(image: Path) -> bool:
        if lock.fd >= 0:
            lock.__exit__(None, None, None)
        return is_snapshot_running(image)

    monkeypatch.setattr("island_fast.cinder.volumes.is_snapshot_running", ended)
    assert host.volumes.drop_pins(volume, abort_snapshot=False) == 1


def test_a_volume_goes_on_under_another_name(host: Host) -> None:
    volume, name = made(host, b"content"), new_id()
    host.volumes.snapshot(volume, "one")
    host.volumes.rename(volume, name)
    host.volumes.rename(volume, name)
    assert host.volumes.records.volumes() == [name]
    second = host.volumes.snapshot(name, "two")
    assert second.lineage == volume
    assert [row["label"] for row in host.repositories[""].list_snapshots(volume)] == ["one", "two"]


def test_a_damaged_record_stands_in_the_way_of_its_own_volume_alone(host: Host) -> None:
    volume, damaged = made(host, b"content"), made(host, b"content")
    snapshot = host.volumes.snapshot(volume, "one")
    (host.volumes.records.folder_of(damaged) / "volume.json").write_text("{")
    assert host.volumes.volumes_with_pins() == [volume]
    assert SIZE < host.volumes.provisioned_bytes() < 2 * SIZE
    with pytest.raises(DamagedError):
        host.volumes.attach(damaged)
    with pytest.raises(DamagedError):
        host.volumes.delete_snapshot(volume, snapshot)  # perhaps that one needs it
    host.volumes.delete(damaged)
    host.volumes.delete_snapshot(volume, snapshot)
    assert host.volumes.records.volumes() == [volume]


def test_changes_of_one_record_by_two_threads_are_both_kept(host: Host) -> None:
    """A snapshot notes its label while the volume grows."""
    volume, records = made(host), host.volumes.records

    def change(field: str, values: list[object]) -> None:
        for value in values:
            records.change(volume, **{field: value})
            assert getattr(records.read(volume), field) == value

    with ThreadPoolExecutor(2) as pool:
        labels = pool.submit(change, "label", [str(number) for number in range(100)])
        sizes = pool.submit(change, "size", [SIZE + number for number in range(100)])
        labels.result()
        sizes.result()
    assert records.read(volume) == VolumeRecord(SIZE + 99, label="99")
