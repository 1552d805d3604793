"""The cases of the bench that count, on small volumes: each runs to its end and meets its targets."""

from __future__ import annotations

import pytest

from island_fast.bench.case import Scale, Size
from island_fast.bench.cases import depth, kernels, maps, upload
from island_fast.bench.runner import Plan, measure

TINY = Scale(Size(64 << 20, 32 << 20, 1), None)
CASES = (*depth.CASES, *kernels.CASES, *maps.CASES, *upload.CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_ends_and_its_counters_meet_their_targets(case) -> None:
    report = measure(Plan(["qemu-img"], [case], quick=True, swift=True, scale=TINY), lambda text: None)
    assert not report.left_out
    assert report.rows or report.counters
    counted = [one for one in report.counters if not one.name.startswith("processor time")]
    assert all(one.reached for one in counted)
    assert all(row.reach is None for row in report.rows), "with --quick, times have no targets"
