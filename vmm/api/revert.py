# SPDX-License-Identifier: Apache-2.0
"""The recovery action `revert`: a machine whose QEMU died returns to the snapshot it was based on and continues there.

    python -m vmm.api.revert MACHINE-FOLDER

Started by the worker of a machine that crashed, as the last thing it does; waits until the machine is off. Decides how
often this is done. How a machine goes back is decided in `apply`, how it starts in `manager`.
"""

from __future__ import annotations

import sys
import time

from vmm.api.machine_snapshots import MachineSnapshots
from vmm.api.manager import Manager
from vmm.model.errors import VmmError
from vmm.model.events import Event, add_event, read_events
from vmm.model.paths import MachinePaths
from vmm.model.waiting import becomes
from vmm.store import registry
from vmm.store.state import MachineState

MAX_REVERTS, WINDOW_SECONDS = 3, 120.0  # so that a guest that dies at once is not reverted for ever
OFF_SECONDS = 120.0
_LOOK_SECONDS = 0.1  # each look reads definitions and asks the worker


def revert(machine: MachinePaths) -> None:
    """Return to the snapshot and start. A failure becomes an event of the machine."""
    name = registry.read_definition(machine.definition).name

    def tell(event: str, **details: object) -> None:
        add_event(machine.events, event, **details)

    try:
        snapshots = MachineSnapshots(name)
        snapshot = snapshots.tree().now
        if snapshot is None:
            tell("recovery-given-up", problem="the machine has no snapshot to go back to")
            return
        if _recently(read_events(machine.events)) >= MAX_REVERTS:
            tell("recovery-given-up", problem=f"{MAX_REVERTS} times within {WINDOW_SECONDS:.0f} s")
            return
        tell("recovery", action="revert", snapshot=snapshot)
        _wait_until_off(name)
        snapshots.apply(snapshot, discard_current=True)
        Manager().start(name)
    except VmmError as error:
        tell("recovery-given-up", problem=str(error))


def _recently(events: list[Event]) -> int:
    """How often the machine was reverted recently."""
    since = time.time() - WINDOW_SECONDS
    done = [one for one in events if one.name == "recovery" and one.details.get("action") == "revert"]
    return sum(one.time is not None and one.time > since for one in done)


def _wait_until_off(name: str) -> None:
    becomes(lambda: Manager().state(name) is MachineState.OFF, OFF_SECONDS, every_seconds=_LOOK_SECONDS)


if __name__ == "__main__":
    revert(MachinePaths(sys.argv[1]))
