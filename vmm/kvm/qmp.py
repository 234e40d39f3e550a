# SPDX-License-Identifier: Apache-2.0
"""A connection to QEMU's monitor, or to the guest agent, which speaks nearly the same protocol.

Decides that every command has a time-out, that failures become our errors, and what happens to a connection with an
outstanding answer: it is closed, because a late answer must not be taken for the answer to another command. The only
file that knows qemu.qmp. Must not know what the commands mean.

INV-DESCRIPTOR-NAMED: a descriptor gets the name for which it was sent. QEMU keeps only the newest unnamed descriptor,
so one is sent only after the previous one has its name (source: chardev/char-socket.c, `read_msgfds`).

    qmp = await Qmp.connect("/run/vmm/0123456789ab/qmp.sock")
    status = await qmp.execute("query-status")
    async for event in qmp.events():       # {"event": "STOP", "data": {...}}, until the connection ends
        ...
    await qmp.close()
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError, StateError

from vmm.kvm.qemu_errors import LOG, explain
from vmm.model.errors import AgentUnavailable, QemuFailed, TimedOut, VmmError

CONNECT_SECONDS = 10.0
COMMAND_SECONDS = 10.0  # a main loop that drains a disk waits for the reconnect delay, see drives
AGENT_SECONDS = 3.0

Event: TypeAlias = dict[str, Any]


class ConnectionEnded(QemuFailed):
    """The connection ended before the answer arrived."""


class Qmp:
    """A connection. Several tasks may execute commands at the same time."""

    def __init__(self, client: QMPClient, who: str) -> None:
        """Internal; use `connect` or `connect_agent`."""
        self._client = client
        # The client's own listener is never read and would keep every event forever (an agent's come from a guest).
        client.events.event_filter = lambda event: False
        self._who = who
        self._listener = EventListener()
        self._watch: asyncio.Task[None] | None = None
        self._hanging_up: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._handing_over = asyncio.Lock()

    @classmethod
    async def connect(cls, path: str, *, timeout_seconds: float = CONNECT_SECONDS) -> Qmp:
        """Connect to a monitor and leave its negotiation mode. Raises QemuFailed, TimedOut."""
        client = QMPClient("qemu")
        qmp = cls(client, "QEMU")
        client.register_listener(qmp._listener)
        await qmp._connect(path, timeout_seconds)
        return qmp

    @classmethod
    async def connect_agent(cls, path: str, *, timeout_seconds: float = AGENT_SECONDS) -> Qmp:
        """Connect to a guest agent and discard its pending answers to earlier clients.

        Raises AgentUnavailable without an answer.
        """
        client = QMPClient("agent")
        client.await_greeting = False
        client.negotiate = False
        qmp = cls(client, "the guest agent")
        try:
            deadline = time.monotonic() + timeout_seconds  # for both steps
            await qmp._connect(path, timeout_seconds)
            token = random.getrandbits(31)
            left = max(0.0, deadline - time.monotonic())
            answer = await qmp.execute("guest-sync", timeout_seconds=left, id=token)
        except VmmError as error:
            await qmp.close()
            raise AgentUnavailable(
                f"the guest agent does not answer: {error.problem}",
                hint="is qemu-guest-agent installed and running in the guest?",
            ) from error
        if answer != token:
            await qmp.close()
            raise AgentUnavailable("the guest agent answered another program's request")
        return qmp

    async def _connect(self, path: str, timeout_seconds: float) -> None:
        try:
            await asyncio.wait_for(self._client.connect(path), timeout_seconds)
        except TimeoutError as error:
            await self.close()
            raise TimedOut(f"{self._who} sent no greeting within {timeout_seconds:g} s", path=path) from error
        except (QMPError, OSError) as error:
            await self.close()
            raise QemuFailed(f"cannot talk to {self._who}: {_reason(error)}", path=path) from error
        self._watch = asyncio.create_task(self._wait_for_end())

    async def _wait_for_end(self) -> None:
        """Notice the end of the connection, which the client reports only on request."""
        while self._client.runstate.name == "RUNNING":
            await self._client.runstate_changed()
        self._ended.set()
        await self._disconnect()

    # -- commands ---------------------------------------------------------------------------------------------------

    async def execute(self, command: str, *, timeout_seconds: float = COMMAND_SECONDS, **arguments: object) -> Any:
        """The result of a command; `_` in argument names is sent as `-`.

        Raises QemuFailed with QEMU's message (for an agent AgentUnavailable if it is gone), TimedOut. After a TimedOut
        the connection is closed.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self.execute_raw(command, named, timeout_seconds=timeout_seconds)

    async def execute_raw(
        self, command: str, arguments: dict[str, Any] | None = None, *, timeout_seconds: float = COMMAND_SECONDS
    ) -> Any:
        """As `execute`, with argument names unchanged."""
        try:
            return await asyncio.wait_for(self._client.execute(command, arguments or None), timeout_seconds)
        except TimeoutError as error:
            await self.close()
            raise TimedOut(f"{self._who} did not answer {command} within {timeout_seconds:g} s") from error
        except ExecuteError as error:
            raise self._refusal(command, str(error)) from error
        except (ExecInterruptedError, StateError, QMPError, OSError) as error:
            raise ConnectionEnded(f"{self._who} closed the connection during {command}: {_reason(error)}") from error

    def _refusal(self, command: str, words: str) -> QemuFailed:
        """The error for a refused command, explained if its message is known. An agent's message is the guest's."""
        LOG.warning("%s refused %s: %s", self._who, command, words)
        meaning = explain(words)
        if meaning is None and self._who == "QEMU":
            return QemuFailed(f"QEMU refused {command}", hint="vmm logs MACHINE --of worker shows its message")
        problem, hint = (words, None) if meaning is None else meaning
        return QemuFailed(f"{self._who} refused {command}: {problem}", hint=hint)

    async def send_descriptor(self, name: str, descriptor: int) -> None:
        """Send QEMU a descriptor, which it then knows as `name` (`fd:NAME`). Ours stays open.

        Raises QemuFailed, TimedOut.
        """
        await self._hand_over(descriptor, "getfd", {"fdname": name})

    async def forget_descriptor(self, name: str) -> None:
        """Have QEMU close the descriptor with this name, unless it has been used. Never fails."""
        with contextlib.suppress(VmmError):
            await self.execute("closefd", fdname=name)

    async def add_descriptor_to_set(self, set_number: int, descriptor: int, word: str = "") -> None:
        """Send QEMU a descriptor as `/dev/fdset/SET_NUMBER`, marked with `word`. Raises QemuFailed, TimedOut."""
        await self._hand_over(descriptor, "add-fd", {"fdset-id": set_number, "opaque": word})

    async def _hand_over(self, descriptor: int, command: str, arguments: dict[str, Any]) -> None:
        """Send a descriptor and name it with `command`, before any other is sent. Raises QemuFailed, TimedOut."""
        await self._handing_over.acquire()
        try:
            await self._wait_all_written()
            self._client.send_fd_scm(descriptor)
        except BaseException as error:
            self._handing_over.release()
            if isinstance(error, QMPError | OSError):
                raise QemuFailed(f"cannot hand over a descriptor: {_reason(error)}") from error
            raise
        # It is on its way: the next descriptor waits until this one has its name, even if our caller stops waiting.
        naming = asyncio.create_task(self.execute_raw(command, arguments))

        def named(task: asyncio.Task[Any]) -> None:
            self._handing_over.release()
            if not task.cancelled():
                task.exception()  # retrieved here: the caller has been notified through `naming`

        naming.add_done_callback(named)
        await asyncio.shield(naming)

    async def _wait_all_written(self) -> None:
        """Wait for asyncio's buffer to drain: a descriptor bypasses it, and must not arrive inside a command."""
        writer = self._client._writer
        async with asyncio.timeout(COMMAND_SECONDS):
            while writer is not None and writer.transport.get_write_buffer_size():
                await asyncio.sleep(0)

    # -- events -----------------------------------------------------------------------------------------------------

    async def events(self) -> AsyncIterator[Event]:
        """QEMU's asynchronous events, in order, until the connection ends. For one reader."""
        while True:
            if not self._listener.empty():
                yield dict(await self._listener.get())
                continue
            getting = asyncio.ensure_future(self._listener.get())
            ending = asyncio.ensure_future(self._ended.wait())
            try:
                await asyncio.wait({getting, ending}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                ending.cancel()
                got = getting.done()
                getting.cancel()
            if got:
                yield dict(getting.result())
            elif self._listener.empty():
                return

    @property
    def is_connected(self) -> bool:
        """False once the connection has ended."""
        return not self._ended.is_set()

    async def wait_closed(self) -> None:
        """Return when the connection has ended."""
        await self._ended.wait()

    async def close(self) -> None:
        """Close the connection; closing twice is fine."""
        self._ended.set()
        await self._disconnect()
        if self._watch is not None and self._watch is not asyncio.current_task():
            await asyncio.wait({self._watch})

    async def _disconnect(self) -> None:
        if self._hanging_up is None:  # the client does not support two disconnects at once
            self._hanging_up = asyncio.create_task(self._hang_up())
        await asyncio.shield(self._hanging_up)

    async def _hang_up(self) -> None:
        # It raises whatever ended the connection; callers that wait for an answer get that error themselves.
        # (ValueError: the peer sent a line without an end.)
        with contextlib.suppress(QMPError, OSError, EOFError, ValueError, asyncio.TimeoutError):
            await asyncio.wait_for(self._client.disconnect(), COMMAND_SECONDS)


def _reason(error: BaseException) -> str:
    """The innermost reason, which is the most specific one."""
    if isinstance(error, ExecInterruptedError) or not str(error):
        return "the connection ended"
    inner = getattr(error, "exc", None)
    if isinstance(inner, BaseException):
        return _reason(inner)
    return str(error) or type(error).__name__
