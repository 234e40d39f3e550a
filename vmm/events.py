# SPDX-License-Identifier: Apache-2.0
"""What happened to a machine: a file of JSON lines in its folder, there whether it runs or not.

Decides how an event is written and that the file stays small: the last `MAX_BYTES` and the ones before under `.1`.
Events are for people and scripts; nothing of vmm depends on them. Must not know what happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any

MAX_BYTES = 1 << 20
LOOK_SECONDS = 0.2


def add_event(path: str, event: str, /, **details: object) -> None:
    """Write one down. Not being able to (a full disk) is not worth failing for."""
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


def read_events(path: str) -> list[dict[str, Any]]:
    """All events, the oldest first; what is no event is left out."""
    found = []
    for name in (f"{path}.1", path):
        with contextlib.suppress(OSError), open(name, "rb") as file:
            found += [event for line in file if (event := _parsed(line)) is not None]
    return found


def follow_events(
    path: str, *, past: bool = False, wait_seconds: float = LOOK_SECONDS
) -> Iterator[dict[str, Any] | None]:
    """Events as they happen from now on, for ever; None now and then while nothing happens.

    With `past` those that happened before come first, and none in between is missed.
    """
    position, inode = 0, -1
    with contextlib.suppress(OSError):
        if past:
            with open(f"{path}.1", "rb") as file:
                yield from filter(None, map(_parsed, file))
        else:
            facts = os.stat(path)
            position, inode = facts.st_size, facts.st_ino
    while True:
        with contextlib.suppress(OSError), open(path, "rb") as file:
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
        time.sleep(wait_seconds)


def _parsed(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(line)
        if isinstance(document, dict) and isinstance(document.get("event"), str):
            return document
    return None
