# SPDX-License-Identifier: Apache-2.0
"""Which night a word means."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vhdkit.backup.repositories import manifest
from vhdkit import errors
from vhdkit.backup.choosing import Wanted, chosen
from vhdkit.backup.manifest import Manifest


def taken(*times: str, zone: str = "Europe/Berlin") -> list[Manifest]:
    """Nights that were taken at these times, in UTC."""
    return [
        manifest(number, taken=datetime.fromisoformat(time).replace(tzinfo=UTC), zone=zone)
        for number, time in enumerate(times, 1)
    ]


DAILY = taken("2026-10-23T00:30", "2026-10-24T00:30", "2026-10-25T00:30", "2026-10-25T01:30", "2026-10-26T01:30")


@pytest.mark.parametrize(
    ("word", "machine", "at"),
    [("web", "web", None), ("prune", "prune", None), ("prune@18", "prune", "18"), ("list@2026-01", "list", "2026-01"),
     ("Web server@2026-01-01 02:30", "Web server", "2026-01-01 02:30")],
)  # fmt: skip
def test_words(word: str, machine: str, at: str | None) -> None:
    """A machine may have any name, also that of a command; what follows "@" is a night or a time."""
    assert Wanted.of_word(word) == Wanted(machine, at)


@pytest.mark.parametrize("word", ["", "@", "@18", "web@"])
def test_other_words(word: str) -> None:
    """Without a name, or with nothing after "@", a word is refused with the forms that there are."""
    with pytest.raises(errors.InvalidArgument, match="NAME@NIGHT"):
        Wanted.of_word(word)


@pytest.mark.parametrize(
    ("at", "night"),
    [
        (None, 5), ("1", 1), ("00003", 3), ("2026-10-24", 2), ("2026-10-25", 4), ("2030-01-01", 5),
        ("2026-10-24T02:29", 1), ("2026-10-24T02:30", 2), ("2026-10-24 02:30", 2), ("2026-10-24T00:30Z", 2),
        ("2026-10-24T00:29:59Z", 1), ("2026-10-25T02:30+02:00", 3), ("2026-10-25T02:30+01:00", 4),
        ("2026-10-25T02:29+01:00", 3),
    ],
)  # fmt: skip
def test_the_newest_night_at_a_time(at: str | None, night: int) -> None:
    """A number is that night; a time is the newest one taken by then, as the clocks showed it there."""
    assert chosen(DAILY, at, "web").night == night


def test_the_hour_that_comes_twice() -> None:
    """In the hour that comes twice a time without an offset is refused where it matters, with both to choose from."""
    with pytest.raises(errors.InvalidArgument, match="two meanings") as caught:
        chosen(DAILY, "2026-10-25T02:30", "web")
    assert "web@2026-10-25T02:30+02:00 or web@2026-10-25T02:30+01:00" in str(caught.value)
    assert chosen(DAILY[:3], "2026-10-25T02:45", "web").night == 3  # both meanings are the same night
    assert chosen(DAILY, "2026-10-25T03:00", "web").night == 4


def test_the_hour_that_does_not_exist() -> None:
    """A time that the clocks skipped means what it can only mean, or is refused if that matters."""
    nights = taken("2026-03-28T01:30", "2026-03-29T00:45", "2026-03-29T01:15")
    assert chosen(nights[:2], "2026-03-29T02:50", "web").night == 2
    with pytest.raises(errors.InvalidArgument, match="two meanings"):
        chosen(nights, "2026-03-29T02:30", "web")


@pytest.mark.parametrize(
    "at", ["2026-02-30", "yesterday", "2026-1-1", "-1", "0", "2026-10-25T25:00", "٢", "1" * 12, "9999-12-31"]
)
def test_what_is_neither(at: str) -> None:
    """Text that is neither a number nor a time is refused with examples, and a far future means the newest night."""
    if at == "9999-12-31":
        assert chosen(DAILY, at, "web").night == 5
        return
    with pytest.raises(errors.InvalidArgument, match="2026-11-30T02:30"):
        chosen(DAILY, at, "web")


def test_nights_that_do_not_exist() -> None:
    """A night that does not exist is an error that says which there are."""
    with pytest.raises(errors.NotFound, match=r"no night 9.*5 nights, 1 of 2026-10-23"):
        chosen(DAILY, "9", "web")
    with pytest.raises(errors.NotFound, match="taken before 2020-01-01"):
        chosen(DAILY, "2020-01-01", "web")
    with pytest.raises(errors.NotFound):
        chosen([], None, "web")


def test_an_unknown_zone() -> None:
    """Where the system does not know the zone of a night, its difference from UTC at that time is used."""
    nights = taken("2026-10-23T00:30", "2026-10-24T00:30", zone="Mars/Olympus")
    assert (
        chosen(nights, "2026-10-24T01:29", "web").night == 1 and chosen(nights, "2026-10-24T01:30", "web").night == 2
    )


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=10), st.integers(0, 10_000))
def test_the_choice_is_the_newest_by_number(minutes: list[int], at: int) -> None:
    """Whatever the clocks did, a time means the night with the highest number that was taken by then."""
    start = datetime(2026, 5, 1, tzinfo=UTC)
    nights = [manifest(number, taken=start + timedelta(minutes=one)) for number, one in enumerate(minutes, 1)]
    word = (start + timedelta(minutes=at)).strftime("%Y-%m-%dT%H:%M:%SZ")
    expected = [number for number, one in enumerate(minutes, 1) if one <= at]
    if expected:
        assert chosen(nights, word, "web").night == expected[-1]
    else:
        with pytest.raises(errors.NotFound):
            chosen(nights, word, "web")
