# SPDX-License-Identifier: Apache-2.0
"""Rules of a prune: which nights stay, whatever clocks and zones do."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhdkit import errors
from vhdkit.backup.keep import DatedNight, KeepRules, out_of_order, reasons_to_keep, zone_named

BERLIN = ZoneInfo("Europe/Berlin")
START = datetime(2026, 1, 1, 2, 30, tzinfo=UTC)
counts = st.integers(0, 5)
rules = st.builds(KeepRules, counts, counts, counts, counts, counts, counts).filter(lambda one: not one.is_empty)


def every(step: timedelta, count: int, start: datetime = START) -> list[DatedNight]:
    """Nights at this distance."""
    return [DatedNight(number + 1, start + number * step) for number in range(count)]


def kept(nights: list[DatedNight], zone: str = "UTC", **of: int) -> list[int]:
    """The numbers of the nights that stay."""
    return [*reasons_to_keep(nights, KeepRules(**of), zone_named(zone))]


@st.composite
def histories(draw: st.DrawFn) -> list[DatedNight]:
    """Nights with any times, also backwards, of which some are damaged, protected or leased."""
    found, time = [], START
    for number in range(1, draw(st.integers(0, 40)) + 1):
        time += timedelta(hours=draw(st.integers(-400, 2000)))
        flags = [draw(st.integers(0, 5)) for _ in range(3)]
        found.append(DatedNight(number, time, flags[0] > 0, flags[1] == 0, flags[2] == 0))
    return found


@given(histories(), rules, st.sampled_from(["UTC", "Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe"]))
def test_what_always_stays(nights: list[DatedNight], of: KeepRules, zone: str) -> None:
    """The newest whole night, protected, leased and damaged nights stay under any rules; and each night that stays has
    a reason."""
    found = reasons_to_keep(nights, of, zone_named(zone))
    whole = [one.number for one in nights if one.is_whole]
    assert whole[-1:] == [number for number in whole[-1:] if number in found]
    for one in nights:
        assert one.number in found or (one.is_whole and not one.is_protected and not one.is_leased)
    assert set(found) <= {one.number for one in nights} and all(found.values())
    assert len([number for number in found if "last" in found[number]]) == min(of.last, len(whole))


@given(histories(), rules)
def test_pruning_again_changes_nothing(nights: list[DatedNight], of: KeepRules) -> None:
    """What stays after a prune stays in the next one with the same rules."""
    found = reasons_to_keep(nights, of, UTC)
    left = [one for one in nights if one.number in found]
    assert set(reasons_to_keep(left, of, UTC)) == set(found)


@given(histories(), rules, st.sampled_from(["last", "hourly", "daily", "weekly", "monthly", "yearly"]))
def test_a_larger_number_keeps_more(nights: list[DatedNight], of: KeepRules, name: str) -> None:
    """Raising a rule's number never drops a night."""
    more = KeepRules(**{**{one: getattr(of, one) for one in KeepRules.__slots__}, name: getattr(of, name) + 1})
    assert set(reasons_to_keep(nights, of, UTC)) <= set(reasons_to_keep(nights, more, UTC))


@given(histories(), st.data())
def test_a_failed_night_counts_for_nothing(nights: list[DatedNight], data: st.DataObject) -> None:
    """Nights that are not whole do not change which whole ones stay."""
    of = data.draw(rules)
    whole = [one for one in nights if one.is_whole]
    found = reasons_to_keep(nights, of, UTC)
    assert [one.number for one in whole if one.number in found] == [*reasons_to_keep(whole, of, UTC)]


@given(
    st.integers(5, 40),
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(-2000, 2000).filter(lambda days: abs(days) > 1),
    st.integers(1, 10),
)
def test_a_clock_that_jumps_deletes_nothing(before: int, wrong: int, after: int, days: int, daily: int) -> None:
    """A clock that is wrong by any number of days for any number of nights, and right again, costs no night: of nights
    taken daily, the last ones stay as if it had been right, except one that shares a day with its neighbour."""
    nights = every(timedelta(days=1), before + wrong + after)
    jumped = [
        DatedNight(
            one.number, one.taken + (timedelta(days=days) if before < one.number <= before + wrong else timedelta())
        )
        for one in nights
    ]
    labels = [one.taken.date() for one in jumped]
    shared = sum(one == other for one, other in pairwise(labels))
    found = kept(jumped, daily=daily)
    assert len(found) == min(daily, len(nights) - shared)
    assert not set(found) - set(range(len(nights) - daily - shared + 1, len(nights) + 1))


