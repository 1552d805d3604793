"""What a snapshot stores besides its data is small, even after a month of scattered changes."""

from __future__ import annotations

import pytest

from island_fast.bench.cases.sizes import compute_metadata_share

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("volume", "changed", "most"), [(1024 * GIB, 100 * MIB, 0.005), (64 * GIB, 64 * GIB // 100, 0.002)]
)
def test_a_manifest_and_its_record_are_small(volume: int, changed: int, most: float) -> None:
    """Check the 30th snapshot in a row, in bytes for each byte that it changed."""
    assert most / 10 < compute_metadata_share(volume, changed, 30, seed=1) <= most
