# SPDX-License-Identifier: Apache-2.0
"""Opening a machine, whatever it is doing.

    with machines.open("web") as machine: ...      for a change: its lock is held
    with machines.reach("web") as machine: ...     for what needs no lock, such as powering it off while another
                                                   command waits for something

Decides which implementation of `machine.OpenMachine` it is: whether it runs is determined after its lock is taken, and
it is read after that, because a worker changes the definition, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmm.model.errors import WrongState
from vmm.processes import worker_connection
from vmm.processes.answers import MachineStatus
from vmm.processes.worker_connection import MachineRef
from vmm.store.state import MachineState

if TYPE_CHECKING:
    from vmm.api.running_machine import RunningMachine
    from vmm.api.stopped_machine import StoppedMachine
    from vmm.store.copies import AllIds


@contextlib.contextmanager
def open(name: str, *, stop_merge: bool = True, settles: bool = True) -> Iterator[StoppedMachine | RunningMachine]:
    """The machine, which no other command changes while the block runs.

    An interrupted operation of a machine that is off is settled first, unless `settles` is off; a merge in the
    background is stopped, unless `stop_merge` is off. Raises NotFound, InUse, InvalidSpec, TimedOut,
    Refused for a copy of another machine.
    """
    with worker_connection.changing(name, stop_merge=stop_merge, settles=settles) as (machine, client):
        place = MachineRef(machine.name, machine.paths, machine.runtime)
        if client is None:
            from vmm.api.stopped_machine import StoppedMachine

            yield StoppedMachine(place, machine)
        else:
            from vmm.api.running_machine import RunningMachine

            yield RunningMachine(place, client, machine)


@contextlib.contextmanager
def open_stopped(
    name: str, doing: str, *, hint: str | None = None, stop_merge: bool = True, settles: bool = True
) -> Iterator[StoppedMachine]:
    """As `open`, for what is possible only with a machine that is off or saved. Raises WrongState for one that runs.

    `doing` completes "cannot ... now".
    """
    from vmm.api.stopped_machine import StoppedMachine

    with open(name, stop_merge=stop_merge, settles=settles) as machine:
        if not isinstance(machine, StoppedMachine):
            refuse_running(machine.place, doing, hint=hint)
            raise WrongState("was just ending", machine=name, hint="try again")
        yield machine


@contextlib.contextmanager
def reach(name: str | MachineRef) -> Iterator[StoppedMachine | RunningMachine]:
    """The machine as it is at this moment, without its lock: it may start or end while the block runs.

    Raises NotFound, InvalidSpec, TimedOut, Refused for a copy of another.
    """
    place = MachineRef.of(name) if isinstance(name, str) else name
    client = worker_connection.contact(place)
    if client is None:
        from vmm.api.stopped_machine import StoppedMachine

        yield StoppedMachine(place, None)
        return
    from vmm.api.running_machine import RunningMachine

    with client:
        yield RunningMachine(place, client, None)


def status(name: str | MachineRef, ids: AllIds | None = None) -> MachineStatus:
    """The status of a machine, even of one that is just ending. `ids`: those of all machines, if already read.

    Raises NotFound, TimedOut.
    """
    return worker_connection.status_of(MachineRef.of(name) if isinstance(name, str) else name, ids)


def refuse_running(place: MachineRef, doing: str, *, hint: str | None = None) -> None:
    """Raise WrongState for a machine that is neither off nor saved; `doing` completes "cannot ... now"."""
    state = status(place).state
    if state not in (MachineState.OFF, MachineState.SAVED):
        raise WrongState(
            f"is {state}: cannot {doing} now", machine=place.name,
            hint=hint or f"shut it down: vmm shutdown {place.name}",
        )  # fmt: skip
