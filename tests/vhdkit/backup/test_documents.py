# SPDX-License-Identifier: Apache-2.0
"""Documents of a repository are read without being trusted."""

from __future__ import annotations

import json
import tracemalloc
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhdkit import errors
from vhdkit.backup import documents
from vhdkit.backup.documents import MAX_DOCUMENT_BYTES, DamagedRepository, encoded, parsed

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(max_size=8), JSON, max_size=6))
def test_what_is_written_is_read(document: dict[str, Any]) -> None:
    """A document is read as it was written, whatever its fields are; unknown ones are kept."""
    document = {**document, "format": 1}
    document.pop("digest", None)
    fields = parsed(encoded(document), "x.json")
    assert fields.others == {name: value for name, value in document.items() if name != "format"}


@given(st.dictionaries(st.text(max_size=8), JSON, min_size=1, max_size=6), st.data())
def test_a_changed_document_is_damaged(document: dict[str, Any], data: st.DataObject) -> None:
    """A changed value, a missing field and an added one are found by the digest."""
    document.pop("digest", None)
    whole = json.loads(encoded({**document, "format": 1}))
    name = data.draw(st.sampled_from(sorted(set(document) - {"format"}) or ["other"]))
    whole[name] = data.draw(JSON.filter(lambda value: json.dumps(value) != json.dumps(whole.get(name, "?"))))
    with pytest.raises(DamagedRepository, match="digest"):
        parsed(json.dumps(whole).encode(), "x.json")


@given(st.binary(max_size=200))
def test_other_bytes_are_damage(raw: bytes) -> None:
    """Any bytes that are not a document are refused with a typed error."""
    with pytest.raises((DamagedRepository, errors.UnsupportedFormat)):
        parsed(raw, "x.json")


@pytest.mark.parametrize(
    "raw",
    [
        b'{"format": 1, "format": 1}',
        b'{"format": NaN}',
        b'{"format": 1, "a": 1e999}',
        b'{"format": 1, "a": ' + b"9" * 5000 + b"}",
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"\xff{}",
        b'{"format": true}',
        b'{"format": "1"}',
        b"null",
        b"[]",
        b"",
    ],
    ids=range(12),
)
def test_hostile_documents(raw: bytes) -> None:
    """Names that occur twice, NaN, endless numbers, deep nesting and other bytes end in a typed error."""
    with pytest.raises((DamagedRepository, errors.UnsupportedFormat)):
        parsed(raw, "x.json")


@pytest.mark.parametrize("found", [0, 2, 99])
def test_another_format_is_refused(found: int) -> None:
    """A document of a newer format is refused, by name, and is not called damaged."""
    with pytest.raises((errors.UnsupportedFormat, DamagedRepository), match="newer vhdkit" if found else "format"):
        parsed(encoded({"format": found}), "x.json")


def test_the_limit_of_a_document() -> None:
    """A document of exactly the limit is read, one byte more is refused, and neither takes much memory."""
    raw = encoded({"format": 1, "a": ""})
    room = MAX_DOCUMENT_BYTES - len(raw)
    raw = encoded({"format": 1, "a": "x" * room})
    assert len(raw) == MAX_DOCUMENT_BYTES
    parsed(raw, "x.json")
    with pytest.raises(DamagedRepository, match="bytes"):
        parsed(raw + b" ", "x.json")
    with pytest.raises(errors.InvalidArgument):
        encoded({"format": 1, "a": "x" * (room + 1)})
    tracemalloc.start()
    with pytest.raises(DamagedRepository):
        parsed(b'{"format": 1, "a": [' + b"[]," * 349_000 + b"[]]}", "x.json")
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@given(st.datetimes(datetime(1970, 1, 1), datetime(9998, 12, 31)))
def test_times_are_read_as_they_are_written(time: datetime) -> None:
    """A time has its word, to the second."""
    time = time.replace(microsecond=0, tzinfo=UTC)
    assert documents.time_of(documents.time_word(time)) == time


@pytest.mark.parametrize(
    "text", ["2026-02-30T00:00:00Z", "2026-01-01T24:00:00Z", "2026-01-01T00:00:60Z"],
)  # fmt: skip
def test_times_that_do_not_exist(text: str) -> None:
    """A day, an hour or a second that does not exist is no time."""
    with pytest.raises(ValueError):
        documents.time_of(text)


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00Z", "9999-01-01T00:00:00Z", "2026-01-01T00:00:00", "", "now"])
def test_other_words_are_no_times(text: str) -> None:
    """A year that no clock shows, and other text, is no time."""
    assert documents.time_of(text) is None


@given(st.integers(-86399, 86399))
def test_offsets_are_read_as_they_are_written(seconds: int) -> None:
    """A difference from UTC of less than a day has its word."""
    offset = timedelta(seconds=seconds)
    assert documents.offset_of(documents.offset_word(offset)) == offset


@pytest.mark.parametrize("text", ["+24:00", "01:00", "+1:00", "+01:60", "Z", "+٠١:٠٠"])
def test_other_words_are_no_offsets(text: str) -> None:
    """A day or more, or other text, is no difference from UTC."""
    assert documents.offset_of(text) is None
