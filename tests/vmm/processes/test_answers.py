# SPDX-License-Identifier: Apache-2.0
"""A worker's answers become values; malformed ones are errors."""

from __future__ import annotations

from typing import Any

import pytest

from vmm.model.errors import VmmError
from vmm.processes.answers import Disconnected, MachineStatus, Started, understood
from vmm.store.state import MachineState


def test_reading_a_status() -> None:
    """Unknown fields of a worker of another version are left out, and missing ones are None."""
    document = {"state": "paused-critical", "reason": "the disk is full", "worker_pid": 5, "qemu_pid": 6}
    assert MachineStatus.of_document(document) == MachineStatus(MachineState.CRITICAL, reason="the disk is full")


def test_reading_the_answer_to_a_start() -> None:
    """Each adapter without a switch is named with the reason; an older worker names none."""
    row = {"adapter": "nic-0", "switch": "lan", "problem": "switch 'lan' does not exist"}
    expected = Started(MachineState.RUNNING, (Disconnected("nic-0", "lan", "switch 'lan' does not exist"),))
    assert Started.of_document({"state": "running", "disconnected": [row]}) == expected
    assert Started.of_document({"state": "running"}) == Started(MachineState.RUNNING)


@pytest.mark.parametrize("answer", [None, [], {}, {"state": "asleep"}, {"state": 7}])
def test_malformed_answers_are_errors(answer: Any) -> None:
    """The error names the machine and says what helps."""
    for kind in (MachineStatus, Started):
        with (
            pytest.raises(VmmError, match=r"web: cannot understand the answer of its worker.*this version"),
            understood("web"),
        ):
            kind.of_document(answer)
