# SPDX-License-Identifier: Apache-2.0
"""What a worker says about its machine, as values: how it is, and what a start came to.

Decides which parts of an answer callers see, and that one that cannot be understood (the worker may be of another
version) is an error with a hint. Light: the command line starts machines with it. Must not know sockets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vmm.model.errors import VmmError
from vmm.store.state import MachineState


@contextlib.contextmanager
def understood(machine: str) -> Iterator[None]:
    """An answer of the machine's worker is read in this block. Raises VmmError where it is not what it should be."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VmmError(
            "its worker's answer cannot be understood; it may be of another version of vmm", machine=machine,
            hint="shut the machine down and start it with this version",
        ) from error  # fmt: skip


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
