"""List and restore the snapshots of an island repository without island.

    python rescue.py FOLDER                              list the snapshots
    python rescue.py FOLDER VOLUME SNAPSHOT volume.raw   write the volume to a new raw file

FOLDER holds a copy of a repository: the files below its prefix, under the names that their objects have.
`swift download CONTAINER --prefix PREFIX/ --remove-prefix -D FOLDER` makes one of a container of Swift.
SNAPSHOT is an id or the beginning of one. Needed: Python 3.10, and the packages xxhash and zstandard.

Nothing in FOLDER is changed. Whatever is read is verified. A block that cannot be verified is not written:
it is zero in the file, it is listed, and the exit code is 6. If the catalog of a volume is lost, or with
--no-catalog, the manifests and the names of the packs are used instead. That lists deleted snapshots, too,
as long as no sweep has removed their manifests; blocks of these can be lost.

This is the second implementation of the format, and written from its description, docs/format.md. Its section
"When something is lost" says why what is done here is right.
"""

import argparse
import json
import os
import re
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import xxhash
import zstandard

HEADER = struct.Struct("<8sHHIQQ16sQ16s")  # "Frame"
SECTION = struct.Struct("<IIQQQQ")
SLOT = struct.Struct("<IIB7x16s")  # "Pack"
BLOCK = 65536
CHECKPOINT_EVERY = 32
FAR_APART = 1 << 20  # attempts of one snapshot are less far apart; a copy that was made again has others

RECORD = re.compile(r"([0-9]{6,})-([0-9]{8,})")
STOP = re.compile(r"([0-9]{6,})-stop")
MANIFEST = re.compile(r"([0-9a-f]{32})-([0-9]+)")
PACK = re.compile(r"([0-9]+)-([0-9]{8,})(?:\.[0-9a-f]{16})?")


class Damaged(Exception):
    """Something is missing, or is not as it was written."""


BROKEN = (Damaged, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)
"""What reading a damaged object raises."""


class Frame:
    """An object whose header and section table are right; each section is verified when it is read."""

    def __init__(self, root: Path, name: str, magic: bytes) -> None:
        self.name = name
        try:
            self.data = data = (root / name).read_bytes()
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from error
        if len(data) < HEADER.size:
            raise Damaged(f"{name}: truncated")
        found, version, count, _, features, _, object_id, front_sum, self.checksum = HEADER.unpack_from(data)
        end = HEADER.size + count * SECTION.size
        front = data[:48] + bytes(24) + data[72:end]
        if found != magic or len(data) < end or xxhash.xxh3_64_intdigest(front) != front_sum:
            raise Damaged(f"{name}: the header is damaged")
        if object_id != xxhash.xxh3_128_digest(name.encode()):
            raise Damaged(f"{name}: these are the bytes of another object")
        if version != 1 or features:
            raise Damaged(f"{name}: a newer version wrote it (version {version}, features {features:#x})")
        self.rows = {kind: row for kind, *row in SECTION.iter_unpack(data[HEADER.size : end])}

    def is_whole(self) -> bool:
        """Return whether the checksum of the whole object is right."""
        return xxhash.xxh3_128_digest(self.data[:56] + bytes(16) + self.data[72:]) == self.checksum

    def section(self, number: int) -> bytes:
        """Return the plain bytes of a section."""
        if number not in self.rows:
            raise Damaged(f"{self.name}: section {number} is missing")
        codec, offset, stored, plain, checksum = self.rows[number]
        data = self.data[offset : offset + stored]
        if xxhash.xxh3_64_intdigest(data) != checksum:
            raise Damaged(f"{self.name}: section {number} is damaged")
        return decode(self.name, codec, data, plain)

    def meta(self) -> dict:
        """Return the JSON in section 1."""
        return json.loads(self.section(1))

    def table(self, first: int, width: int, rows: int) -> list:
        """Return the rows of a table whose columns are the sections from `first` on ("Columns")."""
        columns = []
        for number in range(first, first + width):
            data = self.section(number)
            if len(data) % rows if rows else data:
                raise Damaged(f"{self.name}: section {number} is not a column of {rows} rows")
            columns.append([int.from_bytes(data[row::rows], "little") for row in range(rows)])
        return list(zip(*columns, strict=True))


def decode(name: str, codec: int, data: bytes, size: int) -> bytes:
    """Return the `size` plain bytes of a section or a block."""
    if codec == 1:
        try:
            if zstandard.frame_content_size(data) == size:
                data = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise Damaged(f"{name}: {error}") from error
    elif codec != 0:
        raise Damaged(f"{name}: unknown codec {codec}")
    if len(data) != size:
        raise Damaged(f"{name}: a section or block has the wrong length")
    return data


