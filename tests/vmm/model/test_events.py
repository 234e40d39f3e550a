# SPDX-License-Identifier: Apache-2.0
"""What happened to a machine: written in order, bounded, and never a reason to fail."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vmm.model import events
from vmm.model.events import Event, add_event, follow_events, read_events


def test_following_with_what_was_misses_nothing(tmp_path: Path) -> None:
    """What happened before, also in the file before, comes first; what happens before one looks is there, too."""
    path = str(tmp_path / "events.jsonl")
    add_event(path, "first")
    os.rename(path, f"{path}.1")
    add_event(path, "second")
    following = follow_events(path, past=True, wait_seconds=0)
    add_event(path, "third")
    told = [next(following) for _ in range(3)]
    assert [one.name for one in told if one is not None] == ["first", "second", "third"]


def test_written_and_read(tmp_path: Path) -> None:
    """In order, with details that say something; lines that are no events are left out."""
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
def test_a_time_that_is_no_number(tmp_path: Path, moment: object) -> None:
    """An event whose time was edited by hand is still one; what stands there is among its details."""
    path = tmp_path / "events"
    path.write_text(json.dumps({"time": moment, "event": "off", "by": "hand"}) + "\n")
    assert read_events(str(path)) == [Event("off", None, {"time": moment, "by": "hand"})]


def test_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old events go, the newest stay, and the file is for nobody else."""
    monkeypatch.setattr(events, "MAX_BYTES", 1000)
    path = tmp_path / "events"
    for number in range(100):
        add_event(str(path), f"e{number}")
    assert sum(one.stat().st_size for one in tmp_path.iterdir()) < 2300
    assert read_events(str(path))[-1].name == "e99"
    assert path.stat().st_mode & 0o077 == 0


def test_never_a_reason_to_fail(tmp_path: Path) -> None:
    """A folder that is gone, or a file that is a folder, does not matter."""
    add_event(str(tmp_path / "absent" / "events"), "started")
    add_event(str(tmp_path), "started")


def test_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events from now on, across the moment when the file begins anew."""
    monkeypatch.setattr(events, "MAX_BYTES", 60)
    path = str(tmp_path / "events")
    add_event(path, "before")
    following = follow_events(path, wait_seconds=0)
    assert next(following) is None
    told: list[str] = []
    for number in range(5):
        add_event(path, f"e{number}")
        while (event := next(following)) is None:
            pass
        told.append(str(event.name))
    assert told == [f"e{number}" for number in range(5)]


def test_following_ends_with_the_folder(tmp_path: Path) -> None:
    """A machine that is renamed is followed; when it is deleted, its last words are told and following ends."""
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
