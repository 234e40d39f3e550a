# SPDX-License-Identifier: Apache-2.0
"""When a schedule is due: a subset of systemd's calendar expressions, in a named time zone. Pure; the time is given.

    [DAYS] [DATE] TIME        Mon..Fri 22:30      *-*-01 05:00      Sat,Sun 06,18:15      *:00/30
    hourly  daily  weekly  monthly                as in systemd: at minute 0, at 00:00, on Mondays, on the 1st

DAYS are names of weekdays, DATE is `*-MONTH-DAY`, TIME is `HOUR:MINUTE`. Each number may be `*`, a list (`1,15`), a
range (`1..5`), or a step (`0/6`: 0, 6, 12, 18; `*/15`). Not taken over: years, seconds, the last days of a month.

Decides what an expression means, and which one systemd gets (`systemd_words`): both mean the same moments. A time that
clocks skip, when they are set forward, is not due on that day, and one that they show twice is due once, the first
time, as systemd does it. So a zone without such days, UTC, is the default, and `warning` says what to do in others.

Source: systemd.time(7), "CALENDAR EVENTS".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo

from vmm.model.errors import InvalidSpec

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WORDS = {
    "hourly": "*-*-* *:00",
    "daily": "*-*-* 00:00",
    "weekly": "Mon *-*-* 00:00",
    "monthly": "*-*-01 00:00",
}
_PART = re.compile(r"(\*|\d{1,2})(?:\.\.(\d{1,2}))?(?:/(\d{1,2}))?", re.ASCII)
_DATE = re.compile(r"\*-([^-\s]+)-([^-\s]+)")
_TIME = re.compile(r"([^:\s]+):([^:\s]+)(?::0?0)?")
_LIMITS = {"month": (1, 12), "day": (1, 31), "hour": (0, 23), "minute": (0, 59)}
_MOST_DAYS = 40 * 366 + 1  # between two 29ths of February that are the same weekday, around a year such as 2100
_CHANGING_HOURS = frozenset(range(4))  # in which clocks are set forward and back
_EXAMPLES = 'such as "22:30", "Mon..Fri 22:30", "*-*-01 05:00" or "*:00/30"'


@dataclass(frozen=True, slots=True)
class Calendar:
    """The moments at which something is due; make it with `parse`. `weekdays`: 0 is Monday. `zone` is a name."""

    text: str
    weekdays: tuple[int, ...]
    months: tuple[int, ...]
    days: tuple[int, ...]
    hours: tuple[int, ...]
    minutes: tuple[int, ...]
    zone: str

    @property
    def systemd_words(self) -> str:
        """The expression for systemd, with the zone."""
        weekdays = "" if len(self.weekdays) == len(_DAYS) else ",".join(_DAYS[one].title() for one in self.weekdays)
        month, day, hour, minute = (
            _word_of(values, _LIMITS[name])
            for name, values in (
                ("month", self.months),
                ("day", self.days),
                ("hour", self.hours),
                ("minute", self.minutes),
            )
        )
        return f"{weekdays} *-{month}-{day} {hour}:{minute}:00 {self.zone}".lstrip()

    def last_due(self, moment: datetime) -> datetime | None:
        """The newest due moment that is not after `moment`, in UTC; None if there never was one."""
        zone = zone_of(self.zone)
        day = moment.astimezone(zone).date()
        for back in range(_MOST_DAYS):
            for due in reversed(self._due_on(day - timedelta(days=back), zone)):
                if due <= moment:
                    return due
        return None

    def next_due(self, moment: datetime) -> datetime | None:
        """The first due moment after `moment`, in UTC; None if there is none any more."""
        zone = zone_of(self.zone)
        day = moment.astimezone(zone).date()
        for ahead in range(_MOST_DAYS):
            for due in self._due_on(day + timedelta(days=ahead), zone):
                if due > moment:
                    return due
        return None

    def due_between(self, after: datetime, until: datetime) -> Iterator[datetime]:
        """The due moments after `after` that are not after `until`."""
        due = self.next_due(after)
        while due is not None and due <= until:
            yield due
            due = self.next_due(due)

    def _due_on(self, day: date, zone: tzinfo) -> list[datetime]:
        """The due moments of a day, in order."""
        if day.weekday() not in self.weekdays or day.month not in self.months or day.day not in self.days:
            return []
        times = (
            datetime(day.year, day.month, day.day, hour, minute, tzinfo=zone)
            for hour in self.hours
            for minute in self.minutes
        )
        found = ((one, one.astimezone(UTC)) for one in times)
        # A time that clocks skip is another one when it comes back.
        return [due for one, due in found if due.astimezone(zone).replace(tzinfo=None) == one.replace(tzinfo=None)]

    def warning(self, now: datetime) -> str | None:
        """What a change of the clocks would do to this, in words; None if nothing."""
        if not _CHANGING_HOURS.intersection(self.hours) or len(self.hours) == 24:
            return None
        zone, day = zone_of(self.zone), timedelta(days=1)
        if len({(now + number * day).astimezone(zone).utcoffset() for number in range(370)}) == 1:
            return None
        return (
            f"clocks in {self.zone} are set forward and back between 00:00 and 04:00: a time that they skip is not due"
            " in that night. Choose a time outside, or --zone UTC"
        )


def parse(text: str, zone: str = "UTC", *, now: datetime) -> Calendar:
    """What an expression means in a zone. Raises InvalidSpec, also for one that is never due after `now`."""
    zone_of(zone)
    words = _WORDS.get(text.strip().lower(), text).split()
    try:
        weekdays = _weekdays(words.pop(0)) if words and words[0][0].isalpha() else tuple(range(len(_DAYS)))
        month, day = _date(words.pop(0)) if len(words) == 2 else ("*", "*")
        if len(words) != 1 or (timed := _TIME.fullmatch(words[0])) is None:
            raise ValueError("it needs a time, HOUR:MINUTE")
        found = Calendar(
            text.strip(), weekdays, _numbers(month, "month"), _numbers(day, "day"), _numbers(timed[1], "hour"),
            _numbers(timed[2], "minute"), zone,
        )  # fmt: skip
    except (ValueError, IndexError) as error:
        raise InvalidSpec(
            f"{text!r} is not a time that is supported: {error}", hint=f"write one {_EXAMPLES}"
        ) from error
    if found.next_due(now) is None:
        raise InvalidSpec(f"{text!r} is never due: no year has such a day", hint=f"write one {_EXAMPLES}")
    return found


def zone_of(name: str) -> tzinfo:
    """The time zone of that name. Raises InvalidSpec."""
    if name == "UTC":
        return UTC  # also where the system has no database of zones
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        raise InvalidSpec(
            f"{name!r} is not a time zone that this system knows", hint="use a name such as Europe/Berlin or UTC"
        ) from error


def _date(word: str) -> tuple[str, str]:
    found = _DATE.fullmatch(word)
    if found is None:
        raise ValueError(f"{word!r} is not a date, *-MONTH-DAY")
    return found[1], found[2]


def _weekdays(word: str) -> tuple[int, ...]:
    found: set[int] = set()
    for part in word.split(","):
        first, _, last = part.partition("..")
        begin, end = _weekday(first), _weekday(last or first)
        if begin > end:
            raise ValueError(f"{part} runs backwards")
        found.update(range(begin, end + 1))
    return tuple(sorted(found))


def _weekday(word: str) -> int:
    """The number of a weekday, by its English name or the first three letters of it."""
    full = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
    names = [one for one in full if word.lower() in (one, one[:3])]
    if not names:
        raise ValueError(f"{word!r} is not a weekday, such as Mon")
    return full.index(names[0])


def _numbers(word: str, name: str) -> tuple[int, ...]:
    """The numbers that a list of parts means. Raises ValueError."""
    least, most = _LIMITS[name]
    article = "an" if name == "hour" else "a"
    found: set[int] = set()
    for part in word.split(","):
        matched = _PART.fullmatch(part)
        if matched is None or (matched[1] == "*" and matched[2]):
            raise ValueError(f"{part!r} is not {article} {name}")
        begin = least if matched[1] == "*" else int(matched[1])
        step = int(matched[3]) if matched[3] else 1
        alone = matched[1] != "*" and not matched[2] and not matched[3]
        end = begin if alone else int(matched[2] or most)
        if not least <= begin <= end <= most or step == 0:
            raise ValueError(f"{part!r} is not {article} {name} between {least} and {most}")
        found.update(range(begin, end + 1, step))
    return tuple(sorted(found))


def _word_of(values: Sequence[int], limits: tuple[int, int]) -> str:
    if len(values) == limits[1] - limits[0] + 1:
        return "*"
    return ",".join(f"{one:02d}" for one in values)
