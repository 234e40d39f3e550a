# SPDX-License-Identifier: Apache-2.0
"""How a worker watches the supervisor and the runtime folder, through which other processes find its machine.

Decides when another supervisor is started, and when the folder counts as gone. What happens to a machine without its
runtime folder is decided in `worker`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from vmm.host.proc import ProcessRef, python_command, python_environment, spawn_detached
from vmm.model.paths import MachinePaths, RuntimePaths
from vmm.model.waiting import async_becomes
from vmm.store.state import SupervisorNote

SUPERVISOR_AGAIN_SECONDS = 1.0  # one that cannot start is not started faster than this
FOLDER_LOOK_SECONDS = 2.0  # for as long as the machine runs


class Supervision:
    """The supervisor and the runtime folder of one machine, as its worker sees them. For one event loop."""

    def __init__(
        self,
        machine: MachinePaths,
        runtime: RuntimePaths,
        tell: Callable[..., None],
        folder_gone: Callable[[], Awaitable[None]],
    ) -> None:
        """`folder_gone` is awaited once, if the runtime folder has been removed. Raises OSError if it is missing."""
        self._machine = machine
        self._runtime = runtime
        self._tell = tell
        self._folder_gone = folder_gone
        self._folder = os.stat(runtime.folder)
        self._last: SupervisorNote | None = None

    def watches(self) -> tuple[Coroutine[Any, Any, None], ...]:
        """The coroutines that must run for as long as the machine does."""
        return self._watch_supervisor(), self._watch_folder()

    def note(self) -> SupervisorNote | None:
        """The supervisor's latest note, even after the folder that contained it is gone."""
        return SupervisorNote.read(self._runtime) or self._last

    async def _watch_supervisor(self) -> None:
        """Start another supervisor when one has died."""
        loop = asyncio.get_running_loop()
        while self._has_folder():
            note = SupervisorNote.read(self._runtime)
            pidfd = note.supervisor.open_pidfd() if note is not None and note.supervisor is not None else None
            if pidfd is not None:
                died = asyncio.Event()
                loop.add_reader(pidfd, died.set)
                try:
                    await died.wait()
                finally:
                    loop.remove_reader(pidfd)
                    os.close(pidfd)
                self._tell("keeper-died")
                if not self._has_folder():
                    return
            with contextlib.suppress(OSError):
                pid = spawn_detached(
                    python_command("vmm.processes.supervisor", self._machine.folder, self._runtime.folder),
                    log_path=self._machine.log("keeper"),
                    environment=python_environment(),
                )
                await self._wait_for_note(pid)
            await asyncio.sleep(SUPERVISOR_AGAIN_SECONDS)  # between two starts

    async def _wait_for_note(self, pid: int) -> None:
        """Wait until the new supervisor has written its note, or has ended."""

        def is_there_or_ended() -> bool:
            note = SupervisorNote.read(self._runtime)
            has_written = note is not None and note.supervisor is not None and note.supervisor.pid == pid
            return has_written or ProcessRef.of(pid) is None

        await async_becomes(is_there_or_ended, SUPERVISOR_AGAIN_SECONDS * 10)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)

    def _has_folder(self) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(self._runtime.folder), self._folder)
        return False

    async def _watch_folder(self) -> None:
        """Wait until the folder is removed, as /run/user/ID is when a user's last session ends, or files in /tmp are
        when a program tidies up there; then call `folder_gone`.
        """
        while self._has_folder():
            self._last = self.note()
            await asyncio.sleep(FOLDER_LOOK_SECONDS)  # of a watch without an end
        await self._folder_gone()
