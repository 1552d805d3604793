"""Folders in memory: what is killed here is a process, never the machine, so no test waits for a disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Return an empty folder of tmpfs, which flushes at once; it goes with the test."""
    with tempfile.TemporaryDirectory(prefix="island-faults-", dir="/dev/shm") as folder:
        yield Path(folder)
