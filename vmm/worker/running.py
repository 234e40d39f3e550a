# SPDX-License-Identifier: Apache-2.0
"""One QEMU and its machine, from start to end, as the worker sees it.

Decides what an event of QEMU means for the machine and what each verb tells QEMU. Which state follows from that, and
which verbs it allows, is decided in `states`.

QEMU stays when the guest powers off (-no-shutdown) until it is told to quit, so an unrequested end is a
crash, whether or not a worker saw it. Must not know who asks, nor what happens after the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from enum import StrEnum
from typing import Any

from vmm.host.proc import ProcessRef
from vmm.kvm.console import ConsoleHub
from vmm.kvm.drives import DiskServer, problem_of_store
from vmm.kvm.guest_agent import GuestAgent
from vmm.kvm.key_value import KeyValueChannel, KeyValueStore, store_path
from vmm.kvm.process import QemuProcess, identity_of, reap, start_qemu
from vmm.kvm.qmp import Event, Qmp
from vmm.kvm.said import in_our_words
from vmm.model.errors import InUse, QemuFailed, StoreFailed, TimedOut, VmmError, WrongState, from_document
from vmm.model.paths import MachinePaths, RuntimePaths, write_whole
from vmm.model.spec import MachineSpec
from vmm.store.state import MachineState, SupervisorNote, WorkerNote, WorkerPhase
from vmm.worker.asking import ask_until_off
from vmm.worker.clock import GuestClock
from vmm.worker.launch import no_adapters, prepare
from vmm.worker.states import Facts, Verb, refuse, state_of

START_SECONDS = 60.0  # from QEMU's start until it answers
STOP_SECONDS = 20.0  # stop and cont wait for requests in flight, whose server may be away
QUIT_SECONDS = 20.0
REACH_SECONDS = 10.0
KNOWN_SECONDS = 5.0  # whoever asks for the status waits twice as long
MEND_SECONDS = (0.3, 0.5, 1.0, 2.0, 3.0)  # between tries to go on
LOOK_SECONDS = 0.05

Tell = Callable[..., None]  # tell(event, **details)


class End(StrEnum):
    """Why a machine ended."""

    POWERED_OFF = "powered-off"  # by the guest
    STOPPED = "stopped"  # by a verb, or a signal to QEMU
    SAVED = "saved"
    CRASHED = "crashed"


class Running:
    """The running machine. For one event loop."""

    def __init__(
        self, spec: MachineSpec, machine: MachinePaths, runtime: RuntimePaths, note: WorkerNote, tell: Tell
    ) -> None:
        self._spec = spec
        self.machine, self.runtime = machine, runtime
        self.note = note
        self.server = DiskServer(runtime)
        self.identity = identity_of(spec.id)
        self.hub = ConsoleHub(runtime.serial, runtime.console, machine.console_log, machine=spec.name)
        self.agent = GuestAgent(
            runtime.agent, spec.integration, machine=spec.name,
            owes=self._note_thaw_owed, is_owed=bool(note.details.get("thaw_owed")), tell=tell,
        )  # fmt: skip
        store = KeyValueStore(store_path(machine.folder))
        self.exchange = KeyValueChannel(runtime.key_value, store, is_on=spec.integration.key_value, machine=spec.name)
        self.clock = GuestClock(self)
        self.plug_adapters = no_adapters
        self.critical_reason: str | None = None
        self.tell = tell
        self._qmp: Qmp | None = None
        self._process: QemuProcess | None = None
        self.exited = asyncio.Event()
        self._end: End | None = None
        self.status = "prelaunch"  # QEMU's word for it
        self._is_known = False  # that word is QEMU's, and no guess
        self._is_stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_mending = False
        self.gives_way = False  # the host stops: long work that can be done another time ends
        self.is_leaving = False  # and from now on nothing new is begun

    # -- what it runs with ---------------------------------------------------------------------------------------

    @property
    def spec(self) -> MachineSpec:
        """The definition that the machine runs with."""
        return self._spec

    def redefine(self, spec: MachineSpec) -> None:
        """The machine runs with this definition from now on; the disk server is started with it. Raises NoSpace.

        The file comes first: the worker that follows a killed one, and the supervisor, know no other.
        """
        write_whole(self.runtime.running, spec.to_json(), durable=False)
        self._spec = spec

    # -- looking -------------------------------------------------------------------------------------------------

    @property
    def state(self) -> MachineState:
        """What the machine is doing."""
        return state_of(Facts(
            self.note.phase, self.status, self._is_known, is_ending=self._is_stopping or self._end is not None,
            is_paused_by_user=self._is_paused_by_user(), operation=self.note.operation,
        ))  # fmt: skip

    def _is_paused_by_user(self) -> bool:
        return bool(self.note.details.get("paused"))

    def document(self) -> dict[str, Any]:
        """All that can be said without asking anybody."""
        started = self.note.started
        heartbeat = self.agent.heartbeat()
        return {
            "state": self.state.value,
            "operation": self.note.operation,
            "reason": self.critical_reason if self.state is MachineState.CRITICAL else None,
            "accelerator": self.note.accelerator,
            "qemu_pid": self.note.qemu.pid if self.note.qemu else None,
            "uptime_seconds": None if started is None else round(time.time() - started, 1),
            "heartbeat": heartbeat.state,
        }

    @property
    def qmp(self) -> Qmp:
        """The monitor. Raises QemuFailed while there is no conversation with it."""
        if self._qmp is None or not self._qmp.is_connected:
            raise QemuFailed("QEMU cannot be reached at the moment", hint="try again")
        return self._qmp

    @property
    def is_reachable(self) -> bool:
        """True while there is a conversation with QEMU."""
        return self._qmp is not None and self._qmp.is_connected

    async def wait_reachable(self) -> None:
        """Return when there is a conversation with QEMU, or none is to be expected soon."""
        deadline = time.monotonic() + REACH_SECONDS
        while not (self._qmp and self._is_known) and self._end is None and self.note.phase is WorkerPhase.RUNNING:
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(LOOK_SECONDS)

    async def wait_known(self) -> None:
        """Return when QEMU has said how the machine is, or does not say it soon: who takes over knows nothing yet."""
        deadline = time.monotonic() + KNOWN_SECONDS
        while not self._is_known and self._end is None and self.note.qemu and self.note.phase is WorkerPhase.RUNNING:
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(LOOK_SECONDS)

    @contextlib.contextmanager
    def busy(self, operation: str) -> Iterator[None]:
        """One operation at a time. Raises InUse while there is another, WrongState when the host stops."""
        if self.is_leaving and operation != "save":
            raise WrongState("is stopping with its host: nothing new is begun")
        if self.note.operation is not None:
            raise InUse(f"is busy with another operation: {self.note.operation}", hint="wait for it to end")
        self.note.operation = operation
        self.write_note()
        try:
            yield
        finally:
            self.note.operation = None
            self.write_note()

    def boot_age_seconds(self) -> float:
        """How long ago the guest was booted; for ever where it came with its memory."""
        booted = self.note.details.get("booted")
        return time.time() - booted if isinstance(booted, int | float) else float("inf")

    @property
    def media(self) -> dict[str, str | None]:
        """What identifies the medium in each drive (`vmm.store.media`); None for an empty drive."""
        found = self.note.details.get("media")
        if not isinstance(found, dict):  # of a worker that did not know of it
            found = self.note.details["media"] = {}
        return found

    def write_note(self) -> None:
        with contextlib.suppress(VmmError):
            self.note.write(self.runtime)

    def _note_thaw_owed(self, is_owed: bool) -> None:
        """Whoever follows us must know that the guest was asked to freeze."""
        self.note.details["thaw_owed"] = is_owed
        self.write_note()

    def need(self, verb: Verb) -> None:
        """Raise WrongState where the state does not allow the verb."""
        refuse(verb, self.state)

    # -- starting ------------------------------------------------------------------------------------------------

    async def launch(
        self, accelerator: str, *, incoming: bool, had_kernel: bool = False, mtus: Mapping[str, int] | None = None
    ) -> None:
        command, launch = await asyncio.to_thread(
            prepare, self.spec, self.machine, self.runtime, accelerator=accelerator, incoming=incoming,
            identity=self.identity, had_kernel=had_kernel, adapters=self.plug_adapters, mtus=mtus or {},
        )  # fmt: skip
        try:
            if not incoming:  # else the guest goes on where it was
                self.hub.mark_start()
            await self.hub.start()  # connected before the guest can say anything
            self.exited.clear()
            self._end = None
            process = start_qemu(command, log_path=self.machine.log("qemu"), descriptors=launch.descriptors)
        finally:
            launch.close()
        self.note.qemu, self.note.accelerator, self.note.started = process.ref, accelerator, time.time()
        self.note.details.pop("paused", None)
        self.note.details["media"] = launch.media
        self.note.details["booted"] = None if incoming else time.time()
        self.write_note()
        self._adopt(process)
        for adapter, (kept, wanted) in launch.kept_mtus.items():
            self.tell("adapter-mtu-kept", adapter=adapter, mtu_bytes=kept or None, switch_mtu_bytes=wanted or None)
        try:
            await self._first_contact()
        except BaseException:
            await self.kill()
            raise
        self._serve_guest()

    async def _first_contact(self) -> None:
        """Wait until QEMU answers. Raises what the disks' server said, what QEMU said, TimedOut."""
        connecting = asyncio.create_task(Qmp.connect(self.runtime.qmp, timeout_seconds=START_SECONDS))
        exited = asyncio.create_task(self.exited.wait())
        try:
            while not connecting.done():
                await asyncio.wait({connecting, exited}, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                supervisor = SupervisorNote.read(self.runtime)
                if supervisor is not None and supervisor.failure is not None:
                    raise from_document(supervisor.failure)
                if exited.done():
                    raise self._refusal()
            self._talk_over(connecting.result())
        except QemuFailed:
            # Both die together when the server does: its reason is the better one.
            await asyncio.sleep(LOOK_SECONDS)
            supervisor = SupervisorNote.read(self.runtime)
            if supervisor is not None and supervisor.failure is not None:
                raise from_document(supervisor.failure) from None
            if self.exited.is_set():  # it hung up before it was seen to end
                raise self._refusal() from None
            raise
        finally:
            exited.cancel()
            if not connecting.done():
                connecting.cancel()
                with contextlib.suppress(asyncio.CancelledError, VmmError):
                    await connecting
        await self.refresh()

    def _refusal(self) -> QemuFailed:
        return self.failed_as_told("QEMU refused the machine")

    async def take_over(self, ref: ProcessRef) -> None:
        """Go on with a QEMU that another worker started. Raises VmmError."""
        await self.hub.start(wait_seconds=1)
        self._adopt(QemuProcess(ref, self.machine.log("qemu")))
        if self.note.details.pop("restoring", None):
            await self.kill()  # half its memory is there; the saved state is whole
            raise QemuFailed(
                "the worker died while it restored the saved memory", hint=f"try again: vmm start {self.spec.name}"
            )
        self._talk_over(None)
        self._serve_guest()

    # -- the process ---------------------------------------------------------------------------------------------

    def _adopt(self, process: QemuProcess) -> None:
        self._process = process
        pidfd = process.ref.open_pidfd()
        if pidfd is None:
            self._has_ended(process)
            return
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            self._has_ended(process)

        loop.add_reader(pidfd, ended)

    def _has_ended(self, process: QemuProcess) -> None:
        status = reap(process.ref)
        if self._end is None:
            self._end = End.CRASHED
            if self.note.phase is not WorkerPhase.STARTING:
                self.tell("qemu-died", status=status, problem=process.last_words())
        self.note.qemu = None
        self.exited.set()

    def failed_as_told(self, what: str, words: str | None = None) -> QemuFailed:
        """`what` happened, for the reason that QEMU gave in these words, or last of all."""
        if words is None and self._process is not None:
            words = self._process.last_words()
        meaning = in_our_words(words or "")
        if meaning is None:
            return QemuFailed(what, hint=f"vmm logs {self.spec.name} --of qemu shows what QEMU said")
        return QemuFailed(f"{what}: {meaning[0]}", hint=meaning[1])

    async def wait_end(self) -> End:
        """Wait until QEMU has ended; why."""
        await self.exited.wait()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        if self._qmp is not None:
            await self._qmp.close()
            self._qmp = None
        await self.agent.close()
        self._is_stopping = False
        self.agent.port_changed(False)
        self.exchange.port_changed(False)
        return self._end or End.CRASHED

    async def quit(self, end: End) -> None:
        """End QEMU in order (it flushes the disks), and surely."""
        if self._end is None:
            self._end = end
        with contextlib.suppress(VmmError):
            await self.qmp.execute("quit", timeout_seconds=STOP_SECONDS)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.exited.wait(), QUIT_SECONDS)
        if not self.exited.is_set():
            self.tell("qemu-killed", problem="it did not quit")
            await self.kill()

    async def kill(self) -> None:
        """End QEMU at once."""
        if self._process is not None and not self.exited.is_set():
            self._end = self._end or End.STOPPED
            await asyncio.to_thread(self._process.ref.kill)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.exited.wait(), QUIT_SECONDS)

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)

        def done(ended: asyncio.Task[None]) -> None:
            self._tasks.discard(ended)
            if not ended.cancelled() and ended.exception() is not None:
                self.tell("internal-error", problem=repr(ended.exception()))

        task.add_done_callback(done)

    def _serve_guest(self) -> None:
        self.in_background(self.agent.run())
        self.in_background(self.exchange.run())

    # -- what QEMU tells -----------------------------------------------------------------------------------------

    def _talk_over(self, qmp: Qmp | None) -> None:
        self._qmp = qmp
        self.in_background(self._talk())

    async def _talk(self) -> None:
        """Listen to QEMU for as long as it lives, connecting again where a conversation broke off."""
        while not self.exited.is_set():
            try:
                if self._qmp is None:
                    self._qmp = await Qmp.connect(self.runtime.qmp)
                    await self.refresh()
                await self._look_at_ports()
                async for event in self._qmp.events():
                    await self._hear(event)
            except VmmError:
                pass
            finally:
                if self._qmp is not None:
                    await self._qmp.close()
                self._qmp = None
            await asyncio.sleep(LOOK_SECONDS)

    async def _look_at_ports(self) -> None:
        """Whether the guest holds its channels open, which is told only when it changes."""
        for device in await self.qmp.execute("query-chardev"):
            self._port_changed(device["label"], bool(device["frontend-open"]))

    def _port_changed(self, port: str, is_open: bool) -> None:
        if port == "agent":
            self.agent.port_changed(is_open)
        elif port == "kvp":
            self.exchange.port_changed(is_open)

    async def _hear(self, event: Event) -> None:
        name, data = event["event"], event.get("data") or {}
        if name == "BLOCK_IO_ERROR":
            reason = "the disk is full" if data.get("nospace") else data.get("reason") or "failed"
            self.critical_reason = f"{data.get('node-name') or data.get('device')}: {data.get('operation')}: {reason}"
        elif name in ("STOP", "RESUME", "SUSPEND", "WAKEUP"):
            await self.refresh()
        elif name == "RESET":
            self.note.details["booted"] = time.time()
            self.tell("reset", by_guest=data.get("guest"))
        elif name == "VSERPORT_CHANGE":
            self._port_changed(str(data.get("id")), bool(data.get("open")))
        elif name == "SHUTDOWN":
            await self._hear_shutdown(str(data.get("reason")))
        elif name == "GUEST_PANICKED":
            self.tell("guest-panicked")

    async def _hear_shutdown(self, reason: str) -> None:
        if self._end is not None:
            return
        self._end = End.STOPPED if reason.startswith("host-") else End.POWERED_OFF
        self.tell("powered-off" if self._end is End.POWERED_OFF else "stopped", by=reason)
        self.in_background(self.quit(self._end))

    async def refresh(self) -> None:
        """Ask QEMU how the machine is, and act on it."""
        before = self.status
        self.status = (await self.qmp.execute("query-status"))["status"]
        self._is_known = True
        if self.status == "running":
            self.note.details.pop("paused", None)
        if self.status == "shutdown":
            await self._hear_shutdown("guest-shutdown")
        elif self.status in ("internal-error", "guest-panicked") and self._end is None:
            self._end = End.CRASHED
            self.tell("qemu-died", problem=f"the guest cannot go on: {self.status}")
            self.in_background(self.quit(End.CRASHED))
        elif self.status == "io-error":
            if before != "io-error":
                self.tell("paused-critical", reason=self.critical_reason)
            if not self._is_mending and not self._is_paused_by_user():
                self._is_mending = True
                self.in_background(self._mend())
        elif before == "io-error" and self.status == "running":
            self.tell("resumed")
            self.clock.bring_to_now("paused-critical")

    async def _mend(self) -> None:
        """Try to go on until it works: the server may come back, the file system may get room again."""
        tries = 0
        try:
            while self.status == "io-error" and not self._is_paused_by_user() and self._end is None:
                await asyncio.sleep(MEND_SECONDS[min(tries, len(MEND_SECONDS) - 1)])
                tries += 1
                problem = await asyncio.to_thread(problem_of_store, self.spec.disks, self.runtime.nbd)
                if problem is not None:
                    self.critical_reason = problem
                elif self.note.operation is None:
                    with contextlib.suppress(VmmError):
                        await self.qmp.execute("cont", timeout_seconds=STOP_SECONDS)
                        await asyncio.sleep(LOOK_SECONDS)  # a disk that fails again does so at once
                        await self.refresh()
        finally:
            self._is_mending = False

    # -- verbs ---------------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """Stand still. Raises WrongState, InUse, QemuFailed, TimedOut."""
        self.need(Verb.PAUSE)
        with self.busy("pause"):
            self.note.details["paused"] = True
            try:
                await self.qmp.execute("stop", timeout_seconds=STOP_SECONDS)
            except VmmError:
                self.note.details.pop("paused", None)
                raise
            await self._ask_whether("paused")  # whoever saves it at once saves it paused
        self.tell("paused")

    async def _ask_whether(self, status: str) -> None:
        """Ask how the machine is after QEMU did what it was told: `status`, where it cannot be asked any more."""
        try:
            await self.refresh()
        except VmmError:
            self.status = status

    async def resume(self) -> None:
        """Go on. Raises WrongState, InUse, StoreFailed while a disk still fails."""
        self.need(Verb.RESUME)
        with self.busy("resume"):
            self.note.details.pop("paused", None)
            await self.qmp.execute("cont", timeout_seconds=STOP_SECONDS)
            await asyncio.sleep(LOOK_SECONDS)
            await self._ask_whether("running")
        if self.status == "io-error":
            raise StoreFailed(f"cannot go on: {self.critical_reason}", hint="it will by itself when the cause is gone")
        self.tell("resumed")
        self.clock.bring_to_now("pause")

    async def reset(self) -> None:
        """As the reset button. Raises WrongState, InUse, QemuFailed."""
        self.need(Verb.RESET)
        with self.busy("reset"):
            await self.qmp.execute("system_reset")

    async def stop(self) -> None:
        """Power off, whatever the guest thinks of it; in every state. What the guest had flushed stays."""
        self._is_stopping = True
        self._end = self._end or End.STOPPED
        self.tell("stopped", by="vmm")
        await self.quit(End.STOPPED)

    async def shutdown(self, timeout_seconds: float, *, beside_others: bool = False) -> None:
        """Have the guest shut itself down, by its agent, else by the power button. Raises TimedOut, WrongState.

        Raises InUse beside another operation, unless `beside_others`: a guest may do so at any time, too.
        """
        self.need(Verb.SHUT_DOWN)
        if self.note.operation is not None and not beside_others:
            raise InUse(f"is busy with another operation: {self.note.operation}", hint="wait for it to end")
        self._is_stopping = True
        try:
            await ask_until_off(self, timeout_seconds)
        except TimeoutError as error:
            raise TimedOut(
                f"the guest did not shut down within {timeout_seconds:g} s",
                hint=f"vmm stop {self.spec.name} powers it off",
            ) from error
        finally:
            self._is_stopping = False
