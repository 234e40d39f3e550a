# SPDX-License-Identifier: Apache-2.0
"""On which back end each adapter of a machine was last.

Decides what is written down of it, and which of it is believed: a machine starts although a switch is gone, and gets
the data path with which it can join the next switch of that name. Saved memory fits one data path alone. Must not know
switches.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vmm.paths import MachinePaths, write_whole

if TYPE_CHECKING:
    from vmm.net.plan import Backend

_BACK_ENDS: tuple[Backend, ...] = ("user", "bridge")
_MAX_FILE_BYTES = 1 << 16


def last_back_ends(machine: MachinePaths) -> dict[str, Backend]:
    """By the adapter's id, as far as it is known: what cannot be read says nothing."""
    try:
        with open(machine.back_ends, "rb") as file:
            document = json.loads(file.read(_MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(document, dict):
        return {}
    return {adapter: one for adapter, found in document.items() for one in _BACK_ENDS if found == one}


def note_back_ends(machine: MachinePaths, found: Mapping[str, Backend]) -> None:
    """Write down what adapters are on now. Raises VmmError."""
    before = last_back_ends(machine)
    if (after := {**before, **found}) != before:
        write_whole(machine.back_ends, json.dumps(after).encode() + b"\n", durable=False)
