"""What a snapshot stores beside its data: little, also after a month of scattered changes."""

from __future__ import annotations

import pytest

from island_fast.bench.cases.sizes import beside_the_data

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("volume", "changed", "most"), [(1024 * GIB, 100 * MIB, 0.005), (64 * GIB, 64 * GIB // 100, 0.002)]
)
def test_a_manifest_and_its_record_are_small(volume: int, changed: int, most: float) -> None:
    """Of the 30th snapshot in a row, for each byte that it changed."""
    assert most / 10 < beside_the_data(volume, changed, 30, seed=1) <= most
