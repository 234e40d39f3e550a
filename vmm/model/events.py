# SPDX-License-Identifier: Apache-2.0
"""The events of a machine: a file of JSON lines in its folder, kept whether or not the machine runs.

Decides how an event is written and how the file is kept small: at most `MAX_BYTES`, and the previous ones in `.1`.
Events are for people and scripts; nothing in vmm depends on them, except that `revert` counts recent ones. Must not
know which events exist.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_BYTES = 1 << 20
LOOK_SECONDS = 0.2  # for a reader of events, which is soon enough, and follows for hours


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `time`: seconds since the epoch, or None if the file (edited by hand) holds no number.

    `details` are the other fields of the event, by name: texts, numbers, or lists of them.
    """

    name: str
    time: float | None
    details: Mapping[str, Any]


def add_event(path: str, event: str, /, **details: object) -> None:
    """Append an event. A failure to write (such as a full disk) is ignored: the operation itself must not fail."""
    document = {"time": time.time(), "event": event, **{name: one for name, one in details.items() if one is not None}}
    with contextlib.suppress(OSError):
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_size > MAX_BYTES:
                os.rename(path, f"{path}.1")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.write(descriptor, json.dumps(document).encode() + b"\n")
        finally:
            os.close(descriptor)


def read_events(path: str) -> list[Event]:
    """All events, oldest first; lines that are not events are skipped."""
    found = []
    for name in (f"{path}.1", path):
        with contextlib.suppress(OSError), open(name, "rb") as file:
            found += [event for line in file if (event := _parsed(line)) is not None]
    return found


def follow_events(path: str, *, past: bool = False, wait_seconds: float = LOOK_SECONDS) -> Iterator[Event | None]:
    """Yield events as they are written, until their folder is removed; None regularly while nothing happens.

    With `past`, earlier events come first, and no event in between is missed. A folder that is renamed is followed.
    """
    position, inode = 0, -1
    with Followed(path) as followed:
        with contextlib.suppress(OSError):
            if past:
                with followed.open(".1") as file:
                    yield from filter(None, map(_parsed, file))
            else:
                with followed.open() as file:
                    facts = os.fstat(file.fileno())
                    position, inode = facts.st_size, facts.st_ino
        while not followed.is_gone():
            with contextlib.suppress(OSError), followed.open() as file:
                if os.fstat(file.fileno()).st_ino != inode:
                    position, inode = 0, os.fstat(file.fileno()).st_ino
                file.seek(position)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    position += len(line)
                    if (event := _parsed(line)) is not None:
                        yield event
            yield None
            time.sleep(wait_seconds)  # the caller's interval, which may be 0


class Followed:
    """A file that is read as it grows. Its folder is held open, to notice its removal and follow a rename."""

    def __init__(self, path: str) -> None:
        """Raises OSError if the folder does not exist."""
        self._name = os.path.basename(path)
        self._folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> Followed:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._folder)

    def open(self, suffix: str = "") -> BinaryIO:
        """Open the file that now has the name, or the name with `suffix`. Raises OSError."""
        descriptor = os.open(self._name + suffix, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._folder)
        return os.fdopen(descriptor, "rb")

    def is_gone(self) -> bool:
        """True if the folder was removed; nothing more will be written."""
        try:
            return os.fstat(self._folder).st_nlink == 0
        except OSError:  # for example, a file server that no longer knows the folder
            return True


def _parsed(line: bytes) -> Event | None:
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(line)
        if isinstance(document, dict) and isinstance(name := document.pop("event", None), str):
            moment = document.get("time")
            if isinstance(moment, bool) or not isinstance(moment, int | float):
                return Event(name, None, document)
            del document["time"]
            return Event(name, moment, document)
    return None
