# SPDX-License-Identifier: Apache-2.0
"""When a guest's clock is set, and what is reported if that fails."""

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
    """A machine whose agent answers from the given attempt on."""

    def __init__(self, *, answers_at: int, is_on: bool = True, state: MachineState = MachineState.RUNNING) -> None:
        self.tries = 0
        self.events: list[tuple[str, str]] = []
        self._answers_at = answers_at
        self.spec = SimpleNamespace(integration=SimpleNamespace(time_sync=is_on))
        self.agent = self
        self.state = state
        self.exited = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    async def set_time(self) -> None:
        """Set the time, as the agent does."""
        self.tries += 1
        if self.tries < self._answers_at:
            raise AgentUnavailable("no guest agent has answered yet")

    def tell(self, event: str, *, after: str, problem: str) -> None:
        """Record an event."""
        self.events.append((event, after))

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task, as the machine does."""
        self.tasks.append(asyncio.ensure_future(work))


def set_clock(machine: Machine, *afters: str) -> None:
    """Set the clock after each of these, and wait for it."""

    async def scene() -> None:
        guest_clock = GuestClock(cast(clock.Machine, machine))
        for after in afters:
            guest_clock.bring_to_now(after)
        await asyncio.gather(*machine.tasks)

    asyncio.run(scene())


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short times, so that the test need not wait long."""
    monkeypatch.setattr(clock, "TRY_SECONDS", 0.05)
    monkeypatch.setattr(clock, "_AGAIN_SECONDS", 0.001)


def test_the_clock_is_set_as_soon_as_the_agent_answers() -> None:
    """An agent that needs a moment is asked until it answers, by one task; success is not reported."""
    machine = Machine(answers_at=3)
    set_clock(machine, "pause", "pause")
    assert (machine.tries, machine.events) == (3, [])


def test_a_pause_while_the_clock_is_set() -> None:
    """A guest that was paused between our reading of the time and its answer got an old time: it is set once more."""
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
    assert (machine.tries, machine.events) == (2, [])


def test_a_clock_that_cannot_be_set_is_an_event() -> None:
    """Without an agent, the event says after which operation the clock was not set."""
    machine = Machine(answers_at=1 << 30)
    set_clock(machine, "paused-critical")
    assert machine.events == [("clock-not-set", "paused-critical")]


def test_no_clock_is_set_if_the_service_is_off() -> None:
    """If time synchronization is switched off, the clock is not set, and no event is recorded."""
    machine = Machine(answers_at=1, is_on=False)
    set_clock(machine, "pause")
    assert (machine.tries, machine.events) == (0, [])


def test_the_clock_of_a_guest_that_is_paused_again() -> None:
    """It is set when the guest continues: nothing is reported yet."""
    machine = Machine(answers_at=1 << 30, state=MachineState.PAUSED)
    set_clock(machine, "pause")
    assert (machine.tries, machine.events) == (1, [])
