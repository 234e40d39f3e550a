# SPDX-License-Identifier: Apache-2.0
"""The notes that supervisor and worker leave in the runtime folder, so that their successors can continue.

Decides what is recorded about running processes. Each file has one writer: `state.json` the worker, `keeper.json` the
supervisor. A process in a note is trusted only if its pid and its start time match. Light: the supervisor and the
command line import it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from vmm.host.proc import ProcessRef
from vmm.model.paths import MachinePaths, RuntimePaths, write_whole

_MAX_NOTE_BYTES = 1 << 20


class MachineState(StrEnum):
    """The state of a machine, in Hyper-V's terms."""

    OFF = "off"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    SAVED = "saved"
    STOPPING = "stopping"
    CRITICAL = "paused-critical"


class WorkerPhase(StrEnum):
    """The worker's progress: its QEMU is being started, runs, or was stopped."""

    STARTING = "starting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True)
class WorkerNote:
    """The worker's note. `operation` is the one in progress, `details` what is needed to undo it."""

    phase: WorkerPhase = WorkerPhase.STARTING
    worker: ProcessRef | None = None
    qemu: ProcessRef | None = None
    accelerator: str | None = None
    started: float | None = None  # seconds since the epoch
    operation: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def write(self, runtime: RuntimePaths) -> None:
        """Raises VmmError."""
        document = {
            "phase": self.phase.value,
            "worker": _document(self.worker),
            "qemu": _document(self.qemu),
            "accelerator": self.accelerator,
            "started": self.started,
            "operation": self.operation,
            "details": self.details,
        }
        _write(runtime.state, document)

    @classmethod
    def read(cls, runtime: RuntimePaths) -> WorkerNote | None:
        """The stored note; None if there is none or it is damaged."""
        document = _read(runtime.state)
        if document is None:
            return None
        try:
            phase = WorkerPhase(str(document.get("phase")))
        except ValueError:
            return None
        details, started = document.get("details"), document.get("started")
        accelerator, operation = document.get("accelerator"), document.get("operation")
        return cls(
            phase,
            ProcessRef.from_document(document.get("worker")),
            ProcessRef.from_document(document.get("qemu")),
            accelerator if isinstance(accelerator, str) else None,
            float(started) if isinstance(started, int | float) else None,
            operation if isinstance(operation, str) else None,
            details if isinstance(details, dict) else {},
        )


@dataclass(slots=True)
class SupervisorNote:
    """The supervisor's note. `failure` is the error document of a disk server that ended by itself."""

    supervisor: ProcessRef | None = None
    worker: ProcessRef | None = None
    server: ProcessRef | None = None
    failure: dict[str, Any] | None = None

    def write(self, runtime: RuntimePaths) -> None:
        """Raises VmmError."""
        document = {
            "keeper": _document(self.supervisor),
            "worker": _document(self.worker),
            "server": _document(self.server),
            "failure": self.failure,
        }
        _write(supervisor_note_path(runtime), document)

    @classmethod
    def read(cls, runtime: RuntimePaths) -> SupervisorNote | None:
        """The stored note; None if there is none or it is damaged."""
        document = _read(supervisor_note_path(runtime))
        if document is None:
            return None
        failure = document.get("failure")
        return cls(
            ProcessRef.from_document(document.get("keeper")),
            ProcessRef.from_document(document.get("worker")),
            ProcessRef.from_document(document.get("server")),
            failure if isinstance(failure, dict) else None,
        )


def supervisor_note_path(runtime: RuntimePaths) -> str:
    """The path of the supervisor's note."""
    return os.path.join(runtime.folder, "keeper.json")


# The disk server and QEMU ignore the signals that end the processes of a login or a host (see `leaving`).
SERVER_END_SIGNAL = signal.SIGINT
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def mark_leaving(runtime: RuntimePaths) -> None:
    """Mark the machine so that its worker, or the worker's successor, carries out the stop action. Never fails."""
    with contextlib.suppress(OSError):
        os.close(os.open(runtime.leaving, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))


def is_leaving(runtime: RuntimePaths) -> bool:
    """True if the machine is marked as leaving."""
    return os.path.lexists(runtime.leaving)


def end_left(runtime: RuntimePaths, grace_seconds: float) -> None:
    """End the remaining processes of a machine without a supervisor; the disk server flushes first."""
    for part, ref in processes_of(runtime).items():
        ref.end(grace_seconds, SERVER_END_SIGNAL if part == "server" else signal.SIGTERM)


def processes_of(runtime: RuntimePaths) -> dict[str, ProcessRef]:
    """All live processes in the notes, by role: `keeper` (the supervisor), `worker`, `server`, `qemu`."""
    worker, supervisor = WorkerNote.read(runtime) or WorkerNote(), SupervisorNote.read(runtime) or SupervisorNote()
    found = {
        "keeper": supervisor.supervisor,
        "worker": worker.worker if worker.worker and worker.worker.is_alive() else supervisor.worker,
        "server": supervisor.server,
        "qemu": worker.qemu,
    }
    return {part: ref for part, ref in found.items() if ref is not None and ref.is_alive()}


def _document(ref: ProcessRef | None) -> dict[str, Any] | None:
    return None if ref is None else ref.to_document()


def _write(path: str, document: dict[str, Any]) -> None:
    # Not durable: after a power cut there is nothing to take over.
    write_whole(path, json.dumps(document).encode() + b"\n", durable=False)


def _read(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            document = json.loads(file.read(_MAX_NOTE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def note_running(machine: MachinePaths, is_running: bool) -> None:
    """Record for the host's next start whether the machine runs. A failure is ignored."""
    with contextlib.suppress(OSError):
        if is_running:
            os.close(os.open(machine.was_running, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        else:
            os.unlink(machine.was_running)


def note_unclean(machine: MachinePaths) -> None:
    """Record that the guest's file systems are in use, or that their state is unknown. Raises VmmError."""
    if not os.path.exists(machine.unclean):
        write_whole(machine.unclean, b"")


def note_clean(machine: MachinePaths) -> None:
    """Record that the guest has written out its file systems and has stopped. A failure is ignored."""
    with contextlib.suppress(OSError):
        os.unlink(machine.unclean)


def is_clean(machine: MachinePaths) -> bool:
    """True if the machine has never run or its guest shut itself down; False after a crash or a power-off."""
    return not os.path.lexists(machine.unclean) and not os.path.lexists(machine.was_running)
