# SPDX-License-Identifier: Apache-2.0
"""The note that a `user` switch leaves in its folder while its gateway does not run, for the machines on the switch.

Decides the form of the note. A machine looks twice a second, so it reads a file and does not ask the switch, which
has frames to move. Must not know why a gateway ends or when it is started again: that is `gateway_process`.

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
    """Say that the gateway does not run, and why. A folder that takes no file is none of the gateway's problems."""
    with contextlib.suppress(errors.VmmError, OSError):
        content = json.dumps({"problem": problem[:_MAX_CHARACTERS]}).encode()
        paths.write_whole(os.path.join(folder, _NAME), content, durable=False)


def remove(folder: str) -> None:
    """The gateway runs, or was stopped."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(folder, _NAME))


def is_there(folder: str) -> bool:
    """True while there is a note, also one that an earlier process of the switch left."""
    return os.path.lexists(os.path.join(folder, _NAME))


def read(folder: str) -> str | None:
    """Why the gateway does not run; None while it does, and where the note cannot be read."""
    try:
        problem = records.read_object(os.path.join(folder, _NAME)).get("problem")
    except (OSError, ValueError):
        return None
    return problem[:_MAX_CHARACTERS] if isinstance(problem, str) else None
