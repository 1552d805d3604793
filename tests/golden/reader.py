"""A second reader of the format, written from docs/format.md alone; it imports nothing of `island_fast`.

python tests/golden/reader.py REPOSITORY LINEAGE SNAPSHOT > volume.raw
"""

import json
import struct
import sys
from pathlib import Path

import xxhash
import zstandard

HEADER, ROW, INDEX = (struct.Struct(f) for f in ("<8sHHIQQ16sQ16s", "<IIQQQQ", "<IIB7x16s"))
BLOCK = 65536


def sections(root, name, magic):
    """The sections, plain and by number, of an object that is checked whole, and its checksum."""
    data = (Path(root) / name).read_bytes()
    kind, version, count, _, features, length, oid, front_sum, checksum = HEADER.unpack_from(data)
    assert (kind, version, features, length) == (magic, 1, 0, len(data)), name
    end = HEADER.size + count * ROW.size
    assert oid == xxhash.xxh3_128_digest(name.encode()), name
    assert front_sum == xxhash.xxh3_64_intdigest(data[:48] + bytes(24) + data[72:end]), name
    assert checksum == xxhash.xxh3_128_digest(data[:56] + bytes(16) + data[72:]), name
    found = {}
    for number, codec, offset, stored, plain, expected in ROW.iter_unpack(data[HEADER.size : end]):
        raw = data[offset : offset + stored]
        assert xxhash.xxh3_64_intdigest(raw) == expected, name
        found[number] = decoded(raw, codec, plain)
    return found, checksum.hex()


def decoded(raw, codec, size):
    """The plain bytes of a section or block; `size` of them."""
    assert codec in (0, 1), f"codec {codec}"
    if codec == 1:
        assert zstandard.frame_content_size(raw) == size
        raw = zstandard.ZstdDecompressor().decompress(raw)
    assert len(raw) == size
    return raw


def meta(found):
    return json.loads(found[1].decode("utf-8", "surrogateescape"))


def columns(found, first, width, rows):
    """Rows of a table whose shuffled columns are the sections from `first` on."""
    table = [[int.from_bytes(found[first + n][i::rows], "little") for i in range(rows)] for n in range(width)]
    assert all(len(found[first + n]) % rows == 0 if rows else not found[first + n] for n in range(width))
    return list(zip(*table, strict=True))


def unzigzag(value):
    return -(value + 1) // 2 if value % 2 else value // 2


class State:
    """What is live in a lineage: read from the newest checkpoint on, or from the epoch's first record."""

    def __init__(self, root, lineage, *, from_the_first=False):
        catalog, epoch, last = Path(root, lineage, "catalog"), 0, 0
        while (catalog / f"{epoch:06d}-stop").exists():
            epoch += 1
        epoch -= not (catalog / f"{epoch:06d}-00000000").exists()  # an adoption was interrupted
        while (catalog / f"{epoch:06d}-{last + 1:08d}").exists():
            last += 1
        self.epoch, self.last, checksum = epoch, last, None
        first = 0 if from_the_first else last - last % 32
        for number in range(first, last + 1):
            name = f"{lineage}/catalog/{epoch:06d}-{number:08d}"
            found, its_checksum = sections(root, name, b"ISLANDCR")
            record = meta(found)
            assert (record["lineage"], record["epoch"], record["number"]) == (lineage, epoch, number)
            assert checksum in (None, record["previous"]), name
            checksum, self.owner = its_checksum, record["writer"]
            if number == first or (number % 32 and record["checkpoint"]):
                live, dropped = (record["checkpoint"][kind] for kind in ("live", "dropped"))
                self.live, self.dropped = ({row["id"]: row for row in rows} for rows in (live, dropped))
                self.packs, self.dead = self.tables(record, found, 64, 80)
            else:
                self.apply(record, found)

    def tables(self, record, found, packs, dead):
        """Packs by key, and dead slots."""

        def keyed(first, width):
            rows = columns(found, first, width, record[f"rows_{first}"])
            return [((record["snapshots"][owner], number), *rest) for owner, number, *rest in rows]

        slots = {(key, at) for key, slot, count in keyed(dead, 4) for at in range(slot, slot + count)}
        self.gone = [key for (key,) in keyed(32, 2)]
        return {key: rest for key, *rest in keyed(packs, 7)}, slots

    def apply(self, record, found):
        """Do what a record says; the checkpoint of every 32nd is not needed."""
        if record["snapshot"]:
            self.live[record["snapshot"]["id"]] = record["snapshot"]
        for snapshot in record["swept"]:
            self.dropped.pop(snapshot, None)
        for snapshot in record["deleted"]:
            gone = self.dropped[snapshot] = self.live.pop(snapshot)
            for child in [row for row in self.live.values() if row["parent"] == snapshot]:
                self.live[child["id"]] = child | {"parent": gone["parent"]}
        packs, dead = self.tables(record, found, 16, 48)
        self.packs |= packs
        self.dead = {slot for slot in self.dead | dead if slot[0] not in self.gone}
        for key in self.gone:
            del self.packs[key]


def manifest(root, lineage, row):
    """A snapshot's metadata, and its runs: (start, length, pack key, slot)."""
    found, checksum = sections(root, f"{lineage}/manifests/{row['id']}-{row['attempt']}", b"ISLANDMF")
    head, packs, runs, ends, end, newest = meta(found), [], [], {}, 0, 0
    assert (checksum, head["snapshot"], head["block_size"]) == (row["checksum"], row["id"], BLOCK)
    assert (set(head["lineages"]) | {lineage}, head["digest"], head["key"]) == ({lineage}, 1, 0)
    for _, owner, number in columns(found, 16, 3, head["packs"]):
        ends[owner] = unzigzag(number) + ends.get(owner, 0) + 1
        packs.append((head["snapshots"][owner], ends[owner] - 1))
    ends = dict.fromkeys(range(len(packs)), 0)
    for gap, less, back, slot in columns(found, 32, 4, head["runs"]):
        pack, slot = newest - back, unzigzag(slot) + ends[newest - back]
        runs.append((end + gap, less + 1, packs[pack], slot))
        end, newest, ends[pack] = end + gap + less + 1, max(newest, pack + 1), slot + less + 1
    return head, runs


def volume(root, lineage, state, snapshot):
    """The whole volume of a live snapshot."""
    head, runs = manifest(root, lineage, state.live[snapshot])
    data, opened = bytearray(-(-head["volume_size"] // BLOCK) * BLOCK), {}
    for start, length, key, first in runs:
        attempt, suffix = state.packs[key][:2]
        name = f"{lineage}/packs/{key[0]}/{attempt}-{key[1]:08d}" + (f".{suffix:016x}" if suffix else "")
        found = opened.get(name) or opened.setdefault(name, sections(root, name, b"ISLANDPK")[0])
        for i in range(length):
            offset, size, codec, digest = INDEX.unpack_from(found[2], 32 * (first + i))
            block = decoded(found[3][offset : offset + size], codec, BLOCK)
            assert digest == xxhash.xxh3_128_digest(block, seed=meta(found)["seed"]), name
            data[(start + i) * BLOCK : (start + i + 1) * BLOCK] = block
    return bytes(data[: head["volume_size"]])


if __name__ == "__main__":
    sys.stdout.buffer.write(volume(*sys.argv[1:3], State(*sys.argv[1:3]), sys.argv[3]))
