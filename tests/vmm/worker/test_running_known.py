# SPDX-License-Identifier: Apache-2.0
"""What a worker reports about a machine that it has just taken over, before QEMU has answered."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from vmm.host.proc import ProcessRef
from vmm.kvm.qmp import Qmp
from vmm.model.paths import MachinePaths, RuntimePaths
from vmm.model.spec import make_spec
from vmm.store.state import MachineState, WorkerNote, WorkerPhase
from vmm.worker import running
from vmm.worker.running import Running


class FakeQmp:
    """A monitor that answers with one status."""

    is_connected = True

    def __init__(self, status: str) -> None:
        self.status = status

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Its only answer."""
        assert command == "query-status"
        return {"status": self.status}


def taken_over(folder: Path, **details: object) -> Running:
    """A worker's view of a machine whose QEMU lives, when the worker starts."""
    note = WorkerNote(qemu=ProcessRef.of_self(), phase=WorkerPhase.RUNNING)
    note.details.update(details)
    return Running(
        make_spec(name="web"), MachinePaths(str(folder)), RuntimePaths(str(folder)), note, lambda *args, **more: None
    )


@pytest.mark.parametrize(("details", "state"), [({}, "running"), ({"paused": True}, "paused")])
def test_the_state_of_a_machine_that_was_taken_over(tmp_path: Path, details: dict[str, object], state: str) -> None:
    """It is running, unless it had been paused: an unanswered query is not a state of its own."""
    assert taken_over(tmp_path, **details).state is MachineState(state)


def test_the_status_waits_for_qemu(tmp_path: Path) -> None:
    """Callers get their answer when QEMU has reported the machine's status, and that status."""

    async def ask() -> None:
        machine = taken_over(tmp_path)
        asked = asyncio.create_task(machine.wait_known())
        await asyncio.sleep(0)
        assert not asked.done()
        machine.conversation._qmp = cast(Qmp, FakeQmp("paused"))
        await machine.refresh()
        await asked
        assert machine.state is MachineState.PAUSED

    asyncio.run(ask())


def test_a_qemu_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for no longer than its callers wait, and not at all once it has ended."""
    monkeypatch.setattr(running, "KNOWN_SECONDS", 0.0)
    machine = taken_over(tmp_path)
    asyncio.run(machine.wait_known())
    assert machine.state is MachineState.RUNNING
    monkeypatch.setattr(running, "KNOWN_SECONDS", 1e6)
    machine.note.qemu = None
    asyncio.run(machine.wait_known())