def unzigzag(value: int) -> int:
    """Return the signed value."""
    return -(value + 1) // 2 if value % 2 else value // 2


class Volume:
    """What a folder holds of one volume.

    `manifests` are the attempts by snapshot, `packs` the names by pack key and attempt. `live` are the
    snapshots; `current` says in which attempt and with which suffix each pack key is stored. If the catalog
    cannot be read, `lost_catalog` says why: then `live` are the manifests, and `current` is empty.
    """

    def __init__(self, root: Path, name: str, use_catalog: bool = True) -> None:
        self.root, self.name = root, name
        self.manifests: dict = {}
        for found in self.names("manifests", MANIFEST):
            self.manifests.setdefault(found[1], []).append(int(found[2]))
        self.packs: dict = {}
        for folder in sorted((root / name / "packs").glob("*")):
            for found in self.names(f"packs/{folder.name}", PACK):
                attempts = self.packs.setdefault((folder.name, int(found[2])), {})
                attempts.setdefault(int(found[1]), []).append(f"{name}/packs/{folder.name}/{found[0]}")
        self.live: dict = {}
        self.current: dict = {}
        self.lost_catalog = "" if use_catalog else "it was not to be used"
        if use_catalog:
            try:
                self.read_catalog()
            except BROKEN as error:
                self.lost_catalog = str(error) if isinstance(error, Damaged) else f"damaged: {error!r}"
        if self.lost_catalog:
            self.read_manifests()

    def names(self, folder: str, pattern: re.Pattern) -> list:
        """Return the matches of the names in a folder of the volume."""
        try:
            names = sorted(os.listdir(self.root / self.name / folder))
        except (FileNotFoundError, NotADirectoryError):
            names = []
        return [found for found in map(pattern.fullmatch, names) if found]

    # With a catalog.

    def read_catalog(self) -> None:
        """Read the records from the last checkpoint on, up to the last that the folder shows."""
        records = {(int(found[1]), int(found[2])): found[0] for found in self.names("catalog", RECORD)}
        if not records:
            raise Damaged("there are no records")
        epoch, last = max(records)
        if any(int(found[1]) > epoch for found in self.names("catalog", STOP)):
            raise Damaged(f"all records after epoch {epoch} are missing")
        live, current, previous = {}, {}, None
        for number in range(last - last % CHECKPOINT_EVERY, last + 1):
            if (epoch, number) not in records:
                raise Damaged(f"record {epoch}-{number} is missing")
            frame = Frame(self.root, f"{self.name}/catalog/{records[epoch, number]}", b"ISLANDCR")
            record = frame.meta()
            if not frame.is_whole() or previous not in (None, record["previous"]):
                raise Damaged(f"{frame.name} is damaged, or does not follow the record before it")
            if record["event"] not in ("owner", "snapshot", "delete", "keep", "sweep") or record["key"]:
                raise Damaged(f"{frame.name}: a newer version wrote it")
            previous = frame.checksum.hex()
            if record["checkpoint"]:
                live = {row["id"]: row for row in record["checkpoint"]["live"]}
                current = self.packs_in(frame, record, 64)
            elif number % CHECKPOINT_EVERY == 0:
                raise Damaged(f"{frame.name}: the checkpoint is missing")
            else:
                current.update(self.packs_in(frame, record, 16))
                if record["snapshot"]:
                    live[record["snapshot"]["id"]] = record["snapshot"]
                for snapshot in record["deleted"]:
                    gone = live.pop(snapshot)
                    for row in live.values():
                        if row["parent"] == snapshot:
                            row["parent"] = gone["parent"]
        self.live, self.current = live, current

    @staticmethod
    def packs_in(frame: Frame, record: dict, first: int) -> dict:
        """Return attempt and suffix of each pack in a table of a record, by pack key."""
        rows, ids = frame.table(first, 4, record[f"rows_{first}"]), record["snapshots"]
        return {(ids[owner], number): (attempt, suffix) for owner, number, attempt, suffix in rows}

    # Without one.

    def read_manifests(self) -> None:
        """Take the manifests that can be read for the snapshots, in the order of their times."""
        rows = []
        for snapshot, attempts in self.manifests.items():
            for attempt in attempts:
                try:
                    row = self.manifest(snapshot, attempt).meta()
                    rows.append((row["created"], attempt, row | {"id": snapshot, "attempt": attempt}))
                except BROKEN as error:
                    print(f"{self.name}: {error}", file=sys.stderr)
        for _, attempt, row in sorted(rows, key=lambda one: one[:2]):
            alone = len(self.manifests[row["id"]]) == 1
            self.live[row["id"] if alone else f"{row['id']}-{attempt}"] = row

    def find_attempt(self, key: tuple, snapshot: str, attempt: int) -> int:
        """Return in which attempt the pack is stored that the manifest of `snapshot` means by `key`."""
        if not self.lost_catalog:
            if key not in self.current:
                raise Damaged(f"pack {key[1]} of snapshot {key[0]} is not in the catalog")
            return self.current[key][0]
        own = key[0] == snapshot
        stored = self.packs.get(key, {})
        tops = [attempt] if own else self.manifests.get(key[0], [])
        fits = [one for one in stored if any(0 <= top - one < FAR_APART for top in tops)]
        if not fits and not own:
            fits = list(stored)
        if not fits:
            raise Damaged(f"pack {key[1]} of snapshot {key[0]} is missing")
        if max(fits) - min(fits) >= FAR_APART:
            raise Damaged(f"pack {key[1]} of snapshot {key[0]}: only the catalog can say which one it is")
        return max(fits)

    # Restoring.

    def manifest(self, snapshot: str, attempt: int) -> Frame:
        """Return the frame of a manifest."""
        return Frame(self.root, f"{self.name}/manifests/{snapshot}-{attempt}", b"ISLANDMF")

    def read_runs(self, row: dict) -> tuple:
        """Return the metadata in a snapshot's manifest, and its runs: start, length, pack key, slot."""
        frame = self.manifest(row["id"], row["attempt"])
        head = frame.meta()
        if (head["block_size"], head["digest"], head["key"]) != (BLOCK, 1, 0):
            raise Damaged(f"{frame.name}: a newer version wrote it")
        if set(head["lineages"]) - {self.name}:
            raise Damaged(f"{frame.name} names packs of another volume")
        if frame.is_whole() and row.get("checksum", frame.checksum.hex()) != frame.checksum.hex():
            raise Damaged(f"{frame.name} is not the manifest that the catalog names")
        keys, ends = [], {}
        for owner, delta in frame.table(17, 2, head["packs"]):
            number = ends.get(owner, 0) + unzigzag(delta)
            keys.append((head["snapshots"][owner], number))
            ends[owner] = number + 1
        runs, end, newest, ends = [], 0, 0, {}
        for gap, less, back, delta in frame.table(32, 4, head["runs"]):
            start, length, pack = end + gap, less + 1, newest - back
            slot = ends.get(pack, 0) + unzigzag(delta)
            if not 0 <= pack < len(keys) or slot < 0:
                raise Damaged(f"{frame.name}: a run names a pack or slot that cannot be")
            runs.append((start, length, keys[pack], slot))
            end, newest, ends[pack] = start + length, max(newest, pack + 1), slot + length
        if (end - 1) * BLOCK >= head["volume_size"]:
            raise Damaged(f"{frame.name}: a run ends past the end of the volume")
        return head, runs

    def read_blocks(self, name: str, slots: list, seed: int) -> Iterator:
        """Yield those of `slots` of the pack `name` that it has and that are right, each with its block."""
        frame = Frame(self.root, name, b"ISLANDPK")
        head, index, start = frame.meta(), frame.section(2), frame.rows[3][1]
        if (head["block_size"], head["digest"], head["key"], head["seed"]) != (BLOCK, 1, 0, seed):
            raise Damaged(f"{name}: a newer version wrote it, or it belongs to another volume")
        for slot in slots:
            if SLOT.size * (slot + 1) <= len(index):
                offset, length, codec, digest = SLOT.unpack_from(index, SLOT.size * slot)
                try:
                    block = decode(name, codec, frame.data[start + offset : start + offset + length], BLOCK)
                except Damaged:
                    continue
                if xxhash.xxh3_128_digest(block, seed=seed) == digest:
                    yield slot, block

    def restore(self, row: dict, target: Path) -> list:
        """Write the volume of a snapshot to the new file `target`; return the lost blocks, ascending."""
        head, runs = self.read_runs(row)
        size, lost = head["volume_size"], []
        wanted: dict = {}  # by pack key and slot: the blocks that are there
        for start, length, key, slot in runs:
            places = wanted.setdefault(key, {})
            for i in range(length):
                places.setdefault(slot + i, []).append(start + i)
        part = Path(f"{target}.part")
        with open(part, "xb") as file:
            file.truncate(size)
            for key, places in wanted.items():
                for name in self.names_of(key, row):
                    try:
                        for slot, data in self.read_blocks(name, list(places), head["seed"]):
                            for block in places.pop(slot):
                                file.seek(block * BLOCK)
                                file.write(data[: size - block * BLOCK])
                    except BROKEN as error:
                        print(error, file=sys.stderr)
                lost += [block for blocks in places.values() for block in blocks]
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, target)
        return sorted(lost)

    def names_of(self, key: tuple, row: dict) -> list:
        """Return the names of the objects that can hold blocks of a pack, the one in the catalog first.

        All that have the same attempt hold the same block in a slot, or lack it.
        """
        try:
            attempt = self.find_attempt(key, row["id"], row["attempt"])
        except Damaged as error:
            print(error, file=sys.stderr)
            return []
        suffix = self.current.get(key, (0, 0))[1]
        ending = f"-{key[1]:08d}" + (f".{suffix:016x}" if suffix else "")
        names = self.packs.get(key, {}).get(attempt, [])
        if not names:
            print(f"{self.name}/packs/{key[0]}/{attempt}{ending}: missing", file=sys.stderr)
        return sorted(names, key=lambda name: not name.endswith(ending))


