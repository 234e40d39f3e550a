# SPDX-License-Identifier: Apache-2.0
"""A worker's answers about its machine, as values: the machine's state, and the result of a start.

Decides which parts of an answer callers see, and that an answer that cannot be understood (the worker may come from
another version of vmm) is an error with a hint. Imports little: the command line starts machines with it. Must not
know sockets.
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
    """Read an answer of the machine's worker in this block. Raises VmmError if a part is missing or wrong."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VmmError(
            "cannot understand the answer of its worker, which may come from another version of vmm", machine=machine,
            hint="shut the machine down and start it with this version",
        ) from error  # fmt: skip


@dataclass(frozen=True, slots=True)
class FillProgress:
    """How far the disks of a machine are filled from a backup: from which night, and of the disk that is being filled
    how many bytes are done. `step`: "comparing" while its night is compared with its sums before that. `problem`: why
    it does not go on at present.
    """

    source: str
    disk: str | None = None
    done_bytes: int | None = None
    total_bytes: int | None = None
    problem: str | None = None
    step: str | None = None

    @classmethod
    def of_document(cls, document: dict[str, Any]) -> FillProgress:
        """Parse a part of a worker's answer. Raises KeyError."""
        known = ("disk", "done_bytes", "total_bytes", "problem", "step")
        return cls(document["source"], **{key: document.get(key) for key in known})


@dataclass(frozen=True, slots=True)
class MachineStatus:
    """The state of a machine at this moment. If the machine is not running, only `state` is known.

    `heartbeat`: of the guest's agent. `reason`: why the machine is paused-critical. `filling` is None
    for whole disks.
    """

    state: MachineState
    operation: str | None = None
    reason: str | None = None
    accelerator: str | None = None
    uptime_seconds: float | None = None
    heartbeat: str | None = None
    filling: FillProgress | None = None

    @classmethod
    def of_document(cls, document: dict[str, Any]) -> MachineStatus:
        """Parse a worker's answer. Raises KeyError, TypeError or ValueError; see `understood`."""
        known = ("operation", "reason", "accelerator", "uptime_seconds", "heartbeat")
        filling = document.get("filling")
        return cls(
            MachineState(document["state"]), **{key: document.get(key) for key in known},
            filling=None if filling is None else FillProgress.of_document(filling),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Disconnected:
    """An adapter that is connected to no switch although its definition names one, and the reason."""

    adapter: str
    switch: str | None
    problem: str


@dataclass(frozen=True, slots=True)
class Started:
    """The state of a machine after its start, and the adapters that could not be connected."""

    state: MachineState
    disconnected: tuple[Disconnected, ...] = ()

    @classmethod
    def of_document(cls, document: dict[str, Any]) -> Started:
        """Parse a worker's answer. Raises KeyError, TypeError or ValueError; see `understood`."""
        found = document.get("disconnected") or ()
        return cls(
            MachineState(document["state"]),
            tuple(Disconnected(one["adapter"], one["switch"], one["problem"]) for one in found),
        )
