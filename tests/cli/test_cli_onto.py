"""`island restore --onto`: what it says, of a dry run and of a real one, and when it is interrupted."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import MIB, Island, one_sentence, pins, wait_until
from tests.support import qemu

pytestmark = qemu.needs_qemu


def sheet(text: str) -> dict[str, str]:
    return dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines())


def test_a_dry_run_and_a_real_one(island: Island, disk: Path) -> None:
    taken = island.json("snapshot", disk)["snapshot"]
    held = pins(disk)
    truth = qemu.content(disk)
    qemu.noise(disk, MIB, MIB, 5)
    qemu.noise(disk, 60 * MIB, 128 << 10, 5)
    changed = qemu.content(disk)
    would = sheet(island.text("restore", taken[:8], "--onto", disk, "--dry-run"))
    assert qemu.content(disk) == changed
    assert list(would) == ["target", "snapshot", "volume", "compared", "read", "differs", "time"]
    assert would["target"] == f"{disk}, qcow2, 64.0 MiB"
    assert would["differs"] == "1.0 MiB, and 128.0 KiB of zeros"
    done = sheet(island.text("restore", taken[:8], "--onto", disk))
    assert done["written"] == would["differs"]
    assert done["compared"] == would["compared"] == "3.1 MiB"
    assert qemu.content(disk) == truth
    assert pins(disk) == held
    again = island.json("restore", taken, "--onto", disk)
    assert (again["bytes_written"], again["bytes_zeroed"], again["bytes_compared"]) == (0, 0, 3 * MIB)
    assert island.json("snapshot", disk)["rule"] == "table-diff"
    assert island.text("restore", taken, "--onto", disk, "--quiet") == ""
    qemu.check(disk)


def test_a_raw_target_says_so(island: Island, disk: Path, tmp_path: Path) -> None:
    island.json("snapshot", disk)
    raw = tmp_path / "raw"
    raw.write_bytes(b"x" * (65 * MIB))
    assert "not a qcow2 image" in island.fails(4, "restore", "disk@latest", "--onto", raw)
    done = island.json("restore", "disk@latest", "--onto", raw, "--format", "raw")
    assert (done["volume_size"], done["target_size"]) == (64 * MIB, 65 * MIB)
    assert done["bytes_written"] + done["bytes_zeroed"] == 65 * MIB
    assert raw.stat().st_size == 65 * MIB
    with raw.open("r+b") as file:
        file.truncate(64 * MIB)
    qemu.compare(disk, raw)


def test_without_qemu_nbd(island: Island, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    island.json("snapshot", disk)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "qemu-utils" in island.fails(1, "restore", "disk@latest", "--onto", disk)
    assert island.json("restore", "disk@latest", "--onto", disk, "--dry-run")["bytes_written"] == 0


def test_a_disk_that_gets_full(island: Island, disk: Path, small_disk: Callable[[str, int], Path]) -> None:
    qemu.noise(disk, 0, 24 * MIB)
    taken = island.json("snapshot", disk)["snapshot"]
    target = qemu.create(small_disk("full", 8 * MIB) / "target.qcow2", 64 * MIB)
    done = island("restore", "disk@latest", "--onto", target)
    assert (done.code, done.out) == (1, "")
    warning, sentence = done.err.splitlines()
    assert warning.endswith(
        f"{target} can be a mix of old and new; run 'island restore {taken} --onto {target}'"
    )
    assert "No space left on device" in sentence
    assert "free space" in sentence
    small_disk("full", 64 * MIB)
    qemu.check(target)
    assert island.json("restore", "disk@latest", "--onto", target)["bytes_written"] > 0
    qemu.compare(disk, target, other_format="qcow2")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_tells_what_it_leaves(
    island: Island, disk: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Packs that come after the first few would wait for minutes."""
    large = qemu.create(tmp_path / "large.qcow2", 64 * MIB)
    qemu.noise(large, 0, 64 * MIB)
    taken = island.json("snapshot", large)["snapshot"]
    target = qemu.create(tmp_path / "target.qcow2", 64 * MIB)
    before = qemu.info(target)["actual-size"]
    process = island.start("restore", "large@latest", "--onto", target, "--limit-download", "100K")
    wait_until(lambda: target.stat().st_blocks * 512 > before + MIB, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + number, b"")
    sentence = one_sentence(err.decode())
    assert sentence == (
        f"interrupted; {target} is a mix of what it was and the snapshot; "
        f"run 'island restore {taken} --onto {target}'"
    )
    qemu.check(target)
    left = island.json("restore", "large@latest", "--onto", target)
    assert 0 < left["bytes_written"] < 64 * MIB
    qemu.compare(large, target, other_format="qcow2")
