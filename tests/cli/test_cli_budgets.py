"""What others wrote costs memory in proportion to its bytes, and what does not is refused with a sentence.

Memory is the most that the command ever had resident, as the kernel counts it for a child.
"""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.forged import forge

MIB = 1 << 20
LITTLE = 150  # MiB; the command itself has 35
# Starts the command from a small process: else the memory of this one would count as the child's.
MEASURED = r"""
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "island_fast", *sys.argv[1:]], stdout=sys.stdout)
print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10, file=sys.stderr)
"""


def measure(
    *words: str | Path, state: Path, stdout: int | None = subprocess.DEVNULL, **more: str
) -> tuple[int, int, str]:
    """Exit code, peak of resident MiB, and what the command said on standard error."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, words)],
        stdout=stdout, stderr=subprocess.PIPE, text=True, check=True, timeout=100,
        env=os.environ | {"ISLAND_STATE": str(state)} | more,
    )  # fmt: skip
    *said, counted = done.stderr.splitlines()
    code, peak = map(int, counted.split())
    return code, peak, " ".join(said)


ROWS = "claims more rows than its bytes can hold"
RUNS = "rows in so few bytes that at most"
MANY = 1 << 24


@pytest.mark.parametrize(
    "verb, forged, words",
    [
        ("list", {"repeated": MANY}, ROWS),
        ("list", {"packs": 1, "dead": MANY}, ROWS),
        ("restore", {"runs": MANY}, "more runs than its volume and its packs can have"),
        ("restore", {"packs": 4096, "runs": MANY}, RUNS),
        ("usage", {"packs": 4096, "runs": MANY}, RUNS),
        ("verify", {"packs": 4096, "runs": MANY}, RUNS),
        ("restore", {"packs": 4095, "runs": 4096}, "is missing"),
        ("list", {"json": b',"z":[' + b"[]," * (MANY // 3) + b"[]]"}, "too many values"),
        ("list", {"json": b',"z":' + b"[" * 3000 + b"]" * 3000}, "too many values or levels"),
        ("list", {"json": b',"z":' + b"[" * 32 + b"]" * 32}, "too many values or levels"),
        ("list", {"json": b',"z":[' + b" " * MIB + b"[" * 40 + b"]" * 40 + b"]"}, "too many values"),
    ],
)
def test_forged_objects_cost_what_they_weigh(
    verb: str, forged: dict[str, int], words: str, tmp_path: Path
) -> None:
    forge(tmp_path / "r", **forged)
    more = {"list": (), "restore": ("v@latest", tmp_path / "t.qcow2"), "usage": (), "verify": ("--all",)}[
        verb
    ]
    code, peak, said = measure("-r", tmp_path / "r", verb, *more, state=tmp_path / "state")
    assert words in said
    assert code == 6
    assert peak < LITTLE
    assert not (tmp_path / "t.qcow2").exists()


def test_whoever_trusts_them_reads_large_sizes(tmp_path: Path) -> None:
    forge(tmp_path / "r", packs=1024, runs=1 << 22)
    words = ("-r", tmp_path / "r", "restore", "v@latest", tmp_path / "t.qcow2")
    _, _, said = measure(*words, state=tmp_path / "state")
    assert RUNS in said
    code, _, said = measure(*words, state=tmp_path / "state", ISLAND_TRUST_SIZES="1")
    assert (code, "is missing" in said) == (6, True)


MANIFEST = f"v/manifests/{'ab' * 16}-0"


@pytest.mark.parametrize(
    "name, size",
    [
        ("repository", 3 * MIB),
        ("repository", 4095 * MIB),
        ("v/catalog/000000-00000000", 1025 * MIB),
        ("v/catalog/000000-00000000", 4095 * MIB),
        (MANIFEST, 1 * MIB),
        (MANIFEST, 900 * MIB),
        (MANIFEST, 4095 * MIB),
    ],
)
def test_objects_of_impossible_sizes_are_not_read(name: str, size: int, tmp_path: Path) -> None:
    forge(tmp_path / "r", packs=1, runs=9)
    os.truncate(tmp_path / "r" / name, size)
    code, peak, said = measure(
        "-r", tmp_path / "r", "restore", "v@latest", tmp_path / "t.qcow2", state=tmp_path / "state"
    )
    assert f"has {size} bytes, more than the" in said
    assert code == 6
    assert peak < LITTLE


def test_what_a_process_may_not_have_is_refused_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record of 600 MiB, in a process that may have one GiB of addresses."""
    forge(tmp_path / "r", packs=1, runs=9)
    os.truncate(tmp_path / "r/v/catalog/000000-00000000", 600 * MIB)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, before[1]))
    try:
        code, peak, said = measure("-r", tmp_path / "r", "list", state=tmp_path / "state")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert "would take 600 MiB of memory, and this host has" in said
    assert code == 6
    assert peak < LITTLE


def alternating(path: Path, tables: int) -> int:
    """An image of which every second cluster is data; return the number of its extents."""
    cluster, entries = 65536, 8192
    l1, l2 = 4 * cluster, 8 * cluster
    data = l2 + tables * cluster
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQIIB", b"QFI\xfb", 3, 0, 0, 16, tables * entries * cluster, 0, tables, l1, cluster,
        1, 0, 0, 0, 0, 0, 4, 112, 0,
    )  # fmt: skip
    row = np.zeros(entries, ">u8")
    row[::2] = data | 1 << 63
    with open(path, "wb") as file:
        file.write(header)
        file.seek(l1)
        file.write(b"".join(struct.pack(">Q", (l2 + i * cluster) | 1 << 63) for i in range(tables)))
        file.seek(l2)
        for _ in range(tables):
            file.write(row.tobytes())
        file.truncate(data + cluster)
    return tables * entries


@pytest.mark.parametrize("words", [("--json",), ()])
def test_the_map_of_many_extents_is_printed_as_it_is_found(words: tuple[str, ...], tmp_path: Path) -> None:
    extents = alternating(tmp_path / "m.qcow2", 256)
    with open(tmp_path / "out", "wb") as out:
        code, peak, said = measure(
            "map", tmp_path / "m.qcow2", *words, state=tmp_path / "state", stdout=out.fileno()
        )
    assert (code, said) == (0, "")
    assert (tmp_path / "out").stat().st_size > 30 * extents
    assert peak < LITTLE


def test_a_map_that_ends_in_damage_says_so(tmp_path: Path) -> None:
    alternating(tmp_path / "m.qcow2", 256)
    with open(tmp_path / "m.qcow2", "r+b") as file:
        file.seek(200 * 65536)
        file.write(b"\xff" * 8)
    with open(tmp_path / "out", "wb") as out:
        code, _, said = measure(
            "map", tmp_path / "m.qcow2", "--json", state=tmp_path / "state", stdout=out.fileno()
        )
    assert code == 6
    assert "is invalid or points outside the file" in said
    assert (
        (tmp_path / "out")
        .read_bytes()
        .startswith(b'[{"start": 0, "length": 65536, "kind": "data"}, {"start"')
    )