def list_volumes(root: Path) -> list:
    """Return the names of the volumes in a folder."""
    return sorted({path.parent.name for kind in ("catalog", "manifests") for path in root.glob(f"*/{kind}")})


def join_blocks(blocks: list, size: int) -> list:
    """Return ascending block numbers as extents of a volume: start and length in bytes."""
    found: list = []
    for block in blocks:
        if found and found[-1][1] == block:
            found[-1][1] = block + 1
        else:
            found.append([block, block + 1])
    return [(start * BLOCK, min(stop * BLOCK, size) - start * BLOCK) for start, stop in found]


def list_snapshots(root: Path, use_catalog: bool) -> int:
    """Print the snapshots of each volume, the newest last; return the exit code."""
    names, code = list_volumes(root), 0
    for name in names:
        volume = Volume(root, name, use_catalog)
        if volume.lost_catalog and use_catalog:
            print(f"{name}: no catalog ({volume.lost_catalog}); these are manifests", file=sys.stderr)
            code = 6
        for key, row in volume.live.items():
            seconds = min(row["created"] // 10**9, 253402300799)  # of the year 9999
            taken = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
            print(name, key, taken, row["volume_size"], json.dumps(row["label"]))
        others = len(set(volume.manifests) - {row["id"] for row in volume.live.values()})
        if others:
            print(f"{name}: --no-catalog lists {others} more, deleted or interrupted", file=sys.stderr)
    if not names:
        print(
            f"there is no volume in {root}; name the folder that the volumes' folders are in", file=sys.stderr
        )
    return code if names else 3


def restore(root: Path, name: str, snapshot: str, target: Path, use_catalog: bool) -> int:
    """Restore one snapshot, and print what is lost; return the exit code."""
    volume = Volume(root, name, use_catalog)
    if volume.lost_catalog and use_catalog:
        print(f"{name}: no catalog ({volume.lost_catalog}); reading manifests", file=sys.stderr)
    found = [key for key in volume.live if key.startswith(snapshot)]
    if len(found) != 1:
        print(f"{len(found)} snapshots of {name} begin with {snapshot}; list them", file=sys.stderr)
        return 3
    if os.path.lexists(target):
        print(f"{target} already exists; name another file", file=sys.stderr)
        return 4
    row = volume.live[found[0]]
    try:
        lost = volume.restore(row, target)
    except (OSError, *BROKEN) as error:
        print(f"{target} was not made: {error}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 6
    for start, length in join_blocks(lost, row["volume_size"]):
        print(f"lost: {length} bytes at byte {start}; they are zero in {target}")
    print(f"{target} is {'not the volume: what is listed above is lost' if lost else 'the whole volume'}")
    return 6 if lost else 0


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("volume", nargs="?", metavar="VOLUME")
    parser.add_argument("snapshot", nargs="?", metavar="SNAPSHOT")
    parser.add_argument("target", nargs="?", type=Path, metavar="FILE")
    parser.add_argument("--no-catalog", action="store_true", help="use only manifests and packs")
    asked = parser.parse_args()
    if asked.volume is None:
        return list_snapshots(asked.folder, not asked.no_catalog)
    if asked.target is None:
        parser.error("name VOLUME, SNAPSHOT and the new file; or only FOLDER, which lists its snapshots")
    return restore(asked.folder, asked.volume, asked.snapshot, asked.target, not asked.no_catalog)


if __name__ == "__main__":
    sys.exit(main())
