# SPDX-License-Identifier: Apache-2.0
"""When a guest is asked again to shut down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from tests.support import require_linux_guest
from tests.vmm.guests import linux
from vmm.api.manager import Manager
from vmm.model.errors import AgentUnavailable
from vmm.worker.asking import Machine, ask_until_off

MIB = 1 << 20


class Guest:
    """A guest that obeys when it is ready; it records the requests, and how the machine looks."""

    def __init__(self, *, obeys: Callable[[list[str]], bool], booted_seconds_ago: float = 0.0) -> None:
        self.asked: list[str] = []
        self.ways: list[str] = []
        self.is_open = False
        self._obeys = obeys
        self._age = booted_seconds_ago
        self.exited = asyncio.Event()

    def _hear(self, way: str) -> None:
        self.asked.append(way)
        if self._obeys(self.asked):
            self.exited.set()

    async def shutdown(self) -> None:
        """Shut down, as the agent does."""
        if not self.is_open:
            raise AgentUnavailable("no guest agent has answered yet")
        self._hear("agent")

    async def execute(self, command: str) -> None:
        """Handle a command, as QEMU does."""
        assert command == "system_powerdown"
        self._hear("button")

    def running(self) -> Machine:
        """The machine."""
        return cast(
            Machine,
            SimpleNamespace(
                agent=self, qmp=self, exited=self.exited, boot_age_seconds=lambda: self._age,
                tell=lambda event, **details: self.ways.append(details["by"]),
            ),
        )  # fmt: skip


def ask(guest: Guest, timeout_seconds: float = 30.0) -> None:
    """Ask until it is off, with short times."""
    asyncio.run(ask_until_off(guest.running(), timeout_seconds, again_seconds=0.01))


def test_an_unnoticed_button_is_pressed_again() -> None:
    """While a guest is young, the button is pressed until the guest obeys; there is one event."""
    guest = Guest(obeys=lambda asked: len(asked) == 3)
    ask(guest)
    assert (guest.asked, guest.ways) == (["button"] * 3, ["power button"])


def test_an_agent_that_starts_later_is_asked() -> None:
    """A guest whose agent starts after the button was pressed is asked through it at once, even an old guest."""
    guest = Guest(obeys=lambda asked: asked[-1] == "agent", booted_seconds_ago=10_000.0)

    async def scene() -> None:
        asking = asyncio.create_task(ask_until_off(guest.running(), 30.0, again_seconds=1000.0))
        while not guest.asked:
            await asyncio.sleep(0)
        guest.is_open = True
        await asking

    asyncio.run(scene())
    assert (guest.asked, guest.ways) == (["button", "agent"], ["power button", "agent"])


def test_the_button_is_pressed_once_for_an_old_guest() -> None:
    """A guest that has run for long has noticed it: pressing it again could have another effect."""
    guest = Guest(obeys=lambda asked: False, booted_seconds_ago=10_000.0)
    with pytest.raises(TimeoutError):
        ask(guest, 0.5)
    assert guest.asked == ["button"]


@pytest.mark.kvm
def test_shutdown_of_a_linux_that_is_still_booting(manager: Manager) -> None:
    """`shutdown` right after `start`, of a guest without an agent, takes effect when the guest is ready for it."""
    guest = require_linux_guest()
    manager.create(
        "linux", memory_bytes=int(linux.MEMORY) * MIB, accelerator="tcg", kernel=str(guest.kernel),
        initrd=str(guest.initrd), append=f"{guest.append} guest.no=agent,kvp",
    )  # fmt: skip
    manager.start("linux")
    manager.shutdown("linux", timeout_seconds=120)
    reported = [one for one in manager.events("linux") if one.name in ("shutdown-requested", "powered-off")]
    assert [one.details["by"] for one in reported] == ["power button", "guest-shutdown"]
