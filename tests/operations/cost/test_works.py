"""The works of the bench that count: small, whole, and with all that they count as it should be."""

from __future__ import annotations

import pytest

from island_fast.bench.case import Scale, Size
from island_fast.bench.cases import depth, kernels, maps, upload
from island_fast.bench.runner import Plan, measure

TINY = Scale(Size(64 << 20, 32 << 20, 1), None)
WORKS = (*depth.WORKS, *kernels.WORKS, *maps.WORKS, *upload.WORKS)


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_a_work_ends_and_its_counters_are_what_they_should_be(work) -> None:
    report = measure(Plan(["qemu-img"], [work], quick=True, swift=True, scale=TINY), lambda text: None)
    assert not report.left_out
    assert report.rows or report.counters
    counted = [one for one in report.counters if not one.name.startswith("processor time")]
    assert all(one.reached for one in counted)
    assert all(row.reach is None for row in report.rows), "of times nothing is promised here"
