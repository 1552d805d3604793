"""Retention against tables of dates that were worked out by hand.

Each table is a life of a volume, the oldest snapshot first: when one was made, and the rules that keep it.
"""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from island_fast.errors import UsageError
from island_fast.operations.retain import Keep


def made(text: str) -> int:
    """Nanoseconds since 1970 UTC of a date such as 2024-02-29 13:00."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 10**9


TABLES = {
    "hours": (Keep(hourly=3), [
        ("2024-02-28 22:10:00", ""),
        ("2024-02-28 23:05:00", "hourly"),
        ("2024-02-29 00:00:00", ""),
        ("2024-02-29 00:59:59", "hourly"),
        ("2024-02-29 13:00:00", ""),
        ("2024-02-29 13:30:00", "hourly"),
    ]),
    "one hour of two days": (Keep(hourly=2), [
        ("2024-02-28 13:30:00", "hourly"),
        ("2024-02-29 13:00:00", ""),
        ("2024-02-29 13:30:00", "hourly"),
    ]),
    "days around a leap day": (Keep(daily=3), [
        ("2024-02-27 12:00:00", ""),
        ("2024-02-28 08:00:00", ""),
        ("2024-02-28 23:59:59", "daily"),
        ("2024-02-29 00:00:00", ""),
        ("2024-02-29 06:00:00", "daily"),
        ("2024-03-01 00:00:00", "daily"),
    ]),
    "days with gaps count those that have a snapshot": (Keep(daily=3), [
        ("2023-02-28 12:00:00", ""),
        ("2023-03-01 12:00:00", "daily"),
        ("2023-07-14 12:00:00", "daily"),
        ("2024-01-01 12:00:00", "daily"),
    ]),
    "the week that 2024 and 2025 share": (Keep(weekly=3), [
        ("2024-12-22 12:00:00", ""),  # Sunday of week 51
        ("2024-12-23 12:00:00", ""),  # Monday of week 52
        ("2024-12-29 23:59:59", "weekly"),  # Sunday of week 52
        ("2024-12-30 00:00:00", ""),  # Monday of week 1 of 2025
        ("2024-12-31 12:00:00", ""),
        ("2025-01-01 12:00:00", ""),
        ("2025-01-05 23:59:59", "weekly"),  # Sunday of week 1
        ("2025-01-06 00:00:00", "weekly"),  # Monday of week 2
    ]),
    "week 53": (Keep(weekly=2), [
        ("2020-12-27 12:00:00", ""),  # Sunday of week 52
        ("2020-12-28 12:00:00", ""),  # Monday of week 53
        ("2021-01-03 12:00:00", "weekly"),  # Sunday of week 53 of 2020
        ("2021-01-04 12:00:00", "weekly"),  # Monday of week 1 of 2021
    ]),
    "week 1 of two years": (Keep(weekly=2), [
        ("2024-01-01 12:00:00", "weekly"),
        ("2025-01-01 12:00:00", "weekly"),
    ]),
    "months": (Keep(monthly=3), [
        ("2023-02-28 12:00:00", ""),
        ("2023-12-01 00:00:00", ""),
        ("2023-12-31 23:59:59", "monthly"),
        ("2024-01-01 00:00:00", ""),
        ("2024-01-31 12:00:00", "monthly"),
        ("2024-02-29 23:59:59", "monthly"),
    ]),
    "years": (Keep(yearly=2), [
        ("2022-12-31 23:59:59", ""),
        ("2023-01-01 00:00:00", ""),
        ("2023-12-31 23:59:59", "yearly"),
        ("2024-01-01 00:00:00", "yearly"),
    ]),
    "the oldest stays while a rule has some left": (Keep(daily=5, weekly=1), [
        ("2024-05-01 01:00:00", "oldest daily"),
        ("2024-05-01 02:00:00", ""),
        ("2024-05-01 03:00:00", "daily"),
        ("2024-05-02 03:00:00", "daily, weekly"),
    ]),
    "and no longer": (Keep(daily=2), [
        ("2024-05-01 01:00:00", ""),
        ("2024-05-01 02:00:00", ""),
        ("2024-05-01 03:00:00", "daily"),
        ("2024-05-02 03:00:00", "daily"),
    ]),
    "several rules, each by itself": (Keep(last=1, daily=2, weekly=2, monthly=2, yearly=2), [
        ("2023-12-31 10:00:00", "yearly"),  # week 52 of 2023
        ("2024-01-01 10:00:00", "weekly"),  # week 1
        ("2024-01-31 09:00:00", ""),
        ("2024-01-31 21:00:00", "daily, monthly"),  # week 5
        ("2024-02-01 05:00:00", ""),
        ("2024-02-01 06:00:00", "last, daily, weekly, monthly, yearly"),  # week 5
    ]),
    "the last ones": (Keep(last=2), [
        ("2024-02-01 00:00:00", ""),
        ("2024-02-01 00:00:01", "last"),
        ("2024-02-01 00:00:02", "last"),
    ]),
    "more than there are": (Keep(last=9, yearly=9), [
        ("2023-02-01 00:00:00", "last, yearly"),
        ("2024-02-01 00:00:00", "last, yearly"),
    ]),
    "one is never the oldest too": (Keep(daily=7), [("2024-02-01 00:00:00", "daily")]),
    "of the same moment the later one": (Keep(last=1, hourly=2), [
        ("2024-02-01 00:00:00", "oldest hourly"),
        ("2024-02-01 00:00:00", ""),
        ("2024-02-01 00:00:00", "last, hourly"),
    ]),
    "a clock that was ahead for one snapshot": (Keep(last=1, daily=2), [
        ("2024-03-10 12:00:00", ""),
        ("2030-01-01 00:00:00", ""),
        ("2024-03-10 18:00:00", "daily"),
        ("2024-03-11 12:00:00", "last, daily"),
    ]),
    "a clock that has just gone back": (Keep(last=1, daily=1), [
        ("2024-03-11 12:00:00", ""),
        ("2024-03-09 12:00:00", "last, daily"),
    ]),
    "a clock that went back into a day that was over": (Keep(daily=3), [
        ("2024-03-09 12:00:00", "daily"),
        ("2024-03-10 08:00:00", ""),
        ("2024-03-11 08:00:00", "daily"),
        ("2024-03-10 09:00:00", "daily"),
    ]),
    "no rule": (Keep(), [("2024-02-01 00:00:00", "")]),
    "no snapshot": (Keep(last=1), []),
}  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
def test_tables(table: str) -> None:
    keep, rows = TABLES[table]
    reasons = keep.decide([made(date) for date, _ in rows])
    assert [", ".join(why) for why in reasons] == [wanted for _, wanted in rows]


def test_a_day_ends_with_its_last_nanosecond() -> None:
    midnight = made("2024-02-29 00:00:00")
    assert Keep(daily=2).decide([midnight - 1, midnight]) == [("daily",), ("daily",)]
    assert Keep(daily=1).decide([midnight, midnight + 86400 * 10**9 - 1]) == [(), ("daily",)]


def test_the_last_date_that_a_record_can_hold() -> None:
    assert Keep(yearly=2).decide([0, 2**63 - 1]) == [("yearly",), ("yearly",)]


def test_what_is_no_policy() -> None:
    assert not Keep()
    assert Keep(yearly=1)
    with pytest.raises(UsageError, match="0 or more"):
        Keep(daily=-1)
