# SPDX-License-Identifier: Apache-2.0
"""A clock that stands still unless a test moves it, for modules that read `time.monotonic` and sleep."""

from __future__ import annotations

import asyncio
from types import ModuleType

import pytest


class FakeClock:
    """Stands in for a module's `time`: sleeping moves it on at once, and is recorded."""

    def __init__(self) -> None:
        self.now = self.began = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        """The time that the test has made it."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Move on instead of waiting."""
        self.slept.append(seconds)
        self.now += seconds

    def install(self, patch: pytest.MonkeyPatch, module: ModuleType) -> None:
        """Be the clock of this module, and that of every coroutine that sleeps while the patch lasts."""

        async def sleep(seconds: float) -> None:
            self.sleep(seconds)

        patch.setattr(module, "time", self)
        patch.setattr(asyncio, "sleep", sleep)