def test_the_calendar() -> None:
    """Days, ISO weeks, months and years each keep their newest night."""
    nights = every(timedelta(days=1), 400)
    found = reasons_to_keep(nights, KeepRules(daily=7, weekly=4, monthly=12, yearly=3), UTC)
    times = {one.number: one.taken for one in nights}
    days = {word: [times[number].date().isoformat() for number in found if word in found[number]]
            for word in ("daily", "weekly", "monthly", "yearly")}  # fmt: skip
    assert days["daily"] == [f"2027-01-{day:02d}" for day in range(29, 32)] + [
        f"2027-02-{day:02d}" for day in range(1, 5)
    ]
    assert days["weekly"] == ["2027-01-17", "2027-01-24", "2027-01-31", "2027-02-04"]
    assert days["yearly"] == ["2026-12-31", "2027-02-04"]
    assert days["monthly"][:2] == ["2026-03-31", "2026-04-30"] and len(days["monthly"]) == 12


def test_iso_weeks_do_not_end_with_the_year() -> None:
    """The week of New Year is one bucket, although it lies in two years."""
    nights = every(timedelta(days=1), 5, datetime(2026, 12, 30, 12, tzinfo=UTC))  # Wednesday to Sunday
    assert kept(nights, weekly=5) == [5]


def test_the_zone_decides_what_a_day_is() -> None:
    """Two nights on both sides of midnight in Berlin are two days there, and one in UTC."""
    nights = every(timedelta(minutes=90), 2, datetime(2026, 1, 1, 22, 15, tzinfo=UTC))
    assert kept(nights, "UTC", daily=5) == [2]
    assert kept(nights, "Europe/Berlin", daily=5) == [1, 2]


@pytest.mark.parametrize(
    ("start", "hours"),
    [(datetime(2026, 3, 28, 22, tzinfo=UTC), 8), (datetime(2026, 10, 24, 22, tzinfo=UTC), 8)],
    ids=["clocks go forward", "clocks go back"],
)
def test_both_time_changes(start: datetime, hours: int) -> None:
    """Hourly nights each have an hour of their own, also in the hour that comes twice and around the one that is
    missing."""
    nights = every(timedelta(hours=1), hours, start)
    assert kept(nights, "Europe/Berlin", hourly=hours) == [one.number for one in nights]
    local = [one.taken.astimezone(BERLIN).strftime("%H") for one in nights]
    assert (local.count("02") == 2) == (start.month == 10) and ("02" in local) == (start.month == 10)


def test_two_nights_in_one_hour_that_comes_twice() -> None:
    """The two halves of the hour that comes twice are two hours; two nights within one of them are one."""
    first = datetime(2026, 10, 25, 0, 10, tzinfo=UTC)  # 02:10, summer time
    nights = every(timedelta(minutes=30), 4, first)
    assert kept(nights, "Europe/Berlin", hourly=9) == [2, 4]
    assert kept(nights, "Europe/Berlin", daily=9) == [4]


def test_another_zone_deletes_only_what_the_rules_say() -> None:
    """After a change of the zone the same number of days stays."""
    nights = every(timedelta(days=1), 30)
    for zone in ("UTC", "Pacific/Kiritimati", "Pacific/Pago_Pago"):
        assert kept(nights, zone, daily=10) == list(range(21, 31))


def test_a_clock_that_runs_backwards_is_reported() -> None:
    """A night with an earlier time than the one before it is named together with that one."""
    nights = every(timedelta(days=1), 3)
    wrong = [nights[0], DatedNight(2, START - timedelta(days=1)), nights[2]]
    assert out_of_order(nights) == [] and out_of_order(wrong) == [(2, 1)]


def test_no_rules_keep_nothing_by_accident() -> None:
    """Without rules everything would go, so that is refused, with rules to type; a negative number is, too."""
    with pytest.raises(errors.InvalidArgument, match="--keep-daily 7"):
        reasons_to_keep(every(timedelta(days=1), 3), KeepRules(), UTC)
    with pytest.raises(errors.InvalidArgument, match="negative"):
        KeepRules(daily=-1)


@pytest.mark.parametrize("name", ["Mars/Olympus", "", "../../etc/passwd", "/etc/localtime", "UTC\0", "x" * 300])
def test_unknown_zones(name: str) -> None:
    """A zone that this system does not know, or that is a path, is refused."""
    with pytest.raises(errors.InvalidArgument, match="not a time zone"):
        zone_named(name)
