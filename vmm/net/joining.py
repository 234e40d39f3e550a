# SPDX-License-Identifier: Apache-2.0
"""An adapter that is plugged into a switch by name, while switches of that name are created and deleted.

Decides whether the adapter of a running machine is on its switch, and reconnects it: to a switch whose process died,
and to another one that got the name of a deleted switch. Until there is one, the adapter is disconnected, as Hyper-V
calls it. Must not know QEMU, nor how the guest is notified.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vmm.model import errors
from vmm.model.spec import AdapterSpec
from vmm.net import switches, watching
from vmm.net.adapter import (
    Lives,
    Owner,
    is_connected,
    port_name,
    port_of,
    refuse_same_address,
)
from vmm.net.host_side import HostSide


@dataclass(frozen=True, slots=True)
class Joined:
    """The id of the switch that the adapter is on; None: `problem` says why it is on none.

    `has_come`: it has just been plugged in. `was_restarted`: its switch's process had died. `mended`: other faults of
    the switch that were repaired (`watching`), `failed`: those that could not be. `gateway_problem`: why its gateway
    does not run.
    """

    switch_id: str | None
    problem: str | None = None
    has_come: bool = False
    was_restarted: bool = False
    mended: tuple[str, ...] = ()
    failed: tuple[watching.Fault, ...] = ()
    gateway_problem: str | None = None


def join(adapter: AdapterSpec, owner: Owner, before: str | None, lives: Lives = is_connected) -> Joined:
    """Connect the adapter to the switch that has its switch's name now. `before`: the id of the one that it was on.

    `lives` as in `plug`.

    Raises VmmError for problems that may be gone at the next attempt.
    """
    assert adapter.switch is not None
    try:
        host = HostSide(switches.load(adapter.switch))
        if host.spec.id == before and host.backend.is_up() and host.backend.is_in(port_of(adapter, owner)):
            outcome = watching.put_right(host)
            problem = watching.gateway_problem(host)
            return Joined(before, mended=outcome.mended, failed=outcome.failed, gateway_problem=problem)
        with switches.staying(adapter.switch) as host:
            return replace(
                _joined(adapter, owner, host, before, lives), gateway_problem=watching.gateway_problem(host)
            )
    except errors.NotFound as error:
        return Joined(None, error.problem)


def _joined(adapter: AdapterSpec, owner: Owner, host: HostSide, before: str | None, lives: Lives) -> Joined:
    if not host.backend.fits(port_of(adapter, owner)):
        words = "the switch of that name has another back end than the one that the machine was started on"
        return Joined(None, words)
    was_up = host.backend.is_up()
    if was_up and is_plugged(adapter, owner.machine_id, host) and host.backend.is_in(port_of(adapter, owner)):
        return Joined(host.spec.id)
    try:
        refuse_same_address(adapter, owner, host, lives)
    except errors.InUse as error:
        return Joined(None, error.problem)
    host.ensure()
    host.backend.plug(port_of(adapter, owner))
    return Joined(host.spec.id, None, host.spec.id != before, host.spec.id == before and not was_up)


def end_descriptor(adapter: AdapterSpec) -> int | None:
    """A descriptor that becomes readable when the process of the adapter's switch ends; None if none runs."""
    assert adapter.switch is not None
    try:
        host = HostSide(switches.load(adapter.switch))
    except errors.VmmError:
        return None
    return host.backend.end_descriptor()


def is_plugged(adapter: AdapterSpec, machine_id: str, host: HostSide) -> bool:
    """True if the switch has a port for the adapter."""
    name = port_name(machine_id, adapter.id)
    return any(one["name"] == name for one in host.guests())
