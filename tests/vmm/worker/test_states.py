# SPDX-License-Identifier: Apache-2.0
"""A table derives the state of a running machine from facts, and another one what each state allows."""

from __future__ import annotations

import itertools

import pytest

from vmm.model.errors import WrongState
from vmm.store.state import MachineState, WorkerPhase
from vmm.worker.states import (
    ALLOWED,
    EFFECTS,
    STATES,
    Effect,
    Facts,
    StatusReport,
    Verb,
    effects_of,
    refuse,
    state_of,
)

STATUSES = (
    "prelaunch",
    "running",
    "paused",
    "io-error",
    "shutdown",
    "postmigrate",
    "finish-migrate",
    "internal-error",
    "guest-panicked",
)
EVERYTHING = [
    Facts(phase, status, is_known, is_ending, is_paused, operation)
    for phase, status, is_known, is_ending, is_paused, operation in itertools.product(
        WorkerPhase, STATUSES, (True, False), (True, False), (True, False), (None, "save", "snapshot")
    )
]


def plain_state(one: Facts) -> MachineState:
    """The same, written as plain conditions."""
    if one.phase is WorkerPhase.STARTING:
        return MachineState.STARTING
    if one.is_ending or one.phase is WorkerPhase.ENDED:
        return MachineState.STOPPING
    if one.operation == "save" or one.is_paused_by_user:
        return MachineState.PAUSED
    if not one.is_known or one.status == "running":
        return MachineState.RUNNING
    return MachineState.CRITICAL if one.status == "io-error" else MachineState.PAUSED


def test_every_combination_of_facts_has_its_state() -> None:
    """Every possible combination of facts gives the state that the plain conditions give."""
    assert len(EVERYTHING) == 648
    assert [one for one in EVERYTHING if state_of(one) is not plain_state(one)] == []


def test_every_row_is_used() -> None:
    """No row of the table is hidden by the rows before it."""
    for number, (words, holds, _) in enumerate(STATES):
        earlier = [row[1] for row in STATES[:number]]
        assert any(holds(one) and not any(before(one) for before in earlier) for one in EVERYTHING), words


REPORTS = [
    StatusReport(before, status, has_ended, is_retrying, is_paused)
    for before, status, has_ended, is_retrying, is_paused in itertools.product(
        STATUSES, STATUSES, (True, False), (True, False), (True, False)
    )
]


def plain_effects(one: StatusReport) -> list[Effect]:
    """The same, written as plain conditions."""
    found = [Effect.FORGET_PAUSE] if one.status == "running" else []
    if one.status == "shutdown":
        found += [] if one.has_ended else [Effect.POWERED_OFF]
    elif one.status in ("internal-error", "guest-panicked") and not one.has_ended:
        found.append(Effect.CRASHED)
    elif one.status == "io-error":
        found += [Effect.REPORT_FAILED_DISK] if one.before != "io-error" else []
        found += [Effect.RETRY] if not one.is_retrying and not one.is_paused_by_user else []
    elif one.before == "io-error" and one.status == "running":
        found.append(Effect.REPORT_RESUMED)
    return found


def test_every_report_has_its_effects() -> None:
    """Every change of QEMU's status leads to what the plain conditions say, and every effect occurs."""
    assert [one for one in REPORTS if effects_of(one) != plain_effects(one)] == []
    assert (
        {effect for one in REPORTS for effect in effects_of(one)} == {effect for _, effect in EFFECTS} == set(Effect)
    )


@pytest.mark.parametrize("verb", list(Verb), ids=lambda one: one.name)
def test_what_a_state_allows(verb: Verb) -> None:
    """A verb is allowed in the states listed for it; in every other one the error names the state."""
    assert ALLOWED[verb]
    for state in MachineState:
        if state in ALLOWED[verb]:
            refuse(verb, state)
        else:
            with pytest.raises(WrongState, match=f"^is {state.value}: .*{verb.value}"):
                refuse(verb, state)


@pytest.mark.parametrize("state", [MachineState.OFF, MachineState.SAVED, MachineState.STARTING, MachineState.STOPPING])
def test_no_verb_is_allowed_while_a_machine_starts_or_ends(state: MachineState) -> None:
    """While it starts or ends, and when it is off, the verbs of a running machine are refused."""
    assert [verb for verb, states in ALLOWED.items() if state in states] == []
