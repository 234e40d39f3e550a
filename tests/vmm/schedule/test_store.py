# SPDX-License-Identifier: Apache-2.0
"""Schedules as files: they exist whole or not at all, and only the user's own are believed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.vmm.schedule.schedules import job, made
from vmm.model.errors import AlreadyExists, InvalidSpec, NotFound, Refused
from vmm.model.paths import schedules_folder
from vmm.schedule import store
from vmm.schedule.places import schedule_paths
from vmm.schedule.running import run


def test_adding_and_removing() -> None:
    """A schedule is found by its name until it is removed, with everything that its runs have left."""
    os.rmdir(schedules_folder())
    assert store.names() == []
    schedule = made()
    store.add(schedule)
    store.add(made("weekly"))
    assert store.names() == ["nightly", "weekly"] and store.load("nightly") == schedule
    run(schedule, [job("web", "true")])
    assert store.names() == ["nightly", "weekly"]
    with pytest.raises(AlreadyExists):
        store.add(schedule)
    changed = made(jobs=2)
    store.add(changed, replace=True)
    assert store.load("nightly") == changed
    assert Path(schedule_paths("nightly").document).stat().st_mode & 0o777 == 0o600
    for name in store.names():
        store.remove(name)
    assert os.listdir(schedules_folder()) == [".lock"]
    for call in (store.load, store.remove):
        with pytest.raises(NotFound, match="existing schedules: none"):
            call("nightly")


def test_bad_names() -> None:
    """A name never leads out of the folder."""
    for name in ("", "..", "../../etc/passwd", "a/b", "a\n", "-x", "a.last"):
        with pytest.raises(InvalidSpec, match="name of a schedule"):
            store.load(name)


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_may_write_is_refused(mode: int) -> None:
    """A schedule's commands are run, so one that another user may have written is not used."""
    store.add(made())
    os.chmod(schedule_paths("nightly").document, mode)
    with pytest.raises(Refused, match="chmod 600"):
        store.load("nightly")
    found, failures = store.load_all()
    assert found == [] and len(failures) == 1


def test_a_file_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is one that belongs to another user."""
    store.add(made())
    ours = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: ours + 1)
    with pytest.raises(Refused):
        store.load("nightly")


def test_what_is_not_a_schedule(tmp_path: Path) -> None:
    """A link, a folder, a pipe, a huge file and another schedule's file are errors."""
    place = Path(schedule_paths("nightly").document)
    store.add(made("weekly"))
    place.symlink_to(schedule_paths("weekly").document)
    with pytest.raises(Exception, match="could not read"):
        store.load("nightly")
    place.unlink()
    place.write_bytes(Path(schedule_paths("weekly").document).read_bytes())
    place.chmod(0o600)
    with pytest.raises(InvalidSpec, match="contains 'weekly'"):
        store.load("nightly")
    place.write_bytes(bytes(store.MAX_DEFINITION_BYTES + 1))
    with pytest.raises(InvalidSpec, match="at most"):
        store.load("nightly")
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(InvalidSpec):
        store.load("nightly")
    place.unlink()
    place.mkdir()
    with pytest.raises(InvalidSpec):
        store.load("nightly")
