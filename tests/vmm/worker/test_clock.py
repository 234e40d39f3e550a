# SPDX-License-Identifier: Apache-2.0
"""When a guest's clock is set, and what is told when it cannot be."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmm.model.errors import AgentUnavailable
from vmm.store.state import MachineState
from vmm.worker import clock
from vmm.worker.clock import GuestClock


class Machine:
    """A machine whose agent answers from the given try on."""

    def __init__(self, *, answers_at: int, is_on: bool = True, state: MachineState = MachineState.RUNNING) -> None:
        self.tries = 0
        self.told: list[tuple[str, str]] = []
        self._answers_at = answers_at
        self.spec = SimpleNamespace(integration=SimpleNamespace(time_sync=is_on))
        self.agent = self
        self.state = state
        self.exited = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    async def set_time(self) -> None:
        """As the agent does it."""
        self.tries += 1
        if self.tries < self._answers_at:
            raise AgentUnavailable("no guest agent has answered yet")

    def tell(self, event: str, *, after: str, problem: str) -> None:
        """An event."""
        self.told.append((event, after))

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """As the machine does it."""
        self.tasks.append(asyncio.ensure_future(work))


def set_clock(machine: Machine, *afters: str) -> None:
    """Bring it to now after each of these, and wait."""

    async def scene() -> None:
        guest_clock = GuestClock(cast(clock.Machine, machine))
        for after in afters:
            guest_clock.bring_to_now(after)
        await asyncio.gather(*machine.tasks)

    asyncio.run(scene())


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that a test can wait for."""
    monkeypatch.setattr(clock, "TRY_SECONDS", 0.05)
    monkeypatch.setattr(clock, "_AGAIN_SECONDS", 0.001)


def test_it_is_set_when_the_agent_is_there() -> None:
    """An agent that needs a moment is asked until it answers, by one asker; nothing is told of what went well."""
    machine = Machine(answers_at=3)
    set_clock(machine, "pause", "pause")
    assert (machine.tries, machine.told) == (3, [])


def test_a_pause_while_it_is_set() -> None:
    """A guest that stood still between the look at our clock and its answer got an old time: it is set once more."""
    machine = Machine(answers_at=1)

    async def scene() -> None:
        guest_clock = GuestClock(cast(clock.Machine, machine))
        tried = machine.set_time

        async def slow_agent() -> None:
            await tried()
            if machine.tries == 1:
                guest_clock.bring_to_now("pause")

        machine.set_time = slow_agent  # type: ignore[method-assign]
        guest_clock.bring_to_now("restore")
        await asyncio.gather(*machine.tasks)

    asyncio.run(scene())
    assert (machine.tries, machine.told) == (2, [])


def test_what_cannot_be_set_is_an_event() -> None:
    """Without an agent an event says after what the clock was not set."""
    machine = Machine(answers_at=1 << 30)
    set_clock(machine, "paused-critical")
    assert machine.told == [("clock-not-set", "paused-critical")]


def test_a_service_that_is_off_is_left_alone() -> None:
    """Whoever switched time synchronization off has no clock set, and is told nothing."""
    machine = Machine(answers_at=1, is_on=False)
    set_clock(machine, "pause")
    assert (machine.tries, machine.told) == (0, [])


def test_a_guest_that_is_paused_again_waits() -> None:
    """A guest that stands still again has its clock set when it goes on: nothing is told now."""
    machine = Machine(answers_at=1 << 30, state=MachineState.PAUSED)
    set_clock(machine, "pause")
    assert (machine.tries, machine.told) == (1, [])
