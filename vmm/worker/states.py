# SPDX-License-Identifier: Apache-2.0
"""Which state a running machine is in, what a change of QEMU's status leads to, and which verb each state allows.

    starting --> running <--> paused          pause, resume; save from either
                 |  ^  `----> stopping        the guest was asked to shut down, or QEMU to quit
                 v  |
            paused-critical                   a disk failed: it continues by itself when the cause is gone

Decides all of it from facts alone, as tables, so that every combination can be tested. Must not know QEMU, tasks or
files. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from vmm.model.errors import WrongState
from vmm.store.state import MachineState, WorkerPhase

_RUNNING, _PAUSED, _CRITICAL = MachineState.RUNNING, MachineState.PAUSED, MachineState.CRITICAL


@dataclass(frozen=True, slots=True)
class Facts:
    """What determines the state. `status` is what QEMU answers to `query-status`, or a guess unless `is_known`.

    `is_ending`: QEMU has ended or was asked to quit, or the guest was asked to shut down. `is_paused_by_user`: paused
    by `pause`, and not resumed since.
    """

    phase: WorkerPhase
    status: str
    is_known: bool
    is_ending: bool = False
    is_paused_by_user: bool = False
    operation: str | None = None


# The first row whose condition holds gives the state.
STATES: Final[tuple[tuple[str, Callable[[Facts], bool], MachineState], ...]] = (
    ("QEMU is starting", lambda one: one.phase is WorkerPhase.STARTING, MachineState.STARTING),
    (
        "the machine ends or has ended",
        lambda one: one.is_ending or one.phase is WorkerPhase.ENDED,
        MachineState.STOPPING,
    ),
    ("its memory is being saved", lambda one: one.operation == "save", _PAUSED),
    ("the user paused it", lambda one: one.is_paused_by_user, _PAUSED),
    ("QEMU runs the guest", lambda one: one.status == "running", _RUNNING),
    ("another worker took over: the guest kept running meanwhile", lambda one: not one.is_known, _RUNNING),
    ("a disk failed", lambda one: one.status == "io-error", _CRITICAL),
    ("QEMU holds the guest for another reason", lambda one: True, _PAUSED),
)


def state_of(facts: Facts) -> MachineState:
    """The state of a machine for these facts."""
    return next(state for _, holds, state in STATES if holds(facts))


class End(StrEnum):
    """Why a machine ended."""

    POWERED_OFF = "powered-off"  # by the guest
    STOPPED = "stopped"  # by a verb, or a signal to QEMU
    SAVED = "saved"
    CRASHED = "crashed"


class Effect(StrEnum):
    """What the worker does when QEMU reports a status."""

    FORGET_PAUSE = "forget that the user paused it"
    POWERED_OFF = "end QEMU: the guest shut itself down"
    CRASHED = "end QEMU: the guest cannot continue"
    REPORT_FAILED_DISK = "report that it is paused because a disk failed"
    RETRY = "try to continue until the disk works again"
    REPORT_RESUMED = "report that it runs again, and set the guest's clock"


@dataclass(frozen=True, slots=True)
class StatusReport:
    """QEMU's status, the one before it, and what decides whether anything is left to do about it."""

    before: str
    status: str
    has_ended: bool = False
    is_retrying: bool = False
    is_paused_by_user: bool = False


_LOST = ("internal-error", "guest-panicked")
# Every row that holds has its effect, in this order.
EFFECTS: Final[tuple[tuple[Callable[[StatusReport], bool], Effect], ...]] = (
    (lambda one: one.status == "running", Effect.FORGET_PAUSE),
    (lambda one: one.status == "shutdown" and not one.has_ended, Effect.POWERED_OFF),
    (lambda one: one.status in _LOST and not one.has_ended, Effect.CRASHED),
    (lambda one: one.status == "io-error" != one.before, Effect.REPORT_FAILED_DISK),
    (lambda one: one.status == "io-error" and not (one.is_retrying or one.is_paused_by_user), Effect.RETRY),
    (lambda one: one.before == "io-error" and one.status == "running", Effect.REPORT_RESUMED),
)


def effects_of(report: StatusReport) -> list[Effect]:
    """What follows from this report of QEMU's."""
    return [effect for holds, effect in EFFECTS if holds(report)]


class Verb(StrEnum):
    """A verb that only some states allow; its value says what cannot be done in the others."""

    PAUSE = "cannot pause it now"
    RESUME = "cannot resume it now"
    RESET = "cannot reset it now"
    SHUT_DOWN = "cannot shut it down now"
    SAVE = "cannot save it now"
    SNAPSHOT = "no snapshot can be taken now"
    MERGE = "cannot merge its images now"
    ADD_DISK = "cannot add a disk now"
    REMOVE_DISK = "cannot remove a disk now"
    CHANGE_MEDIUM = "cannot change a medium now"
    RESIZE_DISK = "cannot resize a disk now"
    ADD_ADAPTER = "cannot add an adapter now"
    REMOVE_ADAPTER = "cannot remove an adapter now"


_LIVE: Final = frozenset({_RUNNING, _PAUSED})
ALLOWED: Final[dict[Verb, frozenset[MachineState]]] = {
    Verb.PAUSE: frozenset({_RUNNING, _CRITICAL}),
    Verb.RESUME: frozenset({_PAUSED, _CRITICAL}),
    Verb.RESET: _LIVE | {_CRITICAL},
    Verb.SHUT_DOWN: frozenset({_RUNNING}),
    Verb.SAVE: _LIVE,
    Verb.SNAPSHOT: _LIVE,
    Verb.MERGE: _LIVE,
    Verb.ADD_DISK: _LIVE,
    Verb.REMOVE_DISK: _LIVE,
    Verb.CHANGE_MEDIUM: _LIVE,
    Verb.RESIZE_DISK: _LIVE,
    Verb.ADD_ADAPTER: _LIVE,
    Verb.REMOVE_ADAPTER: _LIVE,
}


def refuse(verb: Verb, state: MachineState) -> None:
    """Raise WrongState, naming the state, if it does not allow the verb."""
    if state not in ALLOWED[verb]:
        raise WrongState(f"is {state.value}: {verb.value}")
