"""`island restore --salvage`: what it writes of a damaged snapshot, what it lists, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Island, one_sentence

BLOCK = 65536


def test_lost_blocks_are_listed_and_the_exit_code_is_6(island: Island, tmp_path: Path) -> None:
    content = bytearray(b"".join(bytes([n]) * BLOCK for n in range(1, 5)) + b"tail" * 128)
    image = tmp_path / "disk.raw"
    image.write_bytes(content)
    snapshot = island.json("snapshot", image, "--format", "raw")["snapshot"]
    (pack,) = (island.repository / "disk/packs").glob("*/*")
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1  # in the last block
    pack.write_bytes(data)
    target = tmp_path / "salvaged.raw"
    words = ("restore", snapshot, target, "--format", "raw")
    assert "is damaged" in island.fails(6, *words)
    assert not target.exists()
    done = island(*words, "--salvage")
    assert done.code == 6
    *warned, sentence = done.err.splitlines(keepends=True)
    assert any(str(pack.relative_to(island.repository)) in line for line in warned)
    assert one_sentence(sentence).startswith(
        f"{target} is not the volume: 512 bytes of it are lost and zero;"
    )
    assert done.out.splitlines()[0] == f"lost: 512 bytes at byte {4 * BLOCK}"
    content[-512:] = bytes(512)
    assert target.read_bytes() == content
    target.unlink()
    done = island(*words, "--salvage", "--json")
    answer = json.loads(done.out)
    assert done.code == 6
    assert answer["extents_lost"] == [[4 * BLOCK, 512]]
    assert (answer["bytes_lost"], answer["bytes_written"]) == (512, 4 * BLOCK)
    assert answer["objects_damaged"] == [str(pack.relative_to(island.repository))]
    assert "already exists" in island.fails(4, *words, "--salvage")


def test_a_whole_snapshot_is_restored_as_usual(island: Island, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(b"x" * BLOCK)
    snapshot = island.json("snapshot", image, "--format", "raw")["snapshot"]
    answer = island.json("restore", snapshot, tmp_path / "back.raw", "--format", "raw", "--salvage")
    assert (answer["bytes_lost"], answer["extents_lost"]) == (0, [])
    assert "--salvage writes a new TARGET" in island.fails(
        2, "restore", snapshot, "--onto", image, "--salvage"
    )
