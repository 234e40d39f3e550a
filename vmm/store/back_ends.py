# SPDX-License-Identifier: Apache-2.0
"""The back end that each adapter of a machine used last.

Decides what is recorded about it and how much of the record is trusted. The record lets a machine whose switch has
gone start with the data path that allows the adapter to join the next switch of that name; saved memory fits only one
data path. Must not know switches.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vmm.model.paths import MachinePaths, write_whole

if TYPE_CHECKING:
    from vmm.net.switch_spec import BackendName

_BACK_ENDS: tuple[BackendName, ...] = ("user", "bridge")
_MAX_FILE_BYTES = 1 << 16


def last_back_ends(machine: MachinePaths) -> dict[str, BackendName]:
    """Adapter id -> back end, where known; an unreadable record counts as empty."""
    try:
        # O_NONBLOCK: do not wait for the other end of a pipe with this name.
        descriptor = os.open(machine.back_ends, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            document = json.loads(file.read(_MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(document, dict):
        return {}
    return {adapter: one for adapter, found in document.items() for one in _BACK_ENDS if found == one}


def note_back_ends(machine: MachinePaths, found: Mapping[str, BackendName]) -> None:
    """Record the back ends that adapters use now. Raises VmmError."""
    before = last_back_ends(machine)
    if (after := {**before, **found}) != before:
        write_whole(machine.back_ends, json.dumps(after).encode() + b"\n", durable=False)
