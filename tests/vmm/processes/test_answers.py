# SPDX-License-Identifier: Apache-2.0
"""What a worker says is a value; what it should not say is an error."""

from __future__ import annotations

from typing import Any

import pytest

from vmm.model.errors import VmmError
from vmm.processes.answers import Disconnected, MachineStatus, Started, understood
from vmm.store.state import MachineState


def test_a_status() -> None:
    """What a worker of any version adds to it is left out, and what it does not say is None."""
    document = {"state": "paused-critical", "reason": "the disk is full", "worker_pid": 5, "qemu_pid": 6}
    assert MachineStatus.of_document(document) == MachineStatus(MachineState.CRITICAL, reason="the disk is full")


def test_a_start() -> None:
    """Each adapter without a switch is named with the reason; an older worker names none."""
    row = {"adapter": "nic-0", "switch": "lan", "problem": "there is no switch 'lan'"}
    expected = Started(MachineState.RUNNING, (Disconnected("nic-0", "lan", "there is no switch 'lan'"),))
    assert Started.of_document({"state": "running", "disconnected": [row]}) == expected
    assert Started.of_document({"state": "running"}) == Started(MachineState.RUNNING)


@pytest.mark.parametrize("answer", [None, [], {}, {"state": "asleep"}, {"state": 7}])
def test_what_cannot_be_understood(answer: Any) -> None:
    """It is an error that names the machine and says what helps."""
    for kind in (MachineStatus, Started):
        with (
            pytest.raises(VmmError, match=r"web: its worker's answer cannot be understood.*this version"),
            understood("web"),
        ):
            kind.of_document(answer)
