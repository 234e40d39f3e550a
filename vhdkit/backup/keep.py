# SPDX-License-Identifier: Apache-2.0
"""Which nights stay: the rules of a prune, as a pure function.

Decides what a rule means and which nights are always kept. Must not know files.

A rule such as `daily` keeps the newest night of each of the last N days that have one. Days, weeks (ISO), months and
years are those of a named time zone; the hour that comes twice when clocks are set back is two hours. Nights are in
the order of their numbers, which does not depend on a clock: a bucket is a run of nights whose times fall into the
same day. So N buckets are counted from the nights that there are, not from the present time, and a clock that was
wrong for a while costs no night: its nights are runs of their own.

Only whole nights count. Always kept are the newest of them, and protected and leased nights; damaged nights are kept,
too, until they are deleted by name, as most of a damaged night may still be good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, tzinfo
from itertools import pairwise
from zoneinfo import ZoneInfo

from vhdkit import errors


@dataclass(frozen=True, slots=True)
class KeepRules:
    """How many of each kind of bucket keep a night; any rule is enough. Raises InvalidArgument for negative ones."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0

    def __post_init__(self) -> None:
        for one in fields(self):
            if getattr(self, one.name) < 0:
                raise errors.InvalidArgument(f"--keep-{one.name} cannot be negative")

    @property
    def is_empty(self) -> bool:
        """True if no rule keeps anything."""
        return not any(getattr(self, one.name) for one in fields(self))


@dataclass(frozen=True, slots=True)
class DatedNight:
    """A night, as far as the rules see it. `taken` is aware of its zone."""

    number: int
    taken: datetime
    is_whole: bool = True
    is_protected: bool = False
    is_leased: bool = False


def zone_named(name: str) -> tzinfo:
    """The time zone with this name ("Europe/Berlin", "UTC"). Raises InvalidArgument."""
    if name == "UTC":
        return UTC  # also where the system has no database of zones
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        raise errors.InvalidArgument(
            f"{errors.printable(name)!r} is not a time zone that this system knows",
            hint="use a name such as Europe/Berlin or UTC; the names are in the package tzdata",
        ) from error


def reasons_to_keep(nights: Sequence[DatedNight], rules: KeepRules, zone: tzinfo) -> dict[int, tuple[str, ...]]:
    """Why each night that stays does, by its number; every other night may go.

    Raises InvalidArgument if no rule keeps anything.
    """
    if rules.is_empty:
        raise errors.InvalidArgument(
            "no rule says which nights to keep", hint="give at least one, such as --keep-daily 7 --keep-weekly 4"
        )
    found: dict[int, list[str]] = {}
    ordered = sorted(nights, key=lambda one: one.number)
    whole = [one for one in reversed(ordered) if one.is_whole]  # newest first
    if whole:
        found.setdefault(whole[0].number, []).append("newest")
    for one in whole[: rules.last]:
        found.setdefault(one.number, []).append("last")
    for name, label in _LABELS.items():
        for number in _newest_of_runs(whole, getattr(rules, name), label, zone):
            found.setdefault(number, []).append(name)
    for one in ordered:
        if not one.is_whole:
            found.setdefault(one.number, []).append("damaged")
        if one.is_protected:
            found.setdefault(one.number, []).append("protected")
        if one.is_leased:
            found.setdefault(one.number, []).append("being read")
    return {number: tuple(words) for number, words in sorted(found.items())}


def out_of_order(nights: Sequence[DatedNight]) -> list[tuple[int, int]]:
    """(night, the one before it) wherever a night has an earlier time than the one before it: a clock was wrong."""
    ordered = sorted(nights, key=lambda one: one.number)
    return [(late.number, early.number) for early, late in pairwise(ordered) if late.taken < early.taken]


def _newest_of_runs(
    newest_first: Sequence[DatedNight], count: int, label: Callable[[datetime], object], zone: tzinfo
) -> list[int]:
    """The newest night of each of the last `count` runs of nights with one label."""
    found: list[int] = []
    last: object = None
    for one in newest_first:
        if len(found) == count:
            break
        of_this = label(one.taken.astimezone(zone))
        if of_this != last:
            found.append(one.number)
        last = of_this
    return found


_LABELS: dict[str, Callable[[datetime], object]] = {
    "hourly": lambda time: (time.date(), time.hour, time.utcoffset()),
    "daily": lambda time: time.date(),
    "weekly": lambda time: time.isocalendar()[:2],
    "monthly": lambda time: (time.year, time.month),
    "yearly": lambda time: time.year,
}
