"""Retention, whatever the dates: it is restic's, keeps more with greater numbers, and is done once done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from island_fast.operations.retain import Keep

RULES = [field.name for field in fields(Keep)]
HOUR = 3600 * 10**9
DATES = st.lists(
    st.one_of(
        st.integers(0, 2**63 - 1),
        st.integers(0, 4000).map(lambda hours: 1703980800 * 10**9 + hours * HOUR),  # from 2023-12-31 on
        st.integers(0, 40).map(lambda half_days: 1703980800 * 10**9 + half_days * 12 * HOUR),
    ),
    max_size=25,
)
POLICIES = st.builds(Keep, **{rule: st.one_of(st.just(0), st.integers(0, 9)) for rule in RULES})


def kept(keep: Keep, dates: list[int]) -> list[int]:
    return [at for at, why in enumerate(keep.decide(dates)) if why]


def period(rule: str) -> Callable[[int, int], str]:
    form = {"hourly": "%Y%m%d%H", "daily": "%Y%m%d", "weekly": "%G%V", "monthly": "%Y%m", "yearly": "%Y"}
    if rule == "last":
        return lambda at, _: str(at)
    return lambda _, date: datetime.fromtimestamp(date // 10**9, UTC).strftime(form[rule])


def restic(keep: Keep, dates: list[int]) -> list[tuple[str, ...]]:
    """What restic does with dates in order: one walk, and for each rule a count and the period seen last."""
    left = {rule: getattr(keep, rule) for rule in RULES}
    seen: dict[str, str] = {}
    reasons: list[tuple[str, ...]] = []
    for at, date in reversed([*enumerate(dates)]):
        why = []
        for rule in RULES:
            now = period(rule)(at, date)
            if left[rule] and (now != seen.get(rule) or at == 0):
                why.append(rule if now != seen.get(rule) else f"oldest {rule}")
                seen[rule] = now
                left[rule] -= 1
        reasons.append(tuple(why))
    return reasons[::-1]


@given(POLICIES, DATES)
def test_it_is_restics_where_the_clock_only_goes_forward(keep: Keep, dates: list[int]) -> None:
    dates.sort()
    assert keep.decide(dates) == restic(keep, dates)


@given(POLICIES, DATES)
def test_each_rule_by_itself(keep: Keep, dates: list[int]) -> None:
    reasons: list[tuple[str, ...]] = [()] * len(dates)
    for rule in RULES:
        alone = Keep(**{rule: getattr(keep, rule)})
        of_rule = alone.decide(dates)
        assert sum(map(bool, of_rule)) <= getattr(keep, rule)
        reasons = [a + b for a, b in zip(reasons, of_rule, strict=True)]
    assert keep.decide(dates) == reasons


@given(POLICIES, DATES)
def test_the_newest_stays_under_any_policy(keep: Keep, dates: list[int]) -> None:
    if dates and keep:
        assert kept(keep, dates)[-1] == len(dates) - 1
    if not keep:
        assert not kept(keep, dates)


@given(POLICIES, DATES, st.sampled_from(RULES))
def test_a_greater_number_keeps_no_less(keep: Keep, dates: list[int], rule: str) -> None:
    more = replace(keep, **{rule: getattr(keep, rule) + 1})
    assert set(kept(keep, dates)) <= set(kept(more, dates))


@given(POLICIES, DATES)
def test_what_is_kept_is_kept_again_for_the_same_reasons(keep: Keep, dates: list[int]) -> None:
    reasons = keep.decide(dates)
    survivors = kept(keep, dates)
    assert keep.decide([dates[at] for at in survivors]) == [reasons[at] for at in survivors]
