# SPDX-License-Identifier: Apache-2.0
"""Asks a guest to shut down until it does: through its agent, otherwise with the power button.

Decides when to ask again. A guest that has just begun to boot notices neither: a press of the button is lost until the
guest listens for it, and the agent starts last. So the guest is asked again when an agent starts, and the button is
pressed again from time to time during the first minutes after boot. Later the guest has noticed the first press, and
might interpret a second one differently. Must not know what follows if the guest does not obey.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final, Literal, Protocol

from vmm.kvm.guest_agent import GuestAgent
from vmm.kvm.qmp import Qmp
from vmm.model.errors import VmmError

YOUNG_SECONDS: Final = 300.0  # since boot: a slow installation medium takes minutes
AGAIN_SECONDS: Final = 5.0  # for the guest to react to its power button
_LOOK_SECONDS = 0.1  # an event ends the wait; this is between looks for the agent, for minutes

Way = Literal["agent", "power button"]


class Machine(Protocol):
    """What is needed of a running machine; `running.Running` provides it."""

    agent: GuestAgent
    exited: asyncio.Event

    @property
    def qmp(self) -> Qmp: ...
    def tell(self, event: str, **details: object) -> None: ...
    def boot_age_seconds(self) -> float: ...


async def ask_until_off(running: Machine, timeout_seconds: float, *, again_seconds: float = AGAIN_SECONDS) -> None:
    """Ask until the guest has powered off. Raises TimeoutError; QemuFailed and TimedOut if QEMU cannot be asked.

    The deadline is checked between requests: the answer to an aborted request would be taken for the answer to the
    next one.
    """
    deadline = time.monotonic() + timeout_seconds
    reported: Way | None = None
    while not running.exited.is_set():
        way = await _ask(running)
        if way != reported:
            running.tell("shutdown-requested", by=way)
            reported = way
        await _until_worth_asking_again(running, way, again_seconds, deadline)


async def _ask(running: Machine) -> Way:
    with contextlib.suppress(VmmError):
        await running.agent.shutdown()
        return "agent"
    await running.qmp.execute("system_powerdown")
    return "power button"


async def _until_worth_asking_again(running: Machine, way: Way, again_seconds: float, deadline: float) -> None:
    since = time.monotonic()
    was_without_agent = not running.agent.is_open
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(running.exited.wait(), min(_LOOK_SECONDS, max(0.0, deadline - time.monotonic())))
            return
        if time.monotonic() >= deadline:
            raise TimeoutError
        if running.agent.is_open and was_without_agent:
            return  # the agent has started, perhaps again after a reboot
        was_without_agent = was_without_agent or not running.agent.is_open
        is_time = way == "power button" and time.monotonic() - since > again_seconds
        if is_time and running.boot_age_seconds() < YOUNG_SECONDS:
            return
