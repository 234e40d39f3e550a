# SPDX-License-Identifier: Apache-2.0
"""Which night a user means: NAME, NAME@NIGHT or NAME@TIME.

Decides how the word is read, and which night was the newest at a time. Pure.

A time is a date (its end is meant), or a date and a time of day, as the clocks showed it where the nights were taken
(the zone of the newest night); with "Z" or an offset it is that time. In the hour that comes twice, and in the one
that does not exist, a time without an offset has two meanings: if they lead to different nights, it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone, tzinfo

from vhdkit import errors
from vhdkit.backup.documents import offset_word
from vhdkit.backup.keep import zone_named
from vhdkit.backup.manifest import Manifest

_NUMBER = re.compile(r"0*([1-9][0-9]{0,8})")
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d))?(Z|[+-]\d\d:\d\d)?)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a word asks for: a machine by its name or id, and a night's number, a time, or neither (the newest)."""

    machine: str
    at: str | None = None

    @classmethod
    def of_word(cls, word: str) -> Wanted:
        """The meaning of NAME, NAME@NIGHT or NAME@TIME; a name has no "@". Raises InvalidArgument."""
        name, separator, at = word.partition("@")
        if not name or (separator and not at):
            raise errors.InvalidArgument(
                f"{errors.printable(word)!r} is not a machine and a night", hint="write NAME, NAME@NIGHT or NAME@TIME"
            )
        return cls(name, at if separator else None)


def chosen(manifests: Sequence[Manifest], at: str | None, name: str) -> Manifest:
    """The night that is meant among these, oldest first, none of them dropped. Raises NotFound, InvalidArgument."""
    if not manifests:
        raise errors.NotFound(f"{errors.printable(name)} has no night that can be read")
    if at is None:
        return manifests[-1]
    if found := _NUMBER.fullmatch(at):
        number = int(found[1])
        for one in manifests:
            if one.night == number:
                return one
        raise errors.NotFound(
            f"{errors.printable(name)} has no night {number}", hint=f"there are {_listed(manifests)}"
        )
    return _at_time(manifests, at, name)


def _at_time(manifests: Sequence[Manifest], at: str, name: str) -> Manifest:
    meanings = _times_of(at, _zone_of(manifests[-1]))
    found = [(time, _newest_at(manifests, time)) for time in meanings]
    if len({None if one is None else one.night for _, one in found}) > 1:
        words = [f"{name}@{at}{offset_word(time.utcoffset() or timedelta())}" for time, _ in found]
        raise errors.InvalidArgument(
            f"{errors.printable(at)} has two meanings there, as clocks were changed",
            hint=f"say which one: {errors.printable(' or '.join(words))}",
        )
    night = found[0][1]
    if night is None:
        raise errors.NotFound(
            f"{errors.printable(name)} has no night that was taken before {errors.printable(at)}",
            hint=f"there are {_listed(manifests)}",
        )
    return night


def _times_of(text: str, zone: tzinfo) -> list[datetime]:
    """What a time can mean, aware of its offset: one or two moments. Raises InvalidArgument."""
    found = _TIME.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        day = datetime.strptime(found[1], "%Y-%m-%d")
        if found[2] is None:
            return [_fixed(day.replace(hour=23, minute=59, second=59), zone)]
        seconds = int(found[4] or 59)  # the whole minute, if no second is named
        time = day.replace(hour=int(found[2]), minute=int(found[3]), second=seconds)
        if found[5] is not None:
            return [datetime.fromisoformat(time.isoformat() + found[5].replace("Z", "+00:00"))]
        both = [_fixed(time.replace(fold=fold), zone) for fold in (0, 1)]
    except (ValueError, OverflowError) as error:
        raise errors.InvalidArgument(
            f"{errors.printable(text)!r} is neither a night nor a time",
            hint="write a number such as 18, or a time such as 2026-11-30, 2026-11-30T02:30 or 2026-11-30T02:30+01:00",
        ) from error
    return both if both[0] != both[1] else both[:1]


def _fixed(time: datetime, zone: tzinfo) -> datetime:
    """The moment at which clocks in the zone show this, with its offset at that moment."""
    aware = time.replace(tzinfo=zone)
    return time.replace(tzinfo=timezone(aware.utcoffset() or timedelta()), fold=0)


def _zone_of(manifest: Manifest) -> tzinfo:
    """The zone in which a night was taken; if the system does not know it, what its clocks differed from UTC then."""
    try:
        return zone_named(manifest.zone)
    except errors.InvalidArgument:
        return timezone(manifest.utc_offset)


def _newest_at(manifests: Sequence[Manifest], time: datetime) -> Manifest | None:
    """The newest night that was taken by then."""
    return next((one for one in reversed(manifests) if one.taken <= time), None)


def _listed(manifests: Sequence[Manifest]) -> str:
    first, last = manifests[0], manifests[-1]
    if len(manifests) == 1:
        return f"night {first.night} of {first.local_time:%Y-%m-%d %H:%M} alone"
    return (
        f"{len(manifests)} nights, {first.night} of {first.local_time:%Y-%m-%d %H:%M} to {last.night} of"
        f" {last.local_time:%Y-%m-%d %H:%M}"
    )
