"""Objects with a right checksum and wrong content: refused by name, never a crash."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from island_fast.api import Repository
from island_fast.dirtymap import BLOCK_SIZE
from island_fast.errors import (
    ConflictError,
    DamagedError,
    DamagedObjectError,
    IslandError,
    UnsupportedObjectError,
)
from island_fast.formats import frame
from island_fast.formats.catalog import (
    Packs,
    Record,
    SnapshotAdded,
    SnapshotRow,
    State,
    decode_record,
    encode_record,
)
from island_fast.formats.frame import Kind, Section, json_bytes, open_frame, seal
from island_fast.formats.keys import SnapshotNumbers
from island_fast.formats.manifest import Manifest, build_pack_table, decode, encode
from island_fast.formats.pack import (
    PackHeader,
    compress_blocks,
    digest_blocks,
    open_pack,
    seal_pack,
    stored_ranges,
    unpack_blocks,
)
from island_fast.formats.runs import Runs
from island_fast.operations.restore import RestoreTarget, restore
from island_fast.operations.sweep import plan_sweep
from island_fast.progress import silent
from island_fast.qcow2.snapshots import PinnedBase
from island_fast.repository.local_state import LocalState
from tests.support import qemu
from tests.support.memory_store import MemoryStore, Stored

A = "a" * 32
PIN = PinnedBase("island-x", "1", 17, 5, 1 << 20)
WRONG = [float("inf"), float("nan"), -1, "5", 1.5, True, 1 << 70, [], {}]


def manifest_bytes() -> bytes:
    one = np.array([1], np.int64)
    table, runs = build_pack_table(Runs(one, one, one, one), "vol", SnapshotNumbers([A]))
    manifest = Manifest("vol", A, 0, None, 1 << 20, 1, "label", "full-scan", "why", 7, PIN, table, runs)
    return encode("m", manifest)[0]


def record_bytes(**changes: object) -> bytes:
    numbers = SnapshotNumbers()
    row = SnapshotRow(A, None, 0, "ab" * 16, 77, 5, "label", 1 << 20, 99, PIN)
    event = SnapshotAdded(row)
    record = Record("vol", 0, 1, "w" * 32, "host", "cd" * 32, 1, 7, event, state=State({A: row}))
    return encode_record("r", replace(record, **changes), numbers)[0]  # type: ignore[arg-type]


def altered(kind: Kind, name: str, blob: bytes, path: list[str], value: object) -> bytes:
    """The object with one value of its JSON replaced, and all checksums right again."""
    frame = open_frame(kind, name, blob)
    meta = json.loads(bytes(frame.section(1)))
    place = meta
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    text = json.dumps(meta).encode()
    rest = [Section(k, [bytes(frame.section(k))]) for k in frame.entries if k != 1]
    return b"".join(seal(kind, name, [Section(1, [text]), *rest])[0])


MANIFEST_KEYS = ["attempt", "volume_size", "created", "digest", "seed", "key", "packs", "runs", "block_size"]


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("key", MANIFEST_KEYS)
def test_a_manifests_numbers_are_checked(key: str, value: object) -> None:
    with pytest.raises((DamagedError, UnsupportedObjectError)):
        decode("m", altered(Kind.MANIFEST, "m", manifest_bytes(), [key], value))


NAMES = [
    (key, value)
    for key in ("lineage", "snapshot", "lineages", "snapshots", "pin", "properties")
    for value in (None, 5, [], {"a": 1}, "../x")
    if key != "properties" or not isinstance(value, list | dict)
]


@pytest.mark.parametrize("key,value", NAMES, ids=repr)
def test_a_manifests_names_are_checked(key: str, value: object) -> None:
    with pytest.raises((DamagedError, UnsupportedObjectError)):
        decode("m", altered(Kind.MANIFEST, "m", manifest_bytes(), [key], value))


RECORD_KEYS = [
    ["epoch"], ["number"], ["time"], ["seed"], ["key"], ["rows_16"], ["rows_48"], ["rows_64"],
    ["snapshot", "created"], ["snapshot", "volume_size"], ["snapshot", "stored"],
    ["snapshot", "manifest_size"], ["snapshot", "pin", "seconds"], ["snapshot", "pin", "disk_size"],
]  # fmt: skip


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("path", RECORD_KEYS, ids=".".join)
def test_a_records_numbers_are_checked(path: list[str], value: object) -> None:
    with pytest.raises((DamagedError, UnsupportedObjectError)):
        decode_record("r", altered(Kind.RECORD, "r", record_bytes(), path, value), SnapshotNumbers())


def test_an_unknown_event_is_refused_and_not_called_damage() -> None:
    with pytest.raises(UnsupportedObjectError, match="newer"):
        decode_record(
            "r", altered(Kind.RECORD, "r", record_bytes(), ["event"], "teleport"), SnapshotNumbers()
        )


@pytest.mark.parametrize("event", ["owner", "delete", "sweep"])
def test_a_record_that_carries_what_its_event_does_not_have_is_damaged(event: str) -> None:
    with pytest.raises(DamagedError):
        decode_record("r", altered(Kind.RECORD, "r", record_bytes(), ["event"], event), SnapshotNumbers())
    with pytest.raises(DamagedError):
        decode_record("r", altered(Kind.RECORD, "r", record_bytes(), ["deleted"], [A]), SnapshotNumbers())


def test_a_label_of_any_text_survives_and_can_be_written_again() -> None:
    for label in ("\ud800", "\udcff", "ä\n\0", "🏝"):
        blob = altered(Kind.RECORD, "r", record_bytes(), ["snapshot", "label"], label)
        record, _ = decode_record("r", blob, SnapshotNumbers())
        assert isinstance(record.event, SnapshotAdded)
        assert record.event.snapshot.label == label
        assert json_bytes(record.event.snapshot.as_json())


def with_write_feature(blob: bytes) -> bytes:
    """The object with a write feature that nobody knows, and both checksums right again."""
    data = bytearray(blob)
    struct.pack_into("<I", data, 12, 1 << 5)
    count = struct.unpack_from("<H", data, 10)[0]
    head = bytearray(data[: 72 + 40 * count])
    head[48:72] = bytes(24)
    struct.pack_into("<Q", data, 48, xxhash.xxh3_64_intdigest(head))
    data[56:72] = bytes(16)
    data[56:72] = xxhash.xxh3_128_digest(data)
    return bytes(data)


def test_a_lineage_of_a_newer_version_can_be_read_and_not_written(tmp_path: Path) -> None:
    store = MemoryStore()
    image = qemu.create(tmp_path / "vol.qcow2", 1 << 20)
    taken = Repository(store, LocalState(tmp_path / "state"), create=True).snapshot(image)
    name = "vol/catalog/000000-00000001"
    store.objects[name] = Stored(with_write_feature(store.objects[name].data), 0.0)
    (tmp_path / "state").rename(tmp_path / "old")
    (tmp_path / "state").mkdir()
    (tmp_path / "old" / "writer").rename(tmp_path / "state" / "writer")
    repository = Repository(store, LocalState(tmp_path / "state"))
    assert [s.snapshot for s in repository.snapshots()] == [taken.snapshot]
    repository.restore(taken.snapshot, tmp_path / "back.qcow2")
    for verb in (lambda: repository.delete([taken.snapshot]), lambda: repository.snapshot(image)):
        with pytest.raises(UnsupportedObjectError, match="newer island"):
            verb()
    with pytest.raises(IslandError):
        repository.adopt("vol")


def test_dead_slots_of_an_unknown_pack_remove_nothing(tmp_path: Path) -> None:
    store = MemoryStore()
    image = qemu.create(tmp_path / "vol.qcow2", 1 << 20)
    qemu.io(image, qemu.write(0, 65536, 1))
    repository = Repository(store, LocalState(tmp_path / "state"), create=True)
    repository.snapshot(image)
    (lineage,) = repository.lineages()
    unknown = np.array([[7 << 44, (7 << 44) + 1]], np.int64)
    lineage.state = replace(lineage.state, dead=unknown)
    with pytest.raises(DamagedObjectError, match="nothing was removed"):
        plan_sweep(lineage, 0)
    lineage.state = replace(lineage.state, packs=Packs())
    with pytest.raises(DamagedObjectError, match="nothing was removed"):
        plan_sweep(lineage, 0)


def test_two_creators_of_one_repository_agree(tmp_path: Path) -> None:
    """A store may tell both that they succeeded, and keep the bytes of one."""

    class LastOneWins(MemoryStore):
        def put(self, name: str, parts: object) -> None:
            data = b"".join(parts)  # type: ignore[arg-type]
            if name == "repository" and self.calls["put"] == 0:
                self.calls["put"] += 1
                MemoryStore.put(self, name, [other])
            else:
                MemoryStore.put(self, name, [data])

    image = qemu.create(tmp_path / "vol.qcow2", 1 << 20)
    first = MemoryStore()
    Repository(first, LocalState(tmp_path / "one"), create=True).snapshot(image, pin=False)
    other = first.objects["repository"].data
    store = LastOneWins()
    repository = Repository(store, LocalState(tmp_path / "two"), create=True)
    repository.snapshot(image, pin=False)
    kept = open_frame(Kind.REPOSITORY, "repository", other).section(1)
    assert repository.id == json.loads(bytes(kept))["id"]


def test_a_taken_epoch_is_told_truthfully(tmp_path: Path) -> None:
    store = MemoryStore()
    image = qemu.create(tmp_path / "vol.qcow2", 1 << 20)
    here = Repository(store, LocalState(tmp_path / "one"), create=True)
    taken = here.snapshot(image)
    real = store.put

    def put(name: str, parts: object) -> None:
        real(name, parts)  # type: ignore[arg-type]
        if name.endswith("000000-00000002"):
            real("vol/catalog/000000-stop", [b"somebody adopts at this very moment"])

    store.put = put  # type: ignore[method-assign, assignment]
    with pytest.raises(ConflictError, match="whether this counts"):
        here.delete([taken.snapshot])


@pytest.mark.parametrize("text", ["x" * 65536, "a\\q", "\ud800", 7, None], ids=lambda t: repr(t)[:12])
@pytest.mark.parametrize("key", ["name", "id"])
def test_a_pin_that_no_image_can_hold_is_damage(key: str, text: object) -> None:
    with pytest.raises(DamagedError):
        decode("m", altered(Kind.MANIFEST, "m", manifest_bytes(), ["pin", key], text))


def test_a_pin_of_another_size_is_left_out_of_a_restored_image(tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "vol.qcow2", 1 << 20)
    qemu.io(image, qemu.write(0, 1 << 20, 1))
    repository = Repository(MemoryStore(), LocalState(tmp_path / "state"), create=True)
    found = repository.find(repository.snapshot(image).snapshot)
    manifest = found.lineage.manifest(found.row)
    for size in (0, (1 << 20) - 512, 1 << 62):
        odd = replace(manifest, pin=replace(manifest.pin, disk_size=size))
        target = tmp_path / f"{size}.qcow2"
        restore(found, odd, RestoreTarget(target, "qcow2", pin=True), silent)
        assert "snapshots" not in qemu.info(target)
        assert qemu.content(target) == qemu.content(image)


# Bytes after the end of a zstd frame.


def test_a_section_has_nothing_after_its_zstd_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    real = frame._encode_section

    def longer(section: Section) -> tuple[list[bytes], frame.Codec]:
        parts, codec = real(section)
        return ([bytes(parts[0]) + b"extra"] if codec == frame.Codec.ZSTD else list(map(bytes, parts))), codec

    monkeypatch.setattr(frame, "_encode_section", longer)
    parts, _ = seal(Kind.STOP, "s", [Section(1, [json_bytes({"text": "a" * 5000})])])
    with pytest.raises(DamagedObjectError, match="unreadable section"):
        open_frame(Kind.STOP, "s", b"".join(parts)).json()


def test_a_block_has_nothing_after_its_zstd_frame() -> None:
    blocks = np.zeros((1, BLOCK_SIZE), np.uint8)
    stored, lengths, codecs = compress_blocks(blocks, np.array([0]))
    header, out = PackHeader("vol", A, 0, 7), np.empty((1, BLOCK_SIZE), np.uint8)
    for extra in (b"", b"extra"):
        data = [*stored, extra]
        parts, _ = seal_pack("p", header, data, lengths + len(extra), codecs, digest_blocks(blocks, 7))
        index, whole = open_pack("p", b"".join(parts))
        (offset,), (length,) = stored_ranges(index, np.array([0]))
        if not extra:
            unpack_blocks(index, np.array([0]), [whole[offset : offset + length]], out)
            continue
        with pytest.raises(DamagedObjectError, match="unreadable block"):
            unpack_blocks(index, np.array([0]), [whole[offset : offset + length]], out)
