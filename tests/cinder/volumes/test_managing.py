"""Files and volumes that are taken over, cut off at every step, and asked for again."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from island_fast.cinder import manage
from island_fast.cinder.manage import ManageableVolumes
from island_fast.cinder.records import VolumeRecord, VolumeRecords
from island_fast.cinder.volumes import Volumes
from island_fast.errors import DamagedError, NotFoundError, RefusedError
from island_fast.qcow2.header import MAX_VOLUME_SIZE
from tests.cinder.volumes.conftest import MIB, Host, new_id
from tests.cinder.volumes.test_volumes import content, made
from tests.support import qemu

GIB = 1 << 30
LOOSE = {"source-name": "loose.qcow2"}
STEPS: list[tuple[Any, str]] = [
    (VolumeRecords, "create_folder"),
    (manage, "link_new"),
    (VolumeRecords, "write"),
    (Path, "unlink"),
    (manage, "sync_folder"),
    (Volumes, "extend"),
]


class CutError(BaseException):
    """Stands for the end of the process."""


def loose(host: Host, data: bytes) -> Path:
    folder = host.volumes.records.folder
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOOSE["source-name"]
    source = folder.parent / "source"
    source.write_bytes(data)
    qemu.create(file, GIB - 65536)
    qemu.write_file(file, MIB, source)
    return file


def cut_off(place: Any, name: str, *, after: bool) -> Callable[..., Any]:
    """The function, which ends the process before its first work or after it."""
    real = getattr(place, name)

    def work(*words: Any, **more: Any) -> Any:
        if after:
            real(*words, **more)
        raise CutError

    return work


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system where a file has one name."""

    def link(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("place, name", STEPS, ids=[name for _, name in STEPS])
@pytest.mark.parametrize("same", [True, False], ids=["same", "another"])
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_file_can_be_managed_again_wherever_it_was_cut_off(
    host: Host, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, after: bool, same: bool, links: bool
) -> None:
    loose(host, b"content")
    if not links:
        without_links(monkeypatch)
    manageable, first = ManageableVolumes(host.volumes), new_id()
    with monkeypatch.context() as patched:
        patched.setattr(place, name, cut_off(place, name, after=after))
        with pytest.raises(CutError):
            manageable.manage(first, LOOSE)
    volume = first if same else new_id()
    safe = [entry["reference"] for entry in manageable.list_volumes({}) if entry["safe_to_manage"]]
    if LOOSE in safe or same:
        manageable.manage(volume, LOOSE)
    else:  # it has become a volume, and is listed as that
        assert safe == [{"source-name": first}]
        manageable.manage(volume, safe[0])
    assert content(host, volume, 7) == b"content"
    assert host.volumes.records.volumes() == [volume]
    assert [entry.name for entry in host.volumes.records.folder.iterdir() if any(entry.iterdir())] == [volume]
    assert host.volumes.records.image_path(volume).stat().st_nlink == 1
    assert host.volumes.records.read(volume).size == GIB


def test_of_two_calls_at_once_one_takes_a_file_over(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the second would take the first one's for what a cut left."""
    loose(host, b"content")
    first, second = new_id(), new_id()
    real, errors, others = VolumeRecords.write, [], []

    def manage_second() -> None:
        try:
            ManageableVolumes(host.volumes).manage(second, LOOSE)
        except NotFoundError as error:
            errors.append(error)

    def write(self: VolumeRecords, volume: str, record: VolumeRecord) -> None:
        if not others:
            others.append(threading.Thread(target=manage_second))
            others[0].start()
            others[0].join(1.0)
        real(self, volume, record)

    monkeypatch.setattr(VolumeRecords, "write", write)
    ManageableVolumes(host.volumes).manage(first, LOOSE)
    others[0].join()
    assert len(errors) == 1
    assert host.volumes.records.volumes() == [first]
    assert content(host, first, 7) == b"content"


def test_a_file_that_was_renamed_and_not_recorded_is_given_back(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its new name is the only one that it has."""
    loose(host, b"content")
    volume = new_id()
    without_links(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(VolumeRecords, "write", cut_off(VolumeRecords, "write", after=False))
        with pytest.raises(CutError):
            ManageableVolumes(host.volumes).manage(volume, LOOSE)
    host.volumes.give_back(volume)
    assert content(host, volume, 7) == b"content"


def test_a_volume_whose_renaming_was_cut_off_can_be_managed_again(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, taken = made(host, b"content", GIB), new_id()
    manageable = ManageableVolumes(host.volumes)
    with monkeypatch.context() as patched:
        patched.setattr(VolumeRecords, "rename", cut_off(VolumeRecords, "rename", after=True))
        with pytest.raises(CutError):
            manageable.manage(taken, {"source-name": volume})
    manageable.manage(taken, {"source-name": volume})
    assert content(host, taken, 7) == b"content"
    with pytest.raises(NotFoundError):
        manageable.manage(new_id(), {"source-name": volume})


def test_a_volume_that_cinder_has_is_not_taken_away_from_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by its name, nor by that of the file that it was made of and that a cut left."""
    loose(host, b"content")
    first = new_id()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", cut_off(Path, "unlink", after=False))
        with pytest.raises(CutError):
            ManageableVolumes(host.volumes).manage(first, LOOSE)
    careful = ManageableVolumes(host.volumes, lambda name: name == first)
    for reference in ({"source-name": first}, LOOSE):
        with pytest.raises(RefusedError, match=f"manages volume {first} already"):
            careful.manage(new_id(), reference)
    assert host.volumes.records.volumes() == [first]
    assert content(host, first, 7) == b"content"


def test_a_file_with_a_name_elsewhere_is_still_refused(host: Host) -> None:
    file = loose(host, b"content")
    (host.folder / "elsewhere").hardlink_to(file)
    with pytest.raises(RefusedError, match="no other name"):
        ManageableVolumes(host.volumes).manage(new_id(), LOOSE)
    assert file.exists()


def test_a_volume_over_the_limit_is_refused_before_it_exists(host: Host) -> None:
    size, source = MAX_VOLUME_SIZE + GIB, made(host)
    volume = new_id()
    host.volumes.create(new_id(), VolumeRecord(MAX_VOLUME_SIZE))
    before = host.volumes.records.volumes()
    for call in (
        lambda: host.volumes.create(volume, VolumeRecord(size)),
        lambda: host.volumes.clone(source, volume, size),
        lambda: host.volumes.extend(source, size),
    ):
        with pytest.raises(RefusedError, match=r"65537 GiB cannot be snapshotted.* at most 65536 GiB"):
            call()
    assert host.volumes.records.volumes() == before
    host.volumes.records.write(volume, VolumeRecord(size, made=True))  # of an earlier version
    host.volumes.adopt_record(volume, VolumeRecord(size, made=True))


def test_a_folder_of_volumes_belongs_to_one_service(host: Host, tmp_path: Path) -> None:
    """Whether it is another section, another cinder.conf or another host, and by whatever path."""
    records = host.volumes.records
    volume = made(host, b"content")  # volumes of an earlier version, which wrote no owner
    for _ in range(2):
        records.refuse_other_owner("compute17@ssd")
        records.claim("compute17@ssd")
    (tmp_path / "way").symlink_to(records.folder)
    for folder in (records, VolumeRecords(tmp_path / "way")):
        for call in (folder.refuse_other_owner, folder.claim):
            with pytest.raises(
                RefusedError, match=r"belong to the service compute17@ssd.* delete .*owner.json"
            ):
                call("compute17@hdd")
    assert sorted(path.name for path in records.folder.iterdir()) == sorted([volume, "owner.json"])
    assert records.volumes() == [volume]
    assert [
        entry["reference"]["source-name"] for entry in ManageableVolumes(host.volumes).list_volumes({})
    ] == [volume]
    (records.folder / "owner.json").write_text("{")
    with pytest.raises(DamagedError, match="delete it if only compute17@ssd uses this folder"):
        records.claim("compute17@ssd")


def test_what_was_to_be_managed_stays_and_what_has_no_image_goes(host: Host) -> None:
    """Else a record without an image would keep its snapshot from being deleted."""
    source = made(host, b"content")
    origin = host.volumes.snapshot(source, "kept")
    unmade = new_id()
    host.volumes.create(unmade, VolumeRecord(GIB, origin=origin))
    for volume in (source, unmade, new_id()):
        host.volumes.give_back(volume)
    assert host.volumes.records.volumes() == [source]
    assert content(host, source, 7) == b"content"
    host.volumes.delete_snapshot(source, origin)
