# SPDX-License-Identifier: Apache-2.0
"""One QEMU and its machine, from start to end, as the worker sees it.

Decides which commands QEMU gets for each verb, and that only one operation is in progress at a time. Which state the
machine is in, and which verbs that allows, is decided in `states`, what QEMU's reports mean in `conversation`.

When the guest powers off, QEMU stays (-no-shutdown) until the worker has it quit. So an unrequested end is a crash,
whether or not a worker saw it. Must not know the origin of a request, nor what happens after the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any

from vmm.host.proc import ProcessRef
from vmm.kvm.console import ConsoleHub
from vmm.kvm.drives import DiskServer
from vmm.kvm.guest_agent import GuestAgent
from vmm.kvm.key_value import KeyValueChannel, KeyValueStore, store_path
from vmm.kvm.process import QemuProcess, identity_of, reap, start_qemu
from vmm.kvm.qemu_errors import explain
from vmm.kvm.qmp import Qmp
from vmm.model.errors import InUse, QemuFailed, StoreFailed, TimedOut, VmmError, WrongState, from_document
from vmm.model.paths import MachinePaths, RuntimePaths, write_whole
from vmm.model.spec import MachineSpec
from vmm.model.waiting import LOOK_SECONDS, async_becomes
from vmm.store.state import MachineState, SupervisorNote, WorkerNote, WorkerPhase
from vmm.worker.asking import ask_until_off
from vmm.worker.clock import GuestClock
from vmm.worker.conversation import SOON_SECONDS, STOP_SECONDS, Conversation
from vmm.worker.launch import no_adapters, prepare
from vmm.worker.states import End, Facts, Verb, refuse, state_of

START_SECONDS = 60.0  # from QEMU's start until it answers
QUIT_SECONDS = 20.0
REACH_SECONDS = 10.0
KNOWN_SECONDS = 5.0  # callers that query the status wait twice as long

Tell = Callable[..., None]  # tell(event, **details)


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
        self.filling: dict[str, Any] | None = None  # how far the disks are filled from a backup (`filling`)
        self.plug_adapters = no_adapters
        self.tell = tell
        self.conversation = Conversation(self)
        self._process: QemuProcess | None = None
        self.exited = asyncio.Event()
        self.end: End | None = None  # why QEMU is ending or has ended
        self._is_stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_leaving = False  # the stop action has begun: no new operation is accepted

    # -- what it runs with ---------------------------------------------------------------------------------------

    @property
    def spec(self) -> MachineSpec:
        """The definition that the machine runs with."""
        return self._spec

    def redefine(self, spec: MachineSpec) -> None:
        """Run with this definition from now on; a restarted disk server uses it too. Raises NoSpace.

        The file is written first: the supervisor and the successor of a killed worker read only the file.
        """
        write_whole(self.runtime.running, spec.to_json(), durable=False)
        self._spec = spec

    # -- looking -------------------------------------------------------------------------------------------------

    @property
    def state(self) -> MachineState:
        """What the machine is doing."""
        return state_of(Facts(
            self.note.phase, self.status, self.conversation.is_known,
            is_ending=self._is_stopping or self.end is not None,
            is_paused_by_user=self.is_paused_by_user, operation=self.note.operation,
        ))  # fmt: skip

    @property
    def is_paused_by_user(self) -> bool:
        """True from `pause` until the guest runs again."""
        return bool(self.note.details.get("paused"))

    @property
    def status(self) -> str:
        """QEMU's status, in QEMU's own term, as last reported."""
        return self.conversation.status

    def document(self) -> dict[str, Any]:
        """The status, as far as it is known without a query to QEMU or the guest."""
        started = self.note.started
        heartbeat = self.agent.heartbeat()
        return {
            "state": self.state.value,
            "operation": self.note.operation,
            "reason": self.conversation.critical_reason if self.state is MachineState.CRITICAL else None,
            "accelerator": self.note.accelerator,
            "qemu_pid": self.note.qemu.pid if self.note.qemu else None,
            "uptime_seconds": None if started is None else round(time.time() - started, 1),
            "heartbeat": heartbeat.state,
            "filling": self.filling,
        }

    @property
    def qmp(self) -> Qmp:
        """The monitor. Raises QemuFailed while it is not connected."""
        return self.conversation.qmp

    @property
    def is_reachable(self) -> bool:
        """True while QEMU's monitor is connected."""
        return self.conversation.is_open

    async def wait_reachable(self) -> None:
        """Wait until QEMU's monitor is connected, or until no connection can be expected soon."""

        def is_decided() -> bool:
            return self.conversation.has_begun or self.end is not None or self.note.phase is not WorkerPhase.RUNNING

        await async_becomes(is_decided, REACH_SECONDS)

    async def wait_known(self) -> None:
        """Wait for QEMU's first status, for a limited time: a worker that takes over does not know it at first."""

        def is_decided() -> bool:
            if self.conversation.is_known or self.end is not None:
                return True
            return not self.note.qemu or self.note.phase is not WorkerPhase.RUNNING

        await async_becomes(is_decided, KNOWN_SECONDS)

    @contextlib.contextmanager
    def busy(self, operation: str) -> Iterator[None]:
        """Allow one operation at a time. Raises InUse during another one, WrongState while the host is stopping."""
        if self.is_leaving and operation != "save":
            raise WrongState("is stopping with its host: no new operation can begin")
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
        """How long ago the guest was booted; infinity if its memory was restored."""
        booted = self.note.details.get("booted")
        return time.time() - booted if isinstance(booted, int | float) else float("inf")

    @property
    def media(self) -> dict[str, str | None]:
        """What identifies the medium in each drive (`vmm.store.media`); None for an empty drive."""
        found = self.note.details.get("media")
        if not isinstance(found, dict):  # written by an earlier release without this entry
            found = self.note.details["media"] = {}
        return found

    def write_note(self) -> None:
        with contextlib.suppress(VmmError):
            self.note.write(self.runtime)

    def _note_thaw_owed(self, is_owed: bool) -> None:
        """Record for the next worker that the guest was asked to freeze."""
        self.note.details["thaw_owed"] = is_owed
        self.write_note()

    def need(self, verb: Verb) -> None:
        """Raise WrongState if the state does not allow the verb."""
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
            if not incoming:  # otherwise the guest continues where it was
                self.hub.mark_start()
            await self.hub.start()  # connected before the guest can write anything
            self.exited.clear()
            self.end = None
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
        """Wait until QEMU answers. Raises the error of the disk server, that of QEMU, or TimedOut."""
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
            self.conversation.begin(connecting.result())
        except QemuFailed:
            # If the server dies, QEMU dies with it: the server's reason is more useful.
            await asyncio.sleep(SOON_SECONDS)  # for the reason to be written down
            supervisor = SupervisorNote.read(self.runtime)
            if supervisor is not None and supervisor.failure is not None:
                raise from_document(supervisor.failure) from None
            if self.exited.is_set():  # it disconnected before its end was noticed
                raise self._refusal() from None
            raise
        finally:
            exited.cancel()
            if not connecting.done():
                connecting.cancel()
                with contextlib.suppress(asyncio.CancelledError, VmmError):
                    await connecting
        await self.refresh()

    async def refresh(self) -> None:
        """Query QEMU's status, and act on it. Raises QemuFailed, TimedOut."""
        await self.conversation.refresh()

    def _refusal(self) -> QemuFailed:
        return self.failure_with_reason("QEMU refused the machine")

    async def take_over(self, ref: ProcessRef) -> None:
        """Take over a QEMU that another worker started. Raises VmmError."""
        await self.hub.start(wait_seconds=1)
        self._adopt(QemuProcess(ref, self.machine.log("qemu")))
        if self.note.details.pop("restoring", None):
            await self.kill()  # its memory is incomplete; the saved state is intact
            raise QemuFailed(
                "the worker died while it restored the saved memory", hint=f"try again: vmm start {self.spec.name}"
            )
        self.conversation.begin(None)
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
        if self.end is None:
            self.end = End.CRASHED
            if self.note.phase is not WorkerPhase.STARTING:
                self.tell("qemu-died", status=status, problem=process.last_words())
        self.note.qemu = None
        self.exited.set()

    def failure_with_reason(self, what: str, words: str | None = None) -> QemuFailed:
        """The error `what`, with the reason that QEMU gave in `words`, or else in its last message."""
        if words is None and self._process is not None:
            words = self._process.last_words()
        meaning = explain(words or "")
        if meaning is None:
            return QemuFailed(what, hint=f"vmm logs {self.spec.name} --of qemu shows what QEMU said")
        return QemuFailed(f"{what}: {meaning[0]}", hint=meaning[1])

    async def wait_end(self) -> End:
        """Wait until QEMU has ended; returns why."""
        await self.exited.wait()
        while self._tasks:  # repeated: a task may miss a cancellation that arrives together with a connection's end
            for task in list(self._tasks):
                task.cancel()
            await asyncio.wait(set(self._tasks), timeout=LOOK_SECONDS)
        await self.conversation.close()
        await self.agent.close()
        self._is_stopping = False
        self.agent.port_changed(False)
        self.exchange.port_changed(False)
        return self.end or End.CRASHED

    async def quit(self, end: End) -> None:
        """End QEMU cleanly, so that it flushes the disks; kill it if it does not quit."""
        if self.end is None:
            self.end = end
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
            self.end = self.end or End.STOPPED
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

    # -- verbs ---------------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """Pause the guest. Raises WrongState, InUse, QemuFailed, TimedOut."""
        self.need(Verb.PAUSE)
        with self.busy("pause"):
            self.note.details["paused"] = True
            try:
                await self.qmp.execute("stop", timeout_seconds=STOP_SECONDS)
            except VmmError:
                self.note.details.pop("paused", None)
                raise
            await self.conversation.refresh_or_assume("paused")  # an immediate save then records it as paused
        self.tell("paused")

    async def resume(self) -> None:
        """Resume the guest. Raises WrongState, InUse, StoreFailed while a disk still fails."""
        self.need(Verb.RESUME)
        with self.busy("resume"):
            self.note.details.pop("paused", None)
            await self.qmp.execute("cont", timeout_seconds=STOP_SECONDS)
            await asyncio.sleep(SOON_SECONDS)  # a disk that fails again does so at once
            await self.conversation.refresh_or_assume("running")
        if self.status == "io-error":
            raise StoreFailed(
                f"cannot continue: {self.conversation.critical_reason}",
                hint="it continues by itself when the cause is gone",
            )
        self.tell("resumed")
        self.clock.bring_to_now("pause")

    async def reset(self) -> None:
        """Reset the machine, as with a reset button. Raises WrongState, InUse, QemuFailed."""
        self.need(Verb.RESET)
        with self.busy("reset"):
            await self.qmp.execute("system_reset")

    async def stop(self) -> None:
        """Power off without asking the guest, in any state. Data that the guest has flushed is kept."""
        self._is_stopping = True
        self.end = self.end or End.STOPPED
        self.tell("stopped", by="vmm")
        await self.quit(End.STOPPED)

    async def shutdown(self, timeout_seconds: float, *, beside_others: bool = False) -> None:
        """Have the guest shut down, through its agent or else the power button. Raises TimedOut, WrongState.

        Raises InUse during another operation, unless `beside_others`: a guest may shut down at any time anyway.
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
