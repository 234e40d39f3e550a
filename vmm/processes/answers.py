# SPDX-License-Identifier: Apache-2.0
"""What a worker says about its machine, as values: how it is, and what a start came to.

Decides which parts of an answer callers see. Light: the command line starts machines with it. Must not know sockets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmm.store.state import MachineState


@dataclass(frozen=True, slots=True)
class MachineStatus:
    """How a machine is at this moment. Of one that does not run only `state` is known.

    `heartbeat`: of the guest's agent. `reason`: why it is paused-critical.
    """

    state: MachineState
    operation: str | None = None
    reason: str | None = None
    accelerator: str | None = None
    uptime_seconds: float | None = None
    heartbeat: str | None = None

    @classmethod
    def of_document(cls, document: dict[str, Any]) -> MachineStatus:
        """Out of what a worker said."""
        known = ("operation", "reason", "accelerator", "uptime_seconds", "heartbeat")
        return cls(MachineState(document["state"]), **{key: document.get(key) for key in known})


@dataclass(frozen=True, slots=True)
class Disconnected:
    """An adapter that is on no switch although its definition names one, and why."""

    adapter: str
    switch: str | None
    problem: str


@dataclass(frozen=True, slots=True)
class Started:
    """What a machine is after it was started."""

    state: MachineState
    disconnected: tuple[Disconnected, ...] = ()

    @classmethod
    def of_document(cls, document: dict[str, Any]) -> Started:
        """Out of what its worker said."""
        found = document.get("disconnected") or ()
        return cls(
            MachineState(document["state"]),
            tuple(Disconnected(one["adapter"], one["switch"], one["problem"]) for one in found),
        )
