# SPDX-License-Identifier: Apache-2.0
"""The fields of a schedule, and from when on its work is late."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from tests.vmm.schedule.schedules import CREATED, made
from vmm.model.errors import InvalidSpec
from vmm.schedule.definition import read_schedule


def test_a_document_has_everything() -> None:
    """What is written is read back the same."""
    schedule = made(before=[("mount", "/mnt/nas")], jobs=3, zone="Europe/Berlin", work={"machines": ["web"]})
    assert read_schedule(schedule.document(), "x") == schedule


@pytest.mark.parametrize(
    "changes",
    [{"name": "../x"}, {"name": ""}, {"name": "a.b"}, {"name": "a" * 49}, {"jobs": 0}, {"jobs": 65}, {"when": "soon"},
     {"zone": "Mars/Olympus"}, {"before": [[]]}, {"before": [[""]]}, {"after": [["a\0"]]},
     {"on_failure": ["rm -rf /"]},
     {"late_after_seconds": 59}, {"kind": "A B"}, {"created": datetime(2026, 1, 1)}, {"unknown": 1}, {"work": []}],
)  # fmt: skip
def test_impossible_schedules(changes: dict[str, object]) -> None:
    """A value that cannot be is an error in words."""
    with pytest.raises(InvalidSpec) as caught:
        made(str(changes.get("name", "nightly")), **{name: one for name, one in changes.items() if name != "name"})
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_damaged_documents(content: bytes) -> None:
    """Anything that is not a schedule is an error that names the file."""
    with pytest.raises(InvalidSpec, match="here: is not a schedule"):
        read_schedule(content, "here")


def at(day: int, hour: int, minute: int = 0) -> datetime:
    """A moment of November."""
    return datetime(2026, 11, day, hour, minute, tzinfo=UTC)


def test_when_nights_are_needed() -> None:
    """A night is needed 6 hours after it was due: until then that of the day before is enough."""
    schedule = made()  # 22:30, created on the 1st at noon
    assert schedule.needed_since(CREATED) is None and schedule.needed_since(at(2, 4)) is None
    assert schedule.needed_since(at(2, 4, 30)) == at(1, 22, 30) == schedule.needed_since(at(3, 4, 29))
    assert schedule.needed_since(at(3, 8)) == at(2, 22, 30)


def test_frequent_schedules_are_late_sooner() -> None:
    """The usual time is half of that between two runs at most; a schedule may have a time of its own."""
    hourly = made(when="*:00")
    assert hourly.needed_since(at(2, 4, 29)) == at(2, 3) and hourly.needed_since(at(2, 4, 30)) == at(2, 4)
    slow = made(late_after_seconds=24 * 3600)
    assert slow.needed_since(at(3, 8)) == at(1, 22, 30)
    assert made(when="Sat 05:00").grace(at(2, 8)) == timedelta(hours=6)


def test_a_clock_that_is_wrong() -> None:
    """A clock before the schedule was made needs nothing, one a year ahead needs last night's."""
    assert made().needed_since(at(1, 1) - timedelta(days=300)) is None
    assert made().needed_since(datetime(2027, 11, 5, 8, tzinfo=UTC)) == datetime(2027, 11, 4, 22, 30, tzinfo=UTC)
