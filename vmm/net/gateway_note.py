# SPDX-License-Identifier: Apache-2.0
"""The note that a `user` switch keeps in its folder while its gateway does not run, for the machines on the switch.

Decides the form of the note. A machine checks twice a second, so it reads a file and does not ask the switch, which is
busy moving frames. Must not know why a gateway ends or when it is started again: that is `gateway_process`.

    FOLDER/gateway.json   {"problem": "Could not set up host forwarding rule 'tcp::80-:80'"}
"""

from __future__ import annotations

import contextlib
import json
import os

from vmm.model import errors, paths
from vmm.net import records

_NAME = "gateway.json"
_MAX_CHARACTERS = 500


def leave(folder: str, problem: str) -> None:
    """Record that the gateway does not run, and why. A failure to write this is ignored, as only the note is lost."""
    with contextlib.suppress(errors.VmmError, OSError):
        content = json.dumps({"problem": problem[:_MAX_CHARACTERS]}).encode()
        paths.write_whole(os.path.join(folder, _NAME), content, durable=False)


def remove(folder: str) -> None:
    """Remove the note: the gateway runs, or was stopped."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(folder, _NAME))


def is_there(folder: str) -> bool:
    """True while a note exists, including one that an earlier process of the switch left."""
    return os.path.lexists(os.path.join(folder, _NAME))


def read(folder: str) -> str | None:
    """Why the gateway does not run; None while it does, or if the note cannot be read."""
    try:
        problem = records.read_object(os.path.join(folder, _NAME)).get("problem")
    except (OSError, ValueError):
        return None
    return problem[:_MAX_CHARACTERS] if isinstance(problem, str) else None
