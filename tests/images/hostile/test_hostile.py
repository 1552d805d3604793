"""Malformed images end in exactly the data or one sentence, soon, in little memory; nothing else happens."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from island_fast.dirtymap import BLOCK_SIZE
from tests.images.hostile.samples import Case, all_cases
from tests.support import qemu

SECONDS = 10
PATIENCE = 60
RESIDENT_MIB = 300
WORKERS = 2
COMPARED = 1 << 30
ROOT = Path(__file__).resolve().parents[3]
CASES = all_cases()


class Worker:
    """A process that reads images one after the other; begun anew when it had to be killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def examine(self, path: Path) -> dict:
        if self._process is None:
            command = [sys.executable, "-m", "tests.images.hostile.worker"]
            environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
            )
        process = self._process
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        # By the clock, for what waits or sleeps; the worker counts the processor's seconds.
        timer = threading.Timer(PATIENCE, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            self.close()
            return {"outcome": {"died": [process.returncode]}, "took": PATIENCE, "resident": 0}
        result = json.loads(line)
        if result["resident"] > RESIDENT_MIB // 2:
            self.close()  # the highest mark stays, and would be the next image's
        return result

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of each case, by name; and what qemu reads, where that is to be compared."""
    folder = tmp_path_factory.mktemp("hostile")
    todo: queue.SimpleQueue[tuple[int, Case]] = queue.SimpleQueue()
    for numbered in enumerate(CASES):
        todo.put(numbered)
    results: dict[str, dict] = {}

    def work() -> None:
        worker = Worker()
        while True:
            try:
                number, case = todo.get_nowait()
            except queue.Empty:
                worker.close()
                return
            path = folder / f"{number}.qcow2"
            case.write(path)
            result = worker.examine(path)
            opened, volume = result["outcome"].get("open"), result["outcome"].get("volume")
            if volume and volume[0] == "ok" and not case.apart and opened[1] <= COMPARED:
                result["qemu"] = content_by_qemu(path)
            path.unlink()
            results[case.name] = result

    with ThreadPoolExecutor(WORKERS) as pool:
        for future in [pool.submit(work) for _ in range(WORKERS)]:
            future.result()
    return results


def content_by_qemu(path: Path) -> str | None:
    """The worker's digest of what qemu reads; None if it refuses or dies."""
    raw = path.with_suffix(".raw")
    command = [qemu.QEMU_IMG, "convert", "-f", "qcow2", "-O", "raw", path, raw]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    if done.returncode:
        raw.unlink(missing_ok=True)
        return None
    digest = hashlib.sha256()
    size = raw.stat().st_size
    with open(raw, "rb") as file:
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // BLOCK_SIZE * BLOCK_SIZE
            except OSError:
                break
            block = os.pread(file.fileno(), BLOCK_SIZE, at).ljust(BLOCK_SIZE, b"\0")
            if np.frombuffer(block, np.uint8).any():
                digest.update((at // BLOCK_SIZE).to_bytes(8, "big") + block)
            at += BLOCK_SIZE
    raw.unlink()
    return digest.hexdigest()


def test_there_are_enough_cases():
    assert len(CASES) >= 300


@qemu.needs_qemu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_ends_well(case, outcomes):
    result = outcomes[case.name]
    outcome = result["outcome"]
    assert "died" not in outcome
    assert "escaped" not in outcome
    assert result["took"] < SECONDS
    assert result["resident"] < RESIDENT_MIB
    for code, *said in outcome.values():
        assert code in ("ok", 4, 6)
        assert code == "ok" or ("\n" not in said[1] and len(said[1]) < 2000)
    volume = outcome.get("volume", outcome["open"])
    read = volume[0] == "ok"
    assert case.ends == "any" or read == (case.ends == "data"), volume
    if case.apart and read:
        assert volume[1] == outcomes["good 16 v3"]["outcome"]["volume"][1]
    if "qemu" in result:
        assert result["qemu"] == volume[1] or (case.lenient and result["qemu"] is None)


@qemu.needs_qemu
def test_the_good_images_are_read_by_both(outcomes):
    good = [outcomes[case.name] for case in CASES if case.name.startswith("good ")]
    assert len(good) >= 20
    for result in good:
        assert all(aspect[0] == "ok" for aspect in result["outcome"].values())
        assert result["qemu"] == result["outcome"]["volume"][1]
