"""The bench as a user runs it, on tiny volumes, with every peer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from island_fast.bench import plot, table
from island_fast.bench.case import MIB, Case, Context, Scale, Size
from island_fast.bench.cases import archivers, full, increments
from island_fast.bench.compare import COUNT_TOLERANCE
from island_fast.bench.peers import all_peers
from island_fast.bench.peers.all_peers import PEERS
from island_fast.bench.report import Counter, LeftOut, Report
from island_fast.bench.runner import Plan, measure
from island_fast.errors import IslandError

TINY = Scale(Size(16 * MIB, 8 * MIB, 1), None)
CASES = (increments.CASES[0], *full.CASES, archivers.CASES[0])


def bench(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "island_fast.bench", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Run every case that compares with several peers, once; the cases compare every restore."""
    missing = [name for name in ("restic", "borg") if not shutil.which(name)]
    assert not missing, f"{missing} are not installed: scripts/install_packages peers"
    return measure(Plan([*PEERS], CASES, quick=True, scale=TINY), lambda text: None)


def test_every_peer_has_its_row(tiny: Report) -> None:
    found = {(row.work.partition(",")[0], row.against) for row in tiny.rows}
    archiver = {"restic", "borg", *(["borg2"] if PEERS["borg2"].find() else [])}
    increment = {("increment of 1 %", name) for name in (*archiver, "cinder", "dirty bitmap, copied")}
    stored = {("stored for 1 %", name) for name in (*archiver, "cinder", "bytes edited")}
    first = {("first snapshot", name) for name in (*archiver, "qemu-img convert and sync")}
    restore = {("restore to raw", name) for name in archiver}
    assert found == increment | stored | first | restore | {("restore to qcow2", "qemu-img convert and sync")}
    assert [one for one in tiny.left_out if one.name != "borg2"] == []
    assert all(min(row.ours.values + row.theirs.values) > 0 for row in tiny.rows)


def test_what_is_stored_is_the_same_in_every_run(tiny: Report) -> None:
    """All random data comes from the seed."""
    (stored,) = (row for row in tiny.rows if row.against == "bytes edited")
    assert 0.3 < stored.ratio.median < 1.2


def test_the_table_names_each_row_and_the_picture_is_one(tiny: Report, tmp_path: Path) -> None:
    with open(tmp_path / "table", "w+") as file:
        table.print_report(tiny, Console(file=file, width=150))
        file.seek(0)
        text = file.read()
    for row in tiny.rows:
        assert row.work.partition(",")[0] in text
    heading = " ".join(text[: text.index("the small volume")].split())
    assert f"against {tiny.describe_peers()}" in heading
    assert f"restic {tiny.versions['restic']}, borg 1." in heading
    plot.draw(tiny, tmp_path / "plot.png")
    picture = (tmp_path / "plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = (int.from_bytes(picture[at : at + 4]) for at in (16, 20))
    assert width == 1650
    assert height > 50 * len(tiny.rows)


def test_a_peer_that_is_missing_is_named_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in ("qemu-img", "sh", "sync"):
        (tmp_path / program).symlink_to(shutil.which(program) or "")
    monkeypatch.setattr(all_peers, "PROGRAMS", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = measure(Plan([*PEERS], [increments.CASES[1]], quick=True), lambda text: None)
    with open(tmp_path / "table", "w+") as file:
        table.print_report(found, Console(file=file, width=150))
        file.seek(0)
        text = file.read()
    for peer, package in (("restic", "restic"), ("borg", "borgbackup"), ("borg2", "borgbackup2")):
        how = f"python -m scripts.peers, or apt-get install {package}"
        assert f"left out: {peer}: it is not installed; run: {how}" in text
    assert {*found.versions} == {"island", "python", "numpy", "qemu-img", "cinder"}


@pytest.mark.parametrize(
    "words, code, sentence",
    [
        (["--peers", "restic,tar"], 2, "unknown: tar; use any of restic, borg, borg2, qemu-img, fio, cinder"),
        (["--work", "nonsense"], 2, "no case has 'nonsense' in its name; the cases are: "),
        (["--compare", "nowhere.json"], 3, "nowhere.json does not exist; make one with --json"),
        (["--compare", "/dev/null"], 6, "/dev/null is not a valid report of this bench"),
        (["--json", "nowhere/found.json"], 2, "cannot write nowhere/found.json"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_mistakes_are_reported_before_anything_is_measured(
    words: list[str], code: int, sentence: str
) -> None:
    done = bench(*words)
    assert (done.returncode, done.stdout) == (code, "")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_the_help_says_how_counts_are_compared() -> None:
    done = bench("--help", COLUMNS="200")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"counts by more than {COUNT_TOLERANCE * 100:g} %" in " ".join(done.stdout.split())


def test_a_run_is_kept_drawn_and_compared_with_an_earlier_one(tmp_path: Path) -> None:
    file, picture, before = (tmp_path / name for name in ("found.json", "found.png", "before.json"))
    words = ("--quick", "--work", "kernels")
    done = bench(*words, "--json", file, "--plot", picture)
    assert (done.returncode, done.stderr.splitlines()[0]) == (0, "kernels"), "cases are shown as they begin"
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(file.read_text())
    assert {*found["machine"]} == {"processor", "cores", "memory", "kernel", "file system", "load"}
    assert {"island", "python", "numpy", "qemu-img"} <= {*found["versions"]}
    ratio = found["rows"][0]["ratio"]
    for key in ("median", "low", "high", "sure_low", "sure_high"):
        ratio[key] = 1e9  # out of reach even where other processes take the processor in between
    before.write_text(json.dumps(found))
    done = bench(*words, "--compare", before)
    assert done.returncode == 1
    assert f"worse than {before}: {found['rows'][0]['work']}, against" in done.stderr
    assert found["rows"][0]["against"] in done.stdout, "the table is printed nevertheless"
    done = bench("--work", "kernels", "--compare", before)
    assert (done.returncode, done.stdout) == (2, "")
    assert "the baseline was measured with --quick" in done.stderr


def test_a_case_that_fails_is_reported_and_the_others_run() -> None:
    def fails(context: Context) -> Iterator[Counter]:
        yield Counter("found before", 1)
        raise IslandError("the reason")

    def works(context: Context) -> Iterator[Counter]:
        yield Counter("found after", 1)

    found = measure(Plan([], [Case("one", fails), Case("other", works)], scale=TINY), lambda text: None)
    assert found.left_out == (LeftOut("one", "the reason", failed=True),)
    assert [counter.name for counter in found.counters] == ["found before", "found after"]


def test_without_matplotlib_only_the_picture_is_missing(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    place = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = bench("--quick", "--plot", tmp_path / "found.png", PYTHONPATH=place)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--plot needs matplotlib; run 'pip install matplotlib' in the same environment" in done.stderr


def test_the_page_has_the_numbers_of_the_baseline() -> None:
    root = Path(__file__).parents[2]
    script = root / "scripts" / "benchmarks.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
