# SPDX-License-Identifier: Apache-2.0
"""When schedules are due: the expressions, the moments, and the nights in which clocks are changed."""

from __future__ import annotations

import re
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import require_tool
from vmm.model.errors import InvalidSpec
from vmm.schedule.calendar import Calendar, parse

NOW = datetime(2026, 3, 27, 12, tzinfo=UTC)  # two days before clocks are set forward in Europe
AUTUMN = datetime(2026, 10, 24, 12, tzinfo=UTC)
BERLIN = "Europe/Berlin"


def calendar(text: str, zone: str = "UTC") -> Calendar:
    """What the expression means."""
    return parse(text, zone, now=NOW)


def following(text: str, zone: str, moment: datetime, count: int) -> list[str]:
    """The next due moments, as "MONTH-DAY HOUR:MINUTE" in UTC."""
    found, made = [], calendar(text, zone)
    for _ in range(count):
        due = made.next_due(moment)
        assert due is not None and due > moment
        moment = due
        found.append(f"{due:%m-%d %H:%M}")
    return found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("22:30", "*-*-* 22:30:00 UTC"),
        ("22:30:00", "*-*-* 22:30:00 UTC"),
        ("  Mon..Fri   7:5 ", "Mon,Tue,Wed,Thu,Fri *-*-* 07:05:00 UTC"),
        ("saturday,Sun 06,18:15", "Sat,Sun *-*-* 06,18:15:00 UTC"),
        ("*-*-01 05:00", "*-*-01 05:00:00 UTC"),
        ("Sun *-1,7-1..7 4:0", "Sun *-01,07-01,02,03,04,05,06,07 04:00:00 UTC"),
        ("*:00/30", "*-*-* *:00,30:00 UTC"),
        ("*:*/15", "*-*-* *:00,15,30,45:00 UTC"),
        ("0/6:00", "*-*-* 00,06,12,18:00:00 UTC"),
        ("hourly", "*-*-* *:00:00 UTC"),
        ("Daily", "*-*-* 00:00:00 UTC"),
        ("weekly", "Mon *-*-* 00:00:00 UTC"),
        ("monthly", "*-*-01 00:00:00 UTC"),
    ],
)
def test_expressions(text: str, words: str) -> None:
    """Each expression that is supported becomes the one that systemd gets."""
    assert calendar(text).systemd_words == words


@pytest.mark.parametrize(
    "text",
    ["", "22", "25:00", "22:60", "22:30:30", "Moon 22:30", "Fri..Mon 22:30", "2026-01-01 22:30", "*-13-01 22:30",
     "*-*-0 22:30", "22:30 UTC", "*-*-* *-*-* 22:30", "a b c d", "0/0:00", "*..5:00", "5..3:00", "*:00-30", "yearly",
     "*-*~1 05:00", "-1:00", "²2:30", "*-02-30 05:00"],
)  # fmt: skip
def test_what_is_not_supported_is_refused(text: str) -> None:
    """Anything else, also what systemd would take, and a day that no year has, is an error with an example."""
    with pytest.raises(InvalidSpec, match="write one such as"):
        calendar(text)


def test_the_reason_of_a_refusal_is_a_sentence() -> None:
    """An hour that does not exist is "not an hour", a minute "not a minute"."""
    with pytest.raises(InvalidSpec, match="'25' is not an hour between 0 and 23"):
        calendar("25:00")
    with pytest.raises(InvalidSpec, match="'60' is not a minute between 0 and 59"):
        calendar("22:60")


def test_an_unknown_zone_is_refused() -> None:
    """A zone is one of the system's names; it cannot be a path."""
    for zone in ("Mars/Olympus", "../../etc/passwd", "", "/etc/localtime"):
        with pytest.raises(InvalidSpec, match="time zone"):
            calendar("22:30", zone)


def test_a_time_that_clocks_skip_is_not_due() -> None:
    """In the night that lacks 02:30 nothing is due then, and the day after it is."""
    assert following("02:30", BERLIN, NOW, 3) == ["03-28 01:30", "03-30 00:30", "03-31 00:30"]


def test_a_time_that_comes_twice_is_due_once() -> None:
    """In the night that has 02:30 twice it is due the first time; an hourly schedule goes on."""
    assert following("02:30", BERLIN, AUTUMN, 2) == ["10-25 00:30", "10-26 01:30"]
    second = datetime(2026, 10, 25, 1, 45, tzinfo=UTC)  # 02:45, for the second time
    assert calendar("02:30", BERLIN).last_due(second) == datetime(2026, 10, 25, 0, 30, tzinfo=UTC)


