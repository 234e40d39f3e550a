# SPDX-License-Identifier: Apache-2.0
"""The events of a machine: written in order, bounded, and never a reason to fail."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vmm.model import events
from vmm.model.events import Event, add_event, follow_events, read_events


def test_following_with_earlier_events_misses_none(tmp_path: Path) -> None:
    """Earlier events come first, also those in the previous file; an event just before the first check is included,
    too."""
    path = str(tmp_path / "events.jsonl")
    add_event(path, "first")
    os.rename(path, f"{path}.1")
    add_event(path, "second")
    following = follow_events(path, past=True, wait_seconds=0)
    add_event(path, "third")
    found = [next(following) for _ in range(3)]
    assert [one.name for one in found if one is not None] == ["first", "second", "third"]


def test_events_read_back(tmp_path: Path) -> None:
    """In order, with their details; lines that are not events are left out."""
    path = tmp_path / "events"
    assert read_events(str(path)) == []
    add_event(str(path), "started", accelerator="tcg", problem=None)
    with path.open("a") as file:
        file.write('garbage\n[]\n{"event": 5}\n\xff\n')
    add_event(str(path), "off", path="/x")
    found = read_events(str(path))
    assert [(one.name, sorted(one.details), one.time is None) for one in found] == [
        ("started", ["accelerator"], False),
        ("off", ["path"], False),
    ]


@pytest.mark.parametrize("moment", ["yesterday", None, True, [1]])
def test_a_time_that_is_not_a_number(tmp_path: Path, moment: object) -> None:
    """An event whose time was edited by hand is still an event; the text in its place is one of the details."""
    path = tmp_path / "events"
    path.write_text(json.dumps({"time": moment, "event": "off", "by": "hand"}) + "\n")
    assert read_events(str(path)) == [Event("off", None, {"time": moment, "by": "hand"})]


def test_the_file_of_events_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old events are dropped, the newest stay, and only the owner can read the file."""
    monkeypatch.setattr(events, "MAX_BYTES", 1000)
    path = tmp_path / "events"
    for number in range(100):
        add_event(str(path), f"e{number}")
    assert sum(one.stat().st_size for one in tmp_path.iterdir()) < 2300
    assert read_events(str(path))[-1].name == "e99"
    assert path.stat().st_mode & 0o077 == 0


def test_recording_never_fails(tmp_path: Path) -> None:
    """A missing folder, or a folder in place of the file, is ignored."""
    add_event(str(tmp_path / "absent" / "events"), "started")
    add_event(str(tmp_path), "started")


def test_following_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Following yields new events, across the moment when the file begins again."""
    monkeypatch.setattr(events, "MAX_BYTES", 60)
    path = str(tmp_path / "events")
    add_event(path, "before")
    following = follow_events(path, wait_seconds=0)
    assert next(following) is None
    found: list[str] = []
    for number in range(5):
        add_event(path, f"e{number}")
        while (event := next(following)) is None:
            pass
        found.append(str(event.name))
    assert found == [f"e{number}" for number in range(5)]


def test_following_ends_with_the_folder(tmp_path: Path) -> None:
    """A machine that is renamed is still followed; when it is deleted, its last events are shown and following
    ends."""
    folder, renamed = tmp_path / "web", tmp_path / "www"
    folder.mkdir()
    following = follow_events(str(folder / "events"), wait_seconds=0)
    assert next(following) is None
    folder.rename(renamed)
    add_event(str(renamed / "events"), "renamed")
    assert (event := next(following)) is not None and event.name == "renamed"
    assert next(following) is None
    (renamed / "events").unlink()
    renamed.rmdir()
    assert list(following) == []
