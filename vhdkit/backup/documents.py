# SPDX-License-Identifier: Apache-2.0
"""JSON documents in a repository: how one is read without trusting it, and how one is written.

Decides how long and how deep a document may be, which values a field may have, what an unknown field and an unknown
format mean, and what the digest covers. Must not know what a document is about.

- A document is at most `MAX_DOCUMENT_BYTES` long, which bounds the memory that reading it takes.
- A name that occurs twice in an object, NaN, and any value of another type or outside its bounds damages it.
- Unknown fields are kept and written again (`Fields.others`). What an older program must not ignore gets another
  `format`, which it refuses.
- `digest` is the SHA-256 of the document without it, as JSON with sorted names and without spaces. It finds damage; it
  proves nothing about the origin.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from vhdkit import errors
from vhdkit.units import MIB

MAX_DOCUMENT_BYTES = MIB  # a manifest has about 700 bytes for each disk
MAX_TEXT_CHARACTERS = 1000
MAX_COUNT = 1 << 62  # of bytes, and of anything else
_YEARS = range(1970, 9999)  # so that no zone leads out of what a datetime can be
_TIME = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)Z")
_OFFSET = re.compile(r"([+-])(\d\d):(\d\d)(?::(\d\d))?")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


class DamagedRepository(errors.VhdkitError):
    """A file of a repository is missing, or is not what vhdkit can have written."""

    exit_code = 3


def parsed(raw: bytes, path: str, *, formats: tuple[int, ...] = (1,), has_digest: bool = True) -> Fields:
    """The fields of the document `raw`. `formats` are those that the caller can read.

    Raises DamagedRepository, UnsupportedFormat for another format.
    """
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise DamagedRepository(f"has more than {MAX_DOCUMENT_BYTES} bytes", path=path)
    try:
        document = json.loads(
            raw.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise DamagedRepository("is not a JSON document", path=path, hint="restore the file from a copy") from error
    if not isinstance(document, dict):
        raise DamagedRepository("is not a JSON object", path=path)
    fields = Fields(document, path)
    found = fields.number("format", 1)
    if found not in formats:
        raise errors.UnsupportedFormat(
            f"has format {found}, which this version of vhdkit does not know", path=path, hint="use a newer vhdkit"
        )
    if has_digest and fields.taken("digest", _DIGEST.fullmatch) != digest_of(document):
        raise DamagedRepository(
            "its digest is wrong: the file was damaged, or changed by another program",
            path=path,
            hint="restore the file from a copy",
        )
    return fields


def encoded(document: Mapping[str, Any]) -> bytes:
    """The bytes of a document, its digest included. Raises InvalidArgument if it would be too long to be read."""
    whole = {**document, "digest": digest_of(document)}
    raw = json.dumps(whole, indent=1).encode() + b"\n"
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise errors.InvalidArgument(f"the record would have more than {MAX_DOCUMENT_BYTES} bytes")
    return raw


def digest_of(document: Mapping[str, Any]) -> str:
    """The digest of a document; a digest in it is left out."""
    rest = {name: value for name, value in document.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"{word} is too large")
    return value


class Fields:
    """The fields of one JSON object; each is taken once. `place` says where it is in the document, for messages."""

    def __init__(self, document: Mapping[str, Any], path: str, place: str = "") -> None:
        self._document, self._path, self._place = document, path, place
        self._taken: set[str] = {"digest"} if not place else set()

    @property
    def others(self) -> dict[str, Any]:
        """The fields that were not taken: a newer program's."""
        return {name: value for name, value in self._document.items() if name not in self._taken}

    def damaged(self, name: str, problem: str = "is missing or has a value that it cannot have") -> DamagedRepository:
        """The error for a field."""
        return DamagedRepository(f"{self._place}{name} {problem}", path=self._path, structure="JSON document")

    def _value(self, name: str) -> Any:
        self._taken.add(name)
        return self._document.get(name)

    def taken(self, name: str, is_good: Callable[[str], object]) -> str:
        """A text that `is_good`."""
        value = self._value(name)
        if not isinstance(value, str) or len(value) > MAX_TEXT_CHARACTERS or not is_good(value):
            raise self.damaged(name)
        return value

    def optional(self, name: str, is_good: Callable[[str], object]) -> str | None:
        """The same, or None for null and for a missing field."""
        self._taken.add(name)
        return None if self._document.get(name) is None else self.taken(name, is_good)

    def converted(self, name: str, convert: Callable[[str], _T | None]) -> _T:
        """What a text stands for: `convert` returns None, or raises ValueError, for text that stands for nothing."""
        text = self.taken(name, bool)
        try:
            value = convert(text)
        except ValueError as error:
            raise self.damaged(name) from error
        if value is None:
            raise self.damaged(name)
        return value

    def number(self, name: str, least: int = 0, most: int = MAX_COUNT) -> int:
        """A whole number within these bounds."""
        value = self._value(name)
        if type(value) is not int or not least <= value <= most:
            raise self.damaged(name)
        return value

    def optional_number(self, name: str, least: int = 0, most: int = MAX_COUNT) -> int | None:
        """The same, or None."""
        self._taken.add(name)
        return None if self._document.get(name) is None else self.number(name, least, most)

    def flag(self, name: str) -> bool:
        """true or false; a missing field is false."""
        value = self._value(name)
        if value is not None and not isinstance(value, bool):
            raise self.damaged(name)
        return bool(value)

    def time(self, name: str) -> datetime:
        """A time in UTC, to the second."""
        return self.converted(name, time_of)

    def offset(self, name: str) -> timedelta:
        """The difference of a zone from UTC, less than a day."""
        return self.converted(name, offset_of)

    def object(self, name: str) -> Fields:
        """An object."""
        value = self._value(name)
        if not isinstance(value, dict):
            raise self.damaged(name)
        return Fields(value, self._path, f"{self._place}{name}.")

    def optional_object(self, name: str) -> Fields | None:
        """The same, or None."""
        self._taken.add(name)
        return None if self._document.get(name) is None else self.object(name)

    def objects(self, name: str, most: int) -> list[Fields]:
        """A list of at most so many objects; a missing field is an empty one."""
        value = self._list(name, most)
        if not all(isinstance(one, dict) for one in value):
            raise self.damaged(name)
        return [Fields(one, self._path, f"{self._place}{name}[{index}].") for index, one in enumerate(value)]

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A list of at most so many texts; a missing field is an empty one."""
        value = self._list(name, most)
        if not all(isinstance(one, str) and len(one) <= MAX_TEXT_CHARACTERS for one in value):
            raise self.damaged(name)
        return tuple(value)

    def _list(self, name: str, most: int) -> list[Any]:
        value = self._value(name)
        if value is None:
            return []
        if not isinstance(value, list) or len(value) > most:
            raise self.damaged(name)
        return value


def time_word(time: datetime) -> str:
    """A time as documents have it: UTC, to the second."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def time_of(text: str) -> datetime | None:
    """The time that the word stands for. Raises ValueError for a day or an hour that does not exist."""
    found = _TIME.fullmatch(text)
    if found is None or not text.isascii() or int(found[1]) not in _YEARS:
        return None
    return datetime(*map(int, found.groups()), tzinfo=UTC)  # type: ignore[arg-type, misc]


def offset_word(offset: timedelta) -> str:
    """A difference from UTC: "+01:00"."""
    seconds = round(offset.total_seconds())
    hours, rest = divmod(abs(seconds), 3600)
    minutes, odd = divmod(rest, 60)
    return f"{'-' if seconds < 0 else '+'}{hours:02d}:{minutes:02d}" + (f":{odd:02d}" if odd else "")


def offset_of(text: str) -> timedelta | None:
    """The difference that the word stands for; None for other text, and for a day or more."""
    found = _OFFSET.fullmatch(text)
    if found is None or not text.isascii():
        return None
    hours, minutes, seconds = (int(one or 0) for one in found.groups()[1:])
    if hours > 23 or minutes > 59 or seconds > 59:
        return None
    offset = timedelta(hours=hours, minutes=minutes, seconds=seconds)
    return -offset if found[1] == "-" else offset
