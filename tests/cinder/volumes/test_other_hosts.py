"""Volumes that go from one host to another, by will or because theirs is lost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from island_fast.cinder.island_command import IslandCommand
from island_fast.cinder.manage import ManageableVolumes
from island_fast.cinder.records import VolumeRecord
from island_fast.errors import ImageInUseError, IslandError, NotFoundError, RefusedError
from tests.cinder.volumes.conftest import MIB, Host, new_id, write
from tests.cinder.volumes.test_volumes import SIZE, content, made
from tests.support import qemu


def test_a_volume_goes_to_another_host_through_the_repository(new_host: Callable[..., Host]) -> None:
    here, there = new_host(), new_host()
    volume = made(here, b"content")
    here.volumes.snapshot(volume, "kept")
    record = here.volumes.prepare_migration(volume, "passing")
    assert not here.volumes.records.image_path(volume).exists()
    assert (record.passing, record.lineage) == (True, volume)
    there.volumes.create(volume, record)
    assert content(there, volume, 7) == b"content"
    assert [row["label"] for row in there.repositories[""].list_snapshots(volume)] == ["kept"]
    after = there.volumes.snapshot(volume, "after")
    assert there.repositories[""].list_snapshots(volume)[-1]["snapshot"] == after.snapshot
    qemu.check(there.volumes.records.image_path(volume))


def test_a_departed_volume_that_nobody_took_over_is_made_again(host: Host) -> None:
    volume = made(host, b"content")
    host.volumes.prepare_migration(volume, "passing")
    assert content(host, volume, 7) == b"content"
    assert host.repositories[""].list_snapshots(volume) == []


def test_a_lost_host(new_host: Callable[..., Host]) -> None:
    lost, here = new_host(), new_host()
    volume = made(lost, b"content")
    origin = lost.volumes.snapshot(volume, "kept")
    here.volumes.revert(volume, VolumeRecord(SIZE, volume), origin)
    assert content(here, volume, 7) == b"content"
    here.volumes.snapshot(volume, "after")
    with pytest.raises(RefusedError, match="adopt"):
        lost.volumes.snapshot(volume, "late")


def test_a_volume_that_came_back_is_made_from_what_it_became(new_host: Callable[..., Host]) -> None:
    here, there = new_host(), new_host()
    volume = made(here, b"content")
    there.volumes.adopt_record(volume, here.volumes.prepare_migration(volume, "passing"))
    write(there.volumes.attach(volume), MIB, b"changed")
    there.volumes.detach(volume)
    here.volumes.adopt_record(volume, there.volumes.prepare_migration(volume, "passing"))
    assert content(here, volume, 7) == b"changed"
    assert here.repositories[""].list_snapshots(volume) == []


def test_of_two_calls_for_a_volume_that_came_back_one_makes_it(new_host: Callable[..., Host]) -> None:
    """The other one waits for the lock meanwhile, and must not go by what it knew before."""
    here, there = new_host(), new_host()
    volume = made(here, b"content")
    there.volumes.adopt_record(volume, here.volumes.prepare_migration(volume, "passing"))
    write(there.volumes.attach(volume), MIB, b"changed")
    there.volumes.detach(volume)
    record = there.volumes.prepare_migration(volume, "passing")
    with ThreadPoolExecutor(1) as pool:
        with here.volumes._lock(volume):
            second = pool.submit(here.volumes.adopt_record, volume, record)
            time.sleep(0.3)  # it has come as far as it can
            here.volumes.records.image_path(volume).unlink(missing_ok=True)
            here.volumes.records.write(volume, record)
            here.volumes._ensure_image(volume)
        second.result()
    assert content(here, volume, 7) == b"changed"


def test_a_volume_that_came_back_meanwhile_is_not_forgotten(new_host: Callable[..., Host]) -> None:
    here, there = new_host(), new_host()
    volume = made(here, b"content")
    departed = here.volumes.prepare_migration(volume, "passing")
    there.volumes.adopt_record(volume, departed)
    there.volumes.ensure_image(volume)
    here.volumes.adopt_record(volume, there.volumes.prepare_migration(volume, "passing"))
    here.volumes.forget(volume, departed)
    assert content(here, volume, 7) == b"content"
    there.volumes.forget(volume, there.volumes.records.read(volume))
    assert there.volumes.records.volumes() == []


def test_a_volume_departs_without_the_snapshot_that_it_was_to_be_made_from(
    new_host: Callable[..., Host],
) -> None:
    here, there = new_host(), new_host()
    source, volume, blank = made(here, b"content"), new_id(), new_id()
    origin = here.volumes.snapshot(source, "kept")
    here.volumes.create(volume, VolumeRecord(SIZE, origin=origin))
    here.volumes.create(blank, VolumeRecord(SIZE))
    there.volumes.adopt_record(volume, here.volumes.prepare_migration(volume, "passing"))
    there.volumes.adopt_record(blank, here.volumes.prepare_migration(blank, "passing"))
    here.volumes.delete_snapshot(source, origin)
    assert content(there, volume, 7) == b"content"
    assert content(there, blank, 7) == bytes(7)
    assert blank not in here.volumes.records.volumes()


def test_a_departed_volume_cannot_be_managed_where_it_was(host: Host) -> None:
    volume = made(host, b"content")
    host.volumes.prepare_migration(volume, "passing")
    assert ManageableVolumes(host.volumes).list_volumes({}) == []
    with pytest.raises(NotFoundError):
        ManageableVolumes(host.volumes).manage(new_id(), {"source-name": volume})


def test_a_volume_that_came_by_snapshot_is_whole_when_it_is_left(new_host: Callable[..., Host]) -> None:
    here, there = new_host(), new_host()
    volume, again = made(here, b"content"), new_id()
    there.volumes.adopt_record(volume, here.volumes.prepare_migration(volume, "passing"))
    there.volumes.release(volume)
    ManageableVolumes(there.volumes).manage(again, {"source-name": volume})
    assert content(there, again, 7) == b"content"


def test_a_revert_that_failed_leaves_no_blank_volume(
    new_host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, here = new_host(), new_host()
    volume = made(lost, b"content")
    origin = lost.volumes.snapshot(volume, "kept")

    def fail(*_: object, **__: object) -> None:
        raise IslandError("the store is down")

    for verb in ("adopt", "restore"):
        with monkeypatch.context() as patched:
            patched.setattr(IslandCommand, verb, fail)
            with pytest.raises(IslandError, match="the store is down"):
                here.volumes.revert(volume, VolumeRecord(SIZE, volume), origin)
        with pytest.raises(NotFoundError):
            here.volumes.attach(volume)
    here.volumes.revert(volume, VolumeRecord(SIZE, volume), origin)
    assert content(here, volume, 7) == b"content"
    here.volumes.snapshot(volume, "after")  # and the lineage is this host's


def test_the_snapshots_of_a_lost_volume_can_be_deleted(new_host: Callable[..., Host]) -> None:
    lost, here = new_host(), new_host()
    volume = made(lost, b"content")
    origin = lost.volumes.snapshot(volume, "kept")
    with pytest.raises(NotFoundError, match="revert"):
        here.volumes.adopt_record(volume, VolumeRecord(SIZE, volume, made=True))
    here.volumes.delete_snapshot(volume, origin)
    here.volumes.delete(volume)
    assert here.repositories[""].list_snapshots(volume) == []


def newest(host: Host, volume: str, kind: str) -> Path:
    """The newest object of a kind in a directory's repository."""
    files = [path for path in (host.folder.parent / "snapshots" / volume / kind).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("kind, left", [("packs", 0), ("packs", 100), ("manifests", 0), ("catalog", 0)])
def test_an_image_stays_until_the_store_has_what_it_was_said_to_have(
    host: Host, monkeypatch: pytest.MonkeyPatch, kind: str, left: int
) -> None:
    """A store that acknowledges an object and loses it, or a part of it."""
    volume = made(host, b"content")
    real, lost = IslandCommand.snapshot, []

    def snapshot(self: IslandCommand, *words: object) -> object:
        taken = real(self, *words)  # type: ignore[arg-type]
        path = newest(host, volume, kind)
        lost.append((path, path.read_bytes()))
        os.truncate(path, left) if left else path.unlink()
        return taken

    with monkeypatch.context() as patched:
        patched.setattr(IslandCommand, "snapshot", snapshot)
        with pytest.raises(IslandError, match=f"volume {volume} stays on this host"):
            host.volumes.prepare_migration(volume, "passing")
    record = host.volumes.records.read(volume)
    assert record.made
    assert not record.in_transit
    assert content(host, volume, 7) == b"content"
    for path, data in lost:
        path.write_bytes(data)
    assert host.volumes.prepare_migration(volume, "passing").in_transit
    assert content(host, volume, 7) == b"content"


class CutError(BaseException):
    """Stands for the end of the process."""


def test_a_migration_that_is_tried_again_has_what_was_written_since(
    new_host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt was killed when its snapshot was stored, and the server was started again."""
    here, there = new_host(), new_host()
    volume = made(here, b"content")

    def cut(*_: object) -> None:
        raise CutError

    with monkeypatch.context() as patched:
        patched.setattr(IslandCommand, "require_stored", cut)
        with pytest.raises(CutError):
            here.volumes.prepare_migration(volume, "passing")
    write(here.volumes.attach(volume), MIB, b"changed")
    here.volumes.detach(volume)
    there.volumes.adopt_record(volume, here.volumes.prepare_migration(volume, "passing"))
    assert content(there, volume, 7) == b"changed"
    assert there.repositories[""].list_snapshots(volume) == []


def test_a_volume_whose_device_is_open_does_not_depart(new_host: Callable[..., Host]) -> None:
    here, there = new_host(), new_host()
    volume = made(here, b"content")
    device = here.volumes.attach(volume)
    with device.open("r+b", buffering=0) as guest:
        for _ in range(2):
            with pytest.raises(ImageInUseError):
                here.volumes.prepare_migration(volume, "passing")
        guest.seek(MIB)
        guest.write(b"changed".ljust(4096, b"."))
        os.fsync(guest.fileno())
    assert here.volumes.records.read(volume).made
    there.volumes.adopt_record(volume, here.volumes.prepare_migration(volume, "passing"))
    assert content(there, volume, 7) == b"changed"


def test_a_volume_that_departs_is_neither_attached_nor_reverted(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = made(host, b"content")
    kept = host.volumes.snapshot(volume, "kept")
    real = IslandCommand.snapshot

    def snapshot(self: IslandCommand, *words: object) -> object:
        with pytest.raises(RefusedError, match="is being migrated to another host"):
            host.volumes.attach(volume)
        return real(self, *words)  # type: ignore[arg-type]

    def require_stored(*_: object) -> None:
        with pytest.raises(RefusedError, match="is being migrated to another host"):
            host.volumes.revert(volume, VolumeRecord(SIZE, volume), kept)

    monkeypatch.setattr(IslandCommand, "snapshot", snapshot)
    monkeypatch.setattr(IslandCommand, "require_stored", require_stored)
    assert host.volumes.prepare_migration(volume, "passing").in_transit
    assert content(host, volume, 7) == b"content"


def test_an_image_that_a_cut_left_behind_is_not_what_a_volume_is_made_of(
    new_host: Callable[..., Host],
) -> None:
    """The volume went to another host, was written to there, and came back."""
    here, there = new_host(), new_host()
    volume = made(here, b"content")
    image = here.volumes.records.image_path(volume)
    here.exports.stop(volume)
    old = image.read_bytes()
    record = here.volumes.prepare_migration(volume, "passing")
    image.write_bytes(old)  # the cut was before its removal
    assert here.volumes.prepare_migration(volume, "passing") == record
    assert not image.exists()
    image.write_bytes(old)
    there.volumes.adopt_record(volume, record)
    write(there.volumes.attach(volume), MIB, b"changed")
    there.volumes.detach(volume)
    here.volumes.adopt_record(volume, there.volumes.prepare_migration(volume, "passing"))
    assert content(here, volume, 7) == b"changed"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_image_is_a_volume_before_the_snapshot_goes_that_brought_it(
    new_host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """A cut right beside the deletion, and then the volume is migrated on."""
    here, there = new_host(), new_host()
    volume = made(here, b"content")
    there.volumes.adopt_record(volume, here.volumes.prepare_migration(volume, "passing"))
    real = IslandCommand.delete

    def delete(self: IslandCommand, *words: object) -> None:
        if after:
            real(self, *words)  # type: ignore[arg-type]
        raise CutError

    with monkeypatch.context() as patched:
        patched.setattr(IslandCommand, "delete", delete)
        with pytest.raises(CutError):
            there.volumes.attach(volume)
    assert there.volumes.records.read(volume).made
    here.volumes.adopt_record(volume, there.volumes.prepare_migration(volume, "passing"))
    assert content(here, volume, 7) == b"content"
    assert here.repositories[""].list_snapshots(volume) == []
