# SPDX-License-Identifier: Apache-2.0
"""What happens to machines when their host starts and stops, according to their automatic actions.

Decides which machines start and stop with the host, and in which order. How one stops is decided by its worker
(`leaving`), which also learns by signals that the host stops. The failure of one machine does not affect others. Must
not know what calls it (the unit that `host.autostart` installs).

A file in the machine's folder, which its worker creates and removes, records that the machine is running: a host that
loses power has no time to write anything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vmm.api.manager import Manager
from vmm.model.errors import VmmError
from vmm.store import registry
from vmm.store.registry import Machine
from vmm.store.state import MachineState

AT_ONCE = 4  # machines that are stopped at the same time; more would only compete for the disk
_OFF = (MachineState.OFF, MachineState.SAVED)


@dataclass(frozen=True, slots=True)
class AutomaticResult:
    """What was done with a machine: "started", "saved", "shut down", "turned off", or "failed" with the problem."""

    machine: str
    done: str
    problem: VmmError | None = None


def starts_with_host(machine: Machine) -> bool:
    """True if the machine's automatic start action starts it now."""
    action = machine.spec.automatic.start
    return action == "always" or (action == "if-was-running" and os.path.lexists(machine.paths.was_running))


def start_machines(
    manager: Manager,
    *,
    sleep: Callable[[float], None] = time.sleep,  # for the delay of each machine
    tell: Callable[[AutomaticResult], None] | None = None,
) -> list[AutomaticResult]:
    """Start the machines that start with the host, those with the shortest delay first. Delays count from now."""
    with manager.folders.used():
        machines, failures = registry.load_all()
    outcomes = [AutomaticResult(error.machine or "", "failed", error) for error in failures]
    began = time.monotonic()
    for machine in sorted(machines, key=lambda one: (one.spec.automatic.start_delay_seconds, one.name)):
        outcome = _started(manager, machine, began, sleep)
        if outcome is not None:
            outcomes.append(outcome)
            if tell is not None:
                tell(outcome)
    return outcomes


def _started(
    manager: Manager, machine: Machine, began: float, sleep: Callable[[float], None]
) -> AutomaticResult | None:
    """None for a machine that is not to be started, or runs already."""
    try:
        if not starts_with_host(machine) or manager.state(machine.name) not in _OFF:
            return None
        sleep(max(0.0, began + machine.spec.automatic.start_delay_seconds - time.monotonic()))
        with manager.folders.used():
            if not starts_with_host(registry.load(machine.name)):
                return None  # it was changed while it waited
        manager.start(machine.name)
    except VmmError as error:
        return AutomaticResult(machine.name, "failed", error)
    return AutomaticResult(machine.name, "started")


def stop_machines(manager: Manager, *, tell: Callable[[AutomaticResult], None] | None = None) -> list[AutomaticResult]:
    """Stop every machine that runs, as its automatic stop action says, several at once."""
    with manager.folders.used():
        machines, _ = registry.load_all()

    def stop(machine: Machine) -> AutomaticResult | None:
        outcome = _stopped(manager, machine)
        if outcome is not None and tell is not None:
            tell(outcome)
        return outcome

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [outcome for outcome in pool.map(stop, machines) if outcome is not None]


def _stopped(manager: Manager, machine: Machine) -> AutomaticResult | None:
    """None for a machine that does not run."""
    name = machine.name
    try:
        if manager.state(name) in _OFF:
            return None
        try:
            return AutomaticResult(name, manager.stop_with_host(name))
        except VmmError:  # its worker was killed meanwhile; the next one continues
            if (state := manager.state(name)) in _OFF:
                return AutomaticResult(name, "saved" if state is MachineState.SAVED else "shut down")
            return AutomaticResult(name, manager.stop_with_host(name))
    except VmmError as error:
        return AutomaticResult(name, "failed", error)
