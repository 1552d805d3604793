"""How the bench measures, and how it reports and compares."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import count

import pytest

from island_fast.bench.compare import COUNT_TOLERANCE, check_same_scale, find_regressions
from island_fast.bench.report import Counter, LeftOut, Report, Row, load_report
from island_fast.bench.timing import make_row, run, run_pairs, summarize
from island_fast.errors import DamagedError, IslandError, NotFoundError, UsageError


def test_both_sides_see_the_same_states_and_take_turns() -> None:
    order: list[str] = []
    states = count()

    def before() -> None:
        order.append(f"state {next(states)}")

    found = run_pairs(2, lambda: order.append("ours"), lambda: order.append("theirs"), before)
    assert len(found) == 2
    assert order == ["state 0", "theirs", "ours", "state 1", "ours", "theirs", "state 2", "theirs", "ours"]


@pytest.mark.parametrize(
    "how_many, left_out", [(1, 0), (3, 0), (6, 0), (8, 0), (9, 1), (12, 2), (20, 5), (30, 9)]
)
def test_the_interval_of_a_median_is_that_of_the_sign_test(how_many: int, left_out: int) -> None:
    """The ranks are those of a table of the binomial distribution, for 95 %."""
    found = summarize([float(value) for value in reversed(range(how_many))])
    assert (found.sure_low, found.sure_high) == (left_out, how_many - 1 - left_out)
    assert found.median == (how_many - 1) / 2


def test_a_ratio_is_of_one_pair_and_says_which_way_round() -> None:
    measured = [(1.0, 4.0), (2.0, 4.0), (4.0, 4.0)]
    faster = make_row("work", "peer", measured, reach=2.5)
    assert (faster.ratio.values, faster.ratio_is, faster.reached) == ((4, 2, 1), "theirs / ours", False)
    cost = make_row("work", "peer", measured, reach=0.5, better="lower")
    assert (cost.ratio.values, cost.ratio_is, cost.reached) == ((0.25, 0.5, 1), "ours / theirs", True)
    rate = make_row("work", "peer", measured, unit="MB/s", reach=0.5)
    assert (rate.ratio.values, rate.ratio_is, rate.reached) == ((0.25, 0.5, 1), "ours / theirs", True)


def test_a_process_is_measured_with_all_that_it_started() -> None:
    burn = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(64 << 20)'])"
    small = run([sys.executable, "-I", "-S", "-c", "print('said')"])
    large = run([sys.executable, "-I", "-c", burn])
    assert small.output == b"said\n"
    assert small.memory < 40 << 20
    assert large.memory > 64 << 20
    assert small.processor > 0
    assert small.wall > 0


def test_a_program_that_fails_or_is_missing_is_reported() -> None:
    with pytest.raises(IslandError, match="failed, so there is no measurement; its last output: the reason"):
        run([sys.executable, "-c", "import sys; sys.exit('the reason')"])
    with pytest.raises(NotFoundError, match="no-such-program is not installed"):
        run(["no-such-program"])


def report(*ratios: float, counted: float = 3, quick: bool = False) -> Report:
    measured = [(1.0, ratio) for ratio in ratios]
    rows: tuple[Row, ...] = (make_row("work", "peer", measured, reach=2, notes=["a note"]),)
    counters = (Counter("requests", counted, "requests", 5),)
    left = (LeftOut("restic", "it is not installed"),)
    return Report("2026-01-01", {"cores": "2"}, {"island": "1"}, {"quick": quick}, rows, counters, left)


def test_a_report_is_the_same_after_json(tmp_path) -> None:
    file = tmp_path / "report.json"
    file.write_text(report(3, 4, 5).to_json())
    assert load_report(file) == report(3, 4, 5)
    for text in ("", "{}", "[]", '{"format": 1}', report(3).to_json().replace('"format": 1', '"format": 2')):
        file.write_text(text)
        with pytest.raises(DamagedError, match=r"report.json is not a valid report of this bench"):
            load_report(file)
    with pytest.raises(NotFoundError, match="make one with --json"):
        load_report(tmp_path / "none")


def test_what_is_worse_by_more_than_the_spread_is_listed() -> None:
    baseline = report(10, 10, 11, 12, 12)
    assert list(find_regressions(report(9, 9, 10, 11, 11.5), baseline)) == []
    assert list(find_regressions(report(30, 30, 31, 32, 32), baseline)) == []
    assert list(find_regressions(report(7, 8, 9), baseline)) == [], "three pairs are not enough for so little"
    assert len(list(find_regressions(report(4, 5, 6), baseline))) == 1
    (sentence,) = find_regressions(report(7, 7, 8, 9, 9), baseline)
    assert sentence == "work, against peer: theirs / ours is 8.00 (7.00 to 9.00), and was 11.0 (10.0 to 12.0)"
    (sentence,) = find_regressions(report(10, 10, 11, 12, 12, counted=4), baseline)
    assert sentence == "requests: 4 requests, and was 3 requests"
    assert list(find_regressions(report(10, 10, 11, 12, 12, counted=2), baseline)) == []
    for before, now, is_worse in ((1.000958, 1.000962, False), (1000, 1002, True), (0, 1, True)):
        earlier = report(10, 10, 11, 12, 12, counted=before)
        found = list(find_regressions(report(10, 10, 11, 12, 12, counted=now), earlier))
        assert bool(found) is is_worse, f"counts are compared with a tolerance of {COUNT_TOLERANCE:.1%}"
    noisy = replace(baseline, counters=(replace(baseline.counters[0], noise=0.1),))
    for now, is_worse in ((3.2, False), (3.4, True)):
        found = list(
            find_regressions(replace(noisy, counters=(replace(noisy.counters[0], value=now),)), noisy)
        )
        assert bool(found) is is_worse
    with pytest.raises(UsageError, match="measured without --quick"):
        check_same_scale(True, baseline)
