# SPDX-License-Identifier: Apache-2.0
"""A guest's clock, which stands still while its machine does: set to the host's time when the guest continues.

Decides for how long this is tried, and that a failure is recorded as an event: after memory was restored, after a
pause, a disk failure, or a save that failed. Uses the agent, and only if the integration service `time_sync` is on.
Must not know what pauses a machine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Final, Protocol

from vmm.kvm.guest_agent import GuestAgent
from vmm.model.errors import VmmError
from vmm.model.spec import MachineSpec
from vmm.store.state import MachineState

TRY_SECONDS: Final = 30.0  # the agent of a guest that has just resumed needs a moment
_AGAIN_SECONDS = 1.0  # each attempt waits for the agent


class Machine(Protocol):
    """What is needed of a running machine; `running.Running` provides it."""

    agent: GuestAgent
    exited: asyncio.Event

    @property
    def spec(self) -> MachineSpec: ...
    @property
    def state(self) -> MachineState: ...
    def tell(self, event: str, **details: object) -> None: ...
    def in_background(self, work: Coroutine[Any, Any, None]) -> None: ...


class GuestClock:
    """The clock of one running machine's guest. For one event loop."""

    def __init__(self, running: Machine) -> None:
        self._running = running
        self._is_being_set = False
        self._has_stood_still = False  # after the host's time was read for the attempt in progress

    def bring_to_now(self, after: str) -> None:
        """Set the clock in the background; `after` names the reason for which it stood still."""
        self._has_stood_still = True
        if self._running.spec.integration.time_sync and not self._is_being_set:
            self._is_being_set = True
            self._running.in_background(self._set(after))

    async def _set(self, after: str) -> None:
        running = self._running
        deadline = time.monotonic() + TRY_SECONDS
        try:
            while not running.exited.is_set():
                try:
                    self._has_stood_still = False
                    await running.agent.set_time()
                    if not self._has_stood_still:
                        return
                    deadline = time.monotonic() + TRY_SECONDS
                    continue
                except VmmError as error:
                    if running.state is MachineState.PAUSED:
                        return  # it is set when the guest resumes
                    if time.monotonic() > deadline:
                        running.tell("clock-not-set", after=after, problem=error.problem)
                        return
                await asyncio.sleep(_AGAIN_SECONDS)  # the deadline moves when the clock stands still again
        finally:
            self._is_being_set = False
