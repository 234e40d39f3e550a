# SPDX-License-Identifier: Apache-2.0
"""The integration services that qemu's guest agent offers: heartbeat, guest information, shutdown, freezing, time.

Decides to which service a request belongs, and refuses it if that is switched off; how long each may take, what a
guest's answer may look like, and that file systems never stay frozen. Must not know its callers, or what else QEMU
does: the worker reports when the guest opened or closed the agent's port (`VSERPORT_CHANGE`, `query-chardev`).

INV-THAWED: every freeze is followed by a thaw. Only an agent that has just answered is asked to freeze. Before that,
the owed thaw is recorded (`owes`), and the record is removed when the guest has answered a thaw that was requested
after the freeze. Until then the thaw is requested repeatedly, however long the agent is silent, also by the next
worker. An agent answers requests in order, so a freeze that it reads late comes before that thaw. The caller waits for
none of this longer than FREEZE_ANSWER_SECONDS and a few seconds before and after.

The guest is not trusted: its answers are checked field by field, truncated, and bounded in number. There is one
request at a time; one that is not answered ends the connection, and the next begins by synchronising (`guest-sync`).

In Hyper-V, names and addresses belong to the data exchange, so `key_value` switches them. Source of the commands:
qga's schema in QEMU's documentation (interop/qemu-ga-ref).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Literal, Protocol

from vmm.kvm.qmp import ConnectionEnded, Qmp
from vmm.model.errors import AgentUnavailable, QemuFailed, TimedOut, VmmError
from vmm.model.guest import GuestInfo, GuestInterface, Heartbeat, OsInfo

Service = Literal["heartbeat", "shutdown", "time_sync", "key_value", "backup"]
PowerDown = Literal["powerdown", "reboot", "halt"]

ANSWER_SECONDS: Final = 3.0
HEARTBEAT_SECONDS: Final = 5.0
LOST_AFTER_SECONDS: Final = 15.0  # three missing heartbeats
SUMMARY_SECONDS: Final = 1.5  # the longest that `vmm show` waits for a busy guest
FREEZE_SECONDS: Final = (
    10.0  # how long file systems stay frozen unless the caller says otherwise, as Windows' VSS does
)
FREEZE_ANSWER_SECONDS: Final = 25.0  # the guest writes out dirty data first; with ping and thaw this makes 30
THAW_TRY_SECONDS: Final = 2.0  # for the answer to one attempt
THAW_GIVE_UP_SECONDS: Final = 10.0  # how long a caller waits; thawing continues without it
THAW_AGAIN_SECONDS: Final = 1.0  # each attempt is a request to the guest
SHUTDOWN_ANSWER_SECONDS: Final = 1.0  # an error comes at once; a guest that shuts down does not answer

# Limits on a guest's answers.
MAX_TEXT_CHARACTERS: Final = 256
MAX_INTERFACES: Final = 64
MAX_ADDRESSES: Final = 32  # per interface


class Switches(Protocol):
    """The enabled services; `vmm.model.spec.IntegrationSpec` implements it."""

    @property
    def heartbeat(self) -> bool: ...
    @property
    def shutdown(self) -> bool: ...
    @property
    def time_sync(self) -> bool: ...
    @property
    def key_value(self) -> bool: ...
    @property
    def backup(self) -> bool: ...


class GuestAgent:
    """The agent of one running machine. For one event loop."""

    def __init__(
        self,
        path: str,
        switches: Switches,
        *,
        machine: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        owes: Callable[[bool], None] = lambda is_owed: None,
        is_owed: bool = False,
        tell: Callable[..., None] = lambda event, **details: None,
    ) -> None:
        """`path`: QEMU's end of the agent's port. Nothing is connected yet.

        `owes` is called with True before the guest may freeze and with False when it has certainly thawed, to be
        recorded; `is_owed`: what was recorded last.
        """
        self._path = path
        self._switches = switches
        self._machine = machine
        self._clock = clock
        self._is_open = False
        self._opened = asyncio.Event()
        self._qmp: Qmp | None = None
        self._one_at_a_time = asyncio.Lock()
        self._seen: float | None = None
        self._known_os: OsInfo | None = None
        self._known_interfaces: tuple[GuestInterface, ...] = ()
        self._freeze_ends: asyncio.Task[None] | None = None  # thaws when the time is up
        self._holds_frozen = False
        self._is_late = is_owed  # a freeze thawed before the caller asked for it: the caller gets an error
        self._note_owed, self._is_owed, self._tell = owes, is_owed, tell
        self._is_unsure = True  # it is not known yet whether this guest is frozen
        self._look_now = asyncio.Event()

    # -- whether there is an agent ----------------------------------------------------------------------------------

    def port_changed(self, is_open: bool) -> None:
        """The guest opened the agent's port, or closed it."""
        self._is_open = is_open
        if is_open:
            self._is_unsure = True  # the memory may have been restored, or the guest may come from another host
            self._opened.set()
        else:
            self._opened.clear()
            self._known_interfaces = ()  # a guest that restarts may have changed
            self._known_os = None

    @property
    def is_open(self) -> bool:
        """True while the guest holds the agent's port open."""
        return self._is_open

    def heartbeat(self) -> Heartbeat:
        """Whether the guest is alive, without asking it."""
        if not self._switches.heartbeat:
            return Heartbeat("off")
        if self._seen is None:
            return Heartbeat("no contact")
        ago = self._clock() - self._seen
        alive = self._is_open and ago <= LOST_AFTER_SECONDS
        return Heartbeat("ok" if alive else "lost", round(ago, 1))

    async def run(self) -> None:
        """Maintain the heartbeat, and thaw file systems whose freeze no caller holds, until cancelled."""
        while True:
            await self._opened.wait()
            with contextlib.suppress(VmmError):
                await self._first_contact()
            while self._is_open:
                with contextlib.suppress(VmmError):
                    if self._must_look():
                        await self._thaw_unheld()
                    elif self._switches.heartbeat:
                        await self.ping()
                self._look_now.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(THAW_AGAIN_SECONDS if self._must_look() else HEARTBEAT_SECONDS):
                        await self._look_now.wait()

    def _must_look(self) -> bool:
        """True while the guest may be frozen without a caller that holds the freeze."""
        return not self._holds_frozen and (self._is_owed or (self._is_unsure and self._switches.backup))

    async def _thaw_unheld(self) -> None:
        if not self._is_owed:
            status = await self._ask("guest-fsfreeze-status")
            if status != "frozen" or self._holds_frozen:
                self._is_unsure = False
                return
        answer = await self._ask("guest-fsfreeze-thaw", seconds=THAW_TRY_SECONDS)
        if not self._holds_frozen:
            self._has_thawed()
            self._tell("guest-thawed", by="vmm", file_systems=answer if isinstance(answer, int) else None)

    def _has_thawed(self) -> None:
        """Record that the guest has answered a thaw that was requested after every freeze."""
        self._is_unsure = False
        if self._is_owed:
            self._is_owed = False
            self._note_owed(False)

    async def _first_contact(self) -> None:
        if self._must_look():
            await self._thaw_unheld()
        if self._switches.key_value:
            self._known_os = await self.os_info()
            self._known_interfaces = await self.addresses()

    async def ping(self) -> None:
        """Ask for a sign of life. Raises AgentUnavailable, TimedOut."""
        self._need("heartbeat")
        await self._ask("guest-ping")

    async def close(self) -> None:
        """Disconnect from the agent; thaws file systems first if we hold them frozen."""
        if self._holds_frozen:
            with contextlib.suppress(VmmError):
                await self.thaw()
        if self._freeze_ends is not None:
            self._freeze_ends.cancel()
        await self._hang_up()

    # -- information about the guest --------------------------------------------------------------------------------

    async def os_info(self) -> OsInfo:
        """The guest's operating system. Raises AgentUnavailable, TimedOut."""
        self._need("key_value")
        answer = _mapping(await self._ask("guest-get-osinfo"))
        host = _mapping(await self._ask("guest-get-host-name"))
        self._known_os = OsInfo(
            name=_text(answer.get("name")) or _text(answer.get("pretty-name")),
            version=_text(answer.get("version-id")) or _text(answer.get("version")),
            kernel=_text(answer.get("kernel-release")),
            machine=_text(answer.get("machine")),
            host_name=_text(host.get("host-name")),
        )
        return self._known_os

    async def addresses(self) -> tuple[GuestInterface, ...]:
        """The guest's network interfaces, without loopback. Raises AgentUnavailable, TimedOut."""
        self._need("key_value")
        found = []
        for one in _list(await self._ask("guest-network-get-interfaces"), MAX_INTERFACES):
            interface = _mapping(one)
            name = _text(interface.get("name"))
            if name and name != "lo":
                found.append(GuestInterface(name, _text(interface.get("hardware-address")), _addresses_of(interface)))
        self._known_interfaces = tuple(found)
        return self._known_interfaces

    async def summary(self) -> GuestInfo:
        """Heartbeat, system and addresses, for `vmm show`: current if the guest answers quickly, else the last known
        values. Never fails.
        """
        if self._is_open and self._switches.key_value:
            with contextlib.suppress(VmmError, TimeoutError):
                async with asyncio.timeout(SUMMARY_SECONDS):
                    await self.os_info()
                    await self.addresses()
        beat = self.heartbeat()
        return GuestInfo(beat.state, beat.seen_seconds_ago, self._known_os, self._known_interfaces)

    # -- controlling the guest --------------------------------------------------------------------------------------

    async def shutdown(self, mode: PowerDown = "powerdown") -> None:
        """Request a shutdown; returns once the guest has the request. Raises AgentUnavailable if it cannot or refuses.

        The end itself is reported by QEMU, not by the agent, which shuts down with the guest.
        """
        self._need("shutdown")
        try:
            await self._ask("guest-shutdown", seconds=SHUTDOWN_ANSWER_SECONDS, mode=mode)
        except TimedOut:
            pass  # expected: a guest that shuts down does not answer
        except AgentUnavailable as error:
            if not isinstance(error.__cause__, ConnectionEnded):
                raise  # an ended connection means that the guest went down before it could answer

    async def set_time(self, seconds: float | None = None) -> None:
        """Set the guest's clock to this time (seconds since 1970, UTC); None: the host's time. Raises VmmError."""
        self._need("time_sync")
        now = time.time_ns() if seconds is None else int(seconds * 1e9)
        await self._ask("guest-set-time", time=now)

    # -- freezing ---------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def frozen(self, *, max_seconds: float = FREEZE_SECONDS) -> AsyncIterator[int]:
        """Write out and freeze the guest's file systems while the block runs; yields their number.

        They thaw at its end, however it ends. Raises AgentUnavailable, TimedOut, also if they had to thaw before the
        block was done: data copied meanwhile is then not of a single moment.
        """
        count = await self.freeze(max_seconds=max_seconds)
        ends = self._freeze_ends
        try:
            yield count
        except BaseException:
            if self._is_held(ends):
                with contextlib.suppress(VmmError):
                    await self.thaw()
            raise
        if not self._is_held(ends):
            self._is_late = False
            raise self._too_late()
        await self.thaw()

    def _is_held(self, ends: asyncio.Task[None] | None) -> bool:
        """True while the freeze that this task ends is the current one and its time is not up."""
        return self._holds_frozen and self._freeze_ends is ends

    async def freeze(self, *, max_seconds: float = FREEZE_SECONDS) -> int:
        """Write out and freeze the guest's file systems; returns their number. They thaw at the latest after
        `max_seconds`.

        Raises AgentUnavailable, TimedOut; nothing stays frozen then: what cannot be thawed now is thawed as soon as
        the guest answers.
        """
        self._need("backup")
        if not self._holds_frozen and self._freeze_ends is not None:
            await asyncio.wait({self._freeze_ends}, timeout=ANSWER_SECONDS)  # else its thaw would end this freeze
            if not self._freeze_ends.done():
                raise TimedOut("the guest has not thawed yet", machine=self._machine)
        if self._holds_frozen:
            raise AgentUnavailable("the file systems are already frozen", machine=self._machine)
        self._holds_frozen, self._is_late = True, False
        try:
            await self._ask("guest-ping")  # a silent agent would read the request later, and freeze for no caller
            self._is_owed = True
            self._note_owed(True)
            answer = await self._ask("guest-fsfreeze-freeze", seconds=FREEZE_ANSWER_SECONDS)
        except BaseException:
            # Some file systems may have been frozen before the failure, or the freeze may follow after our time-out.
            self._holds_frozen = False
            if self._is_owed:
                thawing = asyncio.ensure_future(self._thaw(give_up_seconds=0.0))
                with contextlib.suppress(VmmError):
                    await asyncio.shield(thawing)
            raise
        self._freeze_ends = asyncio.create_task(self._thaw_after(max_seconds))
        return answer if isinstance(answer, int) else 0

    async def thaw(self) -> int:
        """Thaw what `freeze` froze; returns the number of file systems. Raises TimedOut if they thawed earlier."""
        self._need("backup")
        if self._is_late:
            self._is_late = False
            raise self._too_late()
        if not self._holds_frozen:
            return await self._thaw()
        timer, self._freeze_ends = self._freeze_ends, None
        if timer is None:
            raise AgentUnavailable("the guest is freezing or thawing right now", machine=self._machine)
        timer.cancel()
        try:
            return await self._thaw()
        finally:
            self._holds_frozen = False

    def _too_late(self) -> TimedOut:
        return TimedOut(
            "the guest's file systems thawed before the work was done: its time was up, or the worker died",
            machine=self._machine,
        )

    async def is_frozen(self) -> bool:
        """True if the guest's file systems are frozen. Raises AgentUnavailable, TimedOut."""
        self._need("backup")
        return bool(await self._ask("guest-fsfreeze-status") == "frozen")

    async def _thaw_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)  # a timer, which a thaw in time cancels
        self._holds_frozen, self._is_late = False, True  # what cannot thaw now is thawed by `run`
        with contextlib.suppress(VmmError):
            await self._thaw()

    async def _thaw(self, *, give_up_seconds: float | None = None) -> int:
        """Thaw, with retries, until the guest confirms it or is gone; at the deadline `run` takes over."""
        deadline = self._clock() + (THAW_GIVE_UP_SECONDS if give_up_seconds is None else give_up_seconds)
        while True:
            try:
                answer = await self._ask("guest-fsfreeze-thaw", seconds=THAW_TRY_SECONDS)
                self._has_thawed()
                return answer if isinstance(answer, int) else 0
            except VmmError:
                if not self._is_open or self._clock() >= deadline:
                    self._look_now.set()
                    raise
                await asyncio.sleep(0.2)  # by this object's clock, and the agent may be starting

    # -- requests ---------------------------------------------------------------------------------------------------

    def _need(self, service: Service) -> None:
        if not getattr(self._switches, service):
            raise AgentUnavailable(
                f"the integration service {service.replace('_', '-')} is switched off for this machine",
                machine=self._machine,
            )

    async def _ask(self, command: str, *, seconds: float = ANSWER_SECONDS, **arguments: object) -> Any:
        """Send a command and return the answer. Raises AgentUnavailable, TimedOut."""
        if not self._is_open:
            raise AgentUnavailable(
                "no guest agent has answered yet",
                machine=self._machine,
                hint="is qemu-guest-agent installed and running in the guest?",
            )
        deadline = self._clock() + seconds  # for the whole exchange
        try:
            async with asyncio.timeout(seconds):
                await self._one_at_a_time.acquire()
        except TimeoutError as error:
            raise TimedOut("the guest agent is still busy with another request", machine=self._machine) from error
        try:
            try:
                if self._qmp is None or not self._qmp.is_connected:
                    await self._hang_up()
                    left = max(0.0, deadline - self._clock())
                    self._qmp = await Qmp.connect_agent(self._path, timeout_seconds=left)
                left = max(0.0, deadline - self._clock())
                answer = await self._qmp.execute(command, timeout_seconds=left, **arguments)
            except QemuFailed as error:
                raise AgentUnavailable(error.problem, machine=self._machine) from error
            except AgentUnavailable as error:
                raise AgentUnavailable(error.problem, machine=self._machine, hint=error.hint) from error
            except TimedOut as error:
                problem = f"the guest agent did not answer {command} within {seconds:g} s"
                raise TimedOut(problem, machine=self._machine) from error
            except asyncio.CancelledError:
                # A late answer must not be taken for the answer to another command.
                await asyncio.shield(self._hang_up())
                raise
            self._seen = self._clock()
            return answer
        finally:
            self._one_at_a_time.release()

    async def _hang_up(self) -> None:
        qmp, self._qmp = self._qmp, None
        if qmp is not None:
            await qmp.close()


# -- validation of answers ----------------------------------------------------------------------------------------


def _text(value: object) -> str:
    return value[:MAX_TEXT_CHARACTERS] if isinstance(value, str) else ""


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object, limit: int) -> list[Any]:
    return value[:limit] if isinstance(value, list) else []


def _addresses_of(interface: dict[str, Any]) -> tuple[str, ...]:
    found = []
    for one in _list(interface.get("ip-addresses"), MAX_ADDRESSES):
        entry = _mapping(one)
        address, prefix = _text(entry.get("ip-address")), entry.get("prefix")
        if address:
            found.append(f"{address}/{prefix}" if type(prefix) is int and 0 <= prefix <= 128 else address)
    return tuple(found)