def test_the_last_due_moment() -> None:
    """The last due moment is the newest that is not in the future, at the moment itself too."""
    made = calendar("Mon 22:30")
    due = datetime(2026, 3, 23, 22, 30, tzinfo=UTC)
    assert made.last_due(NOW) == due == made.last_due(due)
    assert made.last_due(due - timedelta(seconds=1)) == due - timedelta(days=7)
    leap = calendar("*-02-29 00:00").last_due(datetime(2103, 1, 1, tzinfo=UTC))
    assert leap == datetime(2096, 2, 29, tzinfo=UTC)
    assert calendar("*-02-29 00:00").next_due(leap) == datetime(2104, 2, 29, tzinfo=UTC)
    assert calendar("Mon *-02-29 00:00").next_due(datetime(2073, 1, 1, tzinfo=UTC)) == datetime(
        2112, 2, 29, tzinfo=UTC
    )


def test_moments_between() -> None:
    """The moments between two times: the first is not counted, the second is."""
    made = calendar("*:00")
    hours = [NOW + timedelta(hours=number) for number in (1, 2, 3)]
    assert list(made.due_between(NOW, hours[-1])) == hours
    assert not list(made.due_between(NOW, NOW + timedelta(minutes=59)))


@pytest.mark.parametrize(
    ("text", "zone", "warns"),
    [("02:30", BERLIN, True), ("00:00", "America/New_York", True), ("04:00", BERLIN, False), ("02:30", "UTC", False),
     ("02:30", "Asia/Tokyo", False), ("hourly", BERLIN, False), ("22,3:00", BERLIN, True)],
)  # fmt: skip
def test_the_warning_about_clocks(text: str, zone: str, warns: bool) -> None:
    """A time between 00:00 and 04:00 in a zone whose clocks change is warned about."""
    assert (calendar(text, zone).warning(NOW) is not None) is warns


PARTS = {
    "days": st.sampled_from(["", "Mon ", "Tue..Thu ", "Sat,Sun "]),
    "date": st.sampled_from(["", "*-*-* ", "*-*-1,15 ", "*-1..6-* ", "*-3,10-25..31 "]),
    "hour": st.sampled_from(["*", "2", "0/6", "1..3", "23"]),
    "minute": st.sampled_from(["00", "30", "*/20", "5,55"]),
}
EXPRESSIONS = st.builds(lambda days, date, hour, minute: f"{days}{date}{hour}:{minute}", **PARTS)
ZONES = st.sampled_from(["UTC", BERLIN, "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"])
MOMENTS = st.datetimes(datetime(2020, 1, 1), datetime(2037, 1, 1)).map(lambda one: one.replace(tzinfo=UTC))


@given(EXPRESSIONS, ZONES, MOMENTS)
def test_last_and_next_are_neighbours(text: str, zone: str, moment: datetime) -> None:
    """No due moment lies between the last and the next one, and each leads to the other."""
    made = calendar(text, zone)
    last, following = made.last_due(moment), made.next_due(moment)
    assert last is not None and following is not None and last <= moment < following
    assert made.next_due(last) == following and made.last_due(following - timedelta(seconds=1)) == last


@pytest.mark.parametrize("zone", ["UTC", BERLIN, "America/New_York"])
@pytest.mark.parametrize("begin", [NOW, AUTUMN], ids=["spring", "autumn"])
def test_systemd_means_the_same(zone: str, begin: datetime) -> None:
    """systemd's next moments for the expression that it gets are ours, also where clocks are changed."""
    analyze = require_tool("systemd-analyze")
    texts = ("02:30", "Mon..Fri 22:30", "Sun 01,03:15", "*-*-01 05:00", "*:30", "0/6:00", "*-02-29 00:00")
    words = [calendar(text, zone).systemd_words for text in texts]
    base = begin.strftime("--base-time=%Y-%m-%d %H:%M:%S UTC")
    done = subprocess.run(
        [analyze, "calendar", "--iterations=4", base, *words], capture_output=True, text=True, check=True,
        env={"TZ": "UTC", "LC_ALL": "C"},
    )  # fmt: skip
    theirs = re.findall(r"(?:Next elapse|Iter(?:ation|\.) #\d+): \w+ \d+-(\S+ \d+:\d+):00 UTC", done.stdout)
    assert theirs == [one for text in texts for one in following(text, zone, begin, 4)]
