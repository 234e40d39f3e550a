# SPDX-License-Identifier: Apache-2.0
"""The schedules of this host, as files: finding, adding and removing them.

Decides that a schedule exists whole or not at all, and whose file is believed: a schedule has commands that are run,
so its file must belong to this user, and no other user may be able to write to it. Must not know timers, nor what the
schedules are for.

    home/schedules/NAME.json    NAME.last.json    NAME.events.jsonl    NAME.lock
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Final

from vmm.host.proc import locked
from vmm.model import paths
from vmm.model.errors import AlreadyExists, InvalidSpec, NotFound, Refused, VmmError, of_os_error
from vmm.schedule.definition import Schedule, read_schedule
from vmm.schedule.places import SchedulePaths, schedule_paths

MAX_DEFINITION_BYTES: Final = 1 << 20
_ENDING = ".json"
_LAST = ".last"
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def names() -> list[str]:
    """The names of all schedules, sorted. Raises AccessDenied."""
    folder = paths.schedules_folder()
    try:
        files = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise of_os_error(error, "list the schedules", path=folder) from error
    stems = [one.removesuffix(_ENDING) for one in files if one.endswith(_ENDING) and not one.startswith(".")]
    return sorted(one for one in stems if not one.endswith(_LAST))


def load(name: str) -> Schedule:
    """A schedule by its name. Raises NotFound, InvalidSpec, Refused for a file that others may have written."""
    path = schedule_paths(name).document
    try:
        content = _believed(path)
    except FileNotFoundError as error:
        known = ", ".join(names()) or "none"
        raise NotFound(f"schedule {name!r} does not exist; existing schedules: {known}") from error
    except OSError as error:
        raise of_os_error(error, "read the schedule", path=path) from error
    found = read_schedule(content, path)
    if found.name != name:
        raise InvalidSpec(
            f"is not schedule {name!r}: it contains {found.name!r}", path=path, hint="rename the file, or remove it"
        )
    return found


def _believed(path: str) -> bytes:
    """The content of a file that only this user can have written. Raises OSError, InvalidSpec, Refused."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_DEFINITION_BYTES:
            raise InvalidSpec(f"is not a file of at most {MAX_DEFINITION_BYTES} bytes", path=path)
        if facts.st_uid != os.geteuid() or facts.st_mode & _OTHERS_MAY_WRITE:
            raise Refused(
                "may have been written by another user, and a schedule has commands that are run",
                path=path,
                hint="if it is as it should be, make it yours, and run chmod 600 on it",
            )
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(MAX_DEFINITION_BYTES)
    finally:
        os.close(descriptor)


def load_all() -> tuple[list[Schedule], list[VmmError]]:
    """All schedules, and an error for each one that cannot be used."""
    found: list[Schedule] = []
    failures: list[VmmError] = []
    for name in names():
        try:
            found.append(load(name))
        except VmmError as error:
            failures.append(error)
    return found, failures


def add(schedule: Schedule, *, replace: bool = False) -> SchedulePaths:
    """Add a schedule, or with `replace` change it. Raises AlreadyExists, AccessDenied, NoSpace."""
    place = schedule_paths(schedule.name)
    paths.make_home()
    folder = paths.schedules_folder()
    try:
        paths.make_folders(folder)
    except OSError as error:
        raise of_os_error(error, "make the folder", path=folder) from error
    with locked(os.path.join(folder, ".lock")):
        if os.path.lexists(place.document) and not replace:
            raise AlreadyExists(
                f"schedule {schedule.name!r} already exists", hint="remove it first, or choose another name"
            )
        paths.write_whole(place.document, schedule.document())
    return place


def change(name: str, changed: Callable[[Schedule], Schedule]) -> None:
    """Replace a schedule by what `changed` makes of the stored one. Raises NotFound, NoSpace, AccessDenied."""
    with locked(os.path.join(paths.schedules_folder(), ".lock")):
        before = load(name)
        after = changed(before)
        if after != before:
            paths.write_whole(schedule_paths(name).document, after.document())


def remove(name: str) -> None:
    """Remove a schedule and the record of its runs. A run that is under way goes on. Raises NotFound, AccessDenied."""
    place = schedule_paths(name)
    folder = paths.schedules_folder()
    if not os.path.lexists(place.document):
        raise NotFound(f"schedule {name!r} does not exist; existing schedules: {', '.join(names()) or 'none'}")
    with locked(os.path.join(folder, ".lock")):
        for path in (place.document, place.last, place.events, f"{place.events}.1", place.lock):
            try:
                os.unlink(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise of_os_error(error, "remove the schedule", path=path) from error
        paths.sync_folder(folder)
