# SPDX-License-Identifier: Apache-2.0
"""What is done and recorded when a machine pauses and continues."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from vmm.model.errors import QemuFailed
from vmm.model.paths import MachinePaths, RuntimePaths
from vmm.model.spec import make_spec
from vmm.store.state import WorkerNote, WorkerPhase
from vmm.worker.running import Running


class Monitor:
    """As much of QEMU's monitor as these tests use."""

    is_connected = True

    def __init__(self, *states: str) -> None:
        self._states = list(states)

    async def execute(self, command: str, **arguments: object) -> dict[str, Any]:
        """Its answer."""
        return {"status": self._states.pop(0)} if command == "query-status" else {}


@pytest.mark.parametrize(
    ("before", "verb", "states", "after"),
    [
        ("io-error", "refresh", ["running"], ["paused-critical"]),
        ("paused", "resume", ["running"], ["pause"]),
        ("running", "refresh", ["running"], []),
        ("io-error", "refresh", ["io-error"], []),
    ],
)
def test_the_clock_is_set_when_the_guest_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, verb: str, states: list[str], after: list[str]
) -> None:
    """A guest that was paused, by its user or because of a failed disk, has its clock set when it continues."""
    set_after: list[str] = []

    async def scene() -> None:
        note = WorkerNote(phase=WorkerPhase.RUNNING, details={"paused": before == "paused"})
        running = Running(
            make_spec(name="web"), MachinePaths(str(tmp_path)), RuntimePaths(str(tmp_path)), note,
            lambda event, **details: None,
        )  # fmt: skip
        monkeypatch.setattr(running.clock, "bring_to_now", set_after.append)
        monkeypatch.setattr(running.conversation, "_qmp", Monitor(*states))
        monkeypatch.setattr(running.conversation, "_is_retrying", True)
        running.conversation.status = before
        await getattr(running, verb)()

    asyncio.run(scene())
    assert set_after == after


def test_the_state_is_paused_when_the_verb_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-STOP-ACTION: QEMU is queried instead of waiting for its event, so a save right afterwards saves it as
    paused."""

    async def scene() -> str:
        running = Running(
            make_spec(name="web"), MachinePaths(str(tmp_path)), RuntimePaths(str(tmp_path)),
            WorkerNote(phase=WorkerPhase.RUNNING), lambda event, **details: None,
        )  # fmt: skip
        monkeypatch.setattr(running.conversation, "_qmp", Monitor("paused"))
        running.conversation.status = "running"
        await running.pause()
        return running.status

    assert asyncio.run(scene()) == "paused"


@pytest.mark.parametrize(
    ("before", "verb", "after"), [("running", "pause", "paused"), ("paused", "resume", "running")]
)
def test_a_verb_succeeds_if_qemu_dies_after_carrying_it_out(
    before: str, verb: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU may die between carrying out the command and answering the query after it."""

    class Dying(Monitor):
        async def execute(self, command: str, **arguments: object) -> dict[str, Any]:
            if command == "query-status":
                raise QemuFailed("it hung up")
            return {}

    async def scene() -> str:
        note = WorkerNote(phase=WorkerPhase.RUNNING, details={"paused": before == "paused"})
        recorded: list[str] = []
        running = Running(
            make_spec(name="web"), MachinePaths(str(tmp_path)), RuntimePaths(str(tmp_path)), note,
            lambda event, **details: recorded.append(event),
        )  # fmt: skip
        monkeypatch.setattr(running.clock, "bring_to_now", lambda why: None)
        monkeypatch.setattr(running.conversation, "_qmp", Dying())
        running.conversation.status, running.conversation.is_known = before, True
        await getattr(running, verb)()
        assert recorded == [f"{verb}d"]
        return running.status

    assert asyncio.run(scene()) == after
