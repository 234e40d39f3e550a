# SPDX-License-Identifier: Apache-2.0
"""A running machine whose host stops: its automatic stop action, in bounded time, however the request arrives.

Decides what is tried if one way fails (a machine that cannot be saved is asked to shut down, and powered off if it
does not), how much of the time each way may take, and that the work is done once: a signal to the worker or the
supervisor, and `vmm host autostart --stop-machines`, all lead here, at once or one after the other. Must not know how
these requests arrive, nor what becomes of the disks.

INV-STOP-ACTION: SIGTERM to any of a machine's processes, or to all of them, carries out its stop action. The signal
does not end QEMU or the disk server (`running`, `supervisor`), and because of a mark in the runtime folder the next
worker continues if this one is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from vmm.model.errors import InUse, TimedOut, VmmError
from vmm.model.waiting import async_looks
from vmm.store import registry, saved
from vmm.store.state import WorkerPhase, mark_leaving
from vmm.worker.running import Running
from vmm.worker.states import End

if TYPE_CHECKING:
    from vmm.worker.saving import Saving

# systemd kills the rest of a login session 90 seconds after it asked its processes to end.
SIGNAL_SECONDS = 75.0
HOST_SECONDS = 600.0  # the unit that vmm installs allows 900, for all machines
_IDLE_SHARE, _SAVE_SHARE = 0.2, 0.6  # of the time: to wait for another operation, and until saving is given up
_OFF_SECONDS = 10.0  # reserved for QEMU to write out its disks and end

_GIVING_WAY = ("snapshot-merge",)  # it can be cancelled and continued another time

Way = Callable[[float], Awaitable[None]]
Rest = Callable[[], asyncio.Future[None] | None]


class Leaving:
    """The end of one running machine, by its automatic stop action. For one event loop."""

    def __init__(self, running: Running, saving: Saving) -> None:
        self._running = running
        self._saving = saving
        self._task: asyncio.Task[str] | None = None

    @property
    def has_begun(self) -> bool:
        """True from the first request on."""
        return self._task is not None

    def begin(self, by: str, seconds: float, after: Rest = lambda: None) -> asyncio.Task[str]:
        """Begin the stop action, or join the one in progress; the task's result says what was done.

        `by`: the origin of the request, for the event. `after`: returns the task that settles what an earlier worker
        left, once it has begun; that task comes first.
        """
        if self._task is None:
            mark_leaving(self._running.runtime)
            self._task = asyncio.create_task(self._leave(by, seconds, after))
        return self._task

    async def _leave(self, by: str, seconds: float, after: Rest) -> str:
        running = self._running
        began = time.monotonic()
        action = self._action()
        running.tell("host-stopping", action=action, by=by)
        await self._wait_ready(began + seconds * _IDLE_SHARE, after)
        running.is_leaving = True
        ways: dict[str, tuple[str, Way]] = {
            "save": ("saved", self._save),
            "shut-down": ("shut down", self._shut_down),
            "turn-off": ("turned off", self._turn_off),
        }
        ends = {"save": began + seconds * _SAVE_SHARE, "shut-down": began + seconds - _OFF_SECONDS}
        for name in list(ways)[list(ways).index(action) :]:
            word, way = ways[name]
            if running.exited.is_set():
                return "saved" if saved.is_saved(running.machine) else "shut down"
            try:
                await way(ends.get(name, began + seconds))
                return word
            except Exception as error:  # whatever failed, the next way has to be tried
                problem = error.problem if isinstance(error, VmmError) else f"internal error: {error!r}"
                running.tell("stop-action-failed", action=name, problem=problem)
        return "failed"

    def _action(self) -> str:
        """The stop action in the current definition."""
        with contextlib.suppress(VmmError):
            return registry.read_definition(self._running.machine.definition).automatic.stop
        return self._running.spec.automatic.stop

    async def _wait_ready(self, deadline: float, after: Rest) -> None:
        """Wait until the machine has started and no other operation is in progress, or the time for that is over.

        A merge, which may take hours, is cancelled.
        """
        running = self._running
        async for _ in async_looks(deadline - time.monotonic()):
            if running.exited.is_set() or running.note.phase is WorkerPhase.ENDED:
                return
            rest = after()
            is_idle = running.note.operation is None and (rest is None or rest.done())
            if running.note.phase is WorkerPhase.RUNNING and is_idle and running.is_reachable:
                return
            if running.note.operation in _GIVING_WAY:
                with contextlib.suppress(VmmError):
                    await running.server.call("cancel")

    async def _save(self, deadline: float) -> None:
        async for is_last in async_looks(deadline - time.monotonic()):
            try:
                await self._saving.save(lambda document: None, give_up_at=deadline)
                return
            except InUse:  # another operation has not ended, such as a snapshot whose memory is being written
                if is_last:
                    raise

    async def _shut_down(self, deadline: float) -> None:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise TimedOut("not enough time is left for the guest to shut down")
        await self._running.shutdown(seconds, beside_others=True)

    async def _turn_off(self, deadline: float) -> None:
        running = self._running
        if saved.is_saved(running.machine):
            await running.quit(End.SAVED)
        else:
            await running.stop()
        async for _ in async_looks(deadline - time.monotonic()):
            if running.exited.is_set() or running.note.phase is WorkerPhase.ENDED:
                return
            await running.kill()  # QEMU was about to start
