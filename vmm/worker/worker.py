# SPDX-License-Identifier: Apache-2.0
"""The worker: one process for each running machine, from its start until it is off and everything is cleaned up.

Decides what the control socket offers, what happens after QEMU ends (recovery, or off), how the successor of a killed
worker continues, and what happens to a machine that can no longer be reached. What a verb means for QEMU is decided
in `running`, what it means for disks in `disk_hotplug`.

    python -m vmm.worker.worker MACHINE-FOLDER RUNTIME-FOLDER [READY-DESCRIPTOR]

On the ready descriptor it reports the progress of the start, one JSON object a line: {"progress": ...}, and finally
{"result": ...} or {"error": ...}.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict
from typing import Any

from vmm.host.private_socket import bind_private
from vmm.host.proc import Lock, ProcessRef, python_command, python_environment, spawn_detached
from vmm.model.errors import VmmError, of_os_error, to_document
from vmm.model.events import add_event
from vmm.model.paths import MachinePaths, RuntimePaths
from vmm.processes.rpc import ControlServer, Method, Progress, parameter
from vmm.snapshots import background_merge as fold
from vmm.store import registry, saved
from vmm.store.snapshots.store import has_tree
from vmm.store.state import (
    ENDING_SIGNALS,
    SERVER_END_SIGNAL,
    SupervisorNote,
    WorkerNote,
    WorkerPhase,
    is_leaving,
    note_clean,
    note_running,
    note_unclean,
)
from vmm.worker.adapter_hotplug import Wiring
from vmm.worker.backup import Freezes
from vmm.worker.capture import Capture
from vmm.worker.disk_hotplug import Plugging
from vmm.worker.filling import Filler
from vmm.worker.guest_services import GuestServices
from vmm.worker.leaving import HOST_SECONDS, SIGNAL_SECONDS, Leaving
from vmm.worker.live_merge import LiveMerges
from vmm.worker.recovery import Recovery
from vmm.worker.running import Running
from vmm.worker.saving import Saving
from vmm.worker.states import End
from vmm.worker.supervision import Supervision

SHUTDOWN_SECONDS = 120.0  # for a guest to shut down, unless the caller sets another limit
SERVER_END_SECONDS = 60.0
MAX_RECOVERIES, RECOVERY_WINDOW_SECONDS = 3, 60.0  # a machine that crashes at once is not restarted forever


class Worker:
    """The worker of one machine."""

    def __init__(self, machine: MachinePaths, runtime: RuntimePaths, ready: int | None) -> None:
        self._machine = machine
        self._runtime = runtime
        self._ready = ready
        self._spec = registry.read_definition(runtime.running)
        self._note = WorkerNote.read(runtime) or WorkerNote()
        self._found = self._note.qemu if self._note.qemu is not None and self._note.qemu.is_alive() else None
        self._lost = self._note.qemu is not None and self._found is None and self._note.phase is WorkerPhase.RUNNING
        self._note.worker = ProcessRef.of_self()
        if self._found is None:
            self._note.qemu = None
            self._note.operation = None  # it ended with QEMU and its worker
        self._running = Running(self._spec, machine, runtime, self._note, self._tell)
        self._saving = Saving(self._running)
        self._leaving = Leaving(self._running, self._saving)
        self._supervision = Supervision(machine, runtime, self._tell, self._reachable_no_more)
        self._plugging = Plugging(self._running)
        self._freezes = Freezes(self._running, self._plugging)
        self._filler = Filler(self._running, self._plugging)
        self._recovery = Recovery(self._running)
        self._capture = Capture(self._running, self._plugging)
        self._merges = LiveMerges(self._running)
        self._rest: asyncio.Task[None] | None = None  # settles what an earlier worker had begun
        self._wiring = Wiring(self._running)
        self._off = asyncio.Event()  # everything of the machine is cleaned up
        self._problem: VmmError | None = None  # what went wrong with the disks at the end
        self._recoveries: list[float] = []
        self._is_clean = False  # the guest shut itself down
        self._reverts = False  # it is reverted to its snapshot once everything is cleaned up
        self._control = ControlServer(self._methods(), on_crash=self._log)

    # -- reporting -----------------------------------------------------------------------------------------------

    def _tell(self, event: str, **details: object) -> None:
        add_event(self._machine.events, event, **details)

    def _log(self, text: str) -> None:
        """Write to the worker's own log, which is its standard error."""
        with contextlib.suppress(OSError):
            os.write(2, text.encode() + b"\n")

    def _report(self, **document: object) -> None:
        """Report to the command that waits for the start."""
        if self._ready is None:
            return
        with contextlib.suppress(OSError):
            os.write(self._ready, json.dumps(document).encode() + b"\n")
        if "progress" not in document:
            os.close(self._ready)
            self._ready = None

    # -- from start to end ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run from the start, or from where another worker was killed, until the machine is off."""
        for number in ENDING_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._leave_for_signal, signal.Signals(number).name)
        self._note.write(self._runtime)
        if is_leaving(self._runtime):
            self._leave_for_signal("a signal to the previous worker")
        await self._control.start(bind_private(self._runtime.control))
        watch = asyncio.gather(*self._supervision.watches())
        switches = asyncio.create_task(self._wiring.watch())
        try:
            end = await self._first_end()
            while end is End.CRASHED and self._may_recover():
                self._tell("recovery", action="restart")
                await self._recovery.finish_interrupted()  # the disk server still knows which images are the newest
                try:
                    self._note.phase = WorkerPhase.STARTING
                    await self._begin()
                except VmmError as error:
                    self._tell("start-failed", problem=str(error))
                    break
                end = await self._running.wait_end()
            self._is_clean = end is End.POWERED_OFF
            is_lost = end is End.CRASHED and not self._leaving.has_begun
            self._reverts = is_lost and self._spec.automatic.recovery == "revert"
        finally:
            switches.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await switches
            await self._put_away(watch)

    async def _first_end(self) -> End:
        """Start or take over, and wait for the end; returns at once if the machine cannot be started."""
        try:
            if self._found is not None:
                self._tell("taken-over")
                await self._running.take_over(self._found)
                await self._plugging.finish_interrupted()
                await self._saving.finish_interrupted()
                self._running_now()
            elif self._lost:
                self._tell("qemu-died", problem="while no worker was running")
                return End.CRASHED
            elif self._note.phase is WorkerPhase.ENDED:
                return End.STOPPED
            else:
                await self._begin()
                self._tell("started", accelerator=self._note.accelerator)
            self._report(result={**self._running.document(), "disconnected": self._wiring.disconnected()})
            self._rest = asyncio.create_task(self._settle_rest())
        except VmmError as error:
            error.machine = error.machine or self._spec.name
            self._tell("start-failed", problem=str(error))
            self._report(error=to_document(error))
            return End.STOPPED
        return await self._running.wait_end()

    async def _settle_rest(self) -> None:
        async with self._filler.paused(within_seconds=math.inf):
            await self._recovery.finish_interrupted()

    async def _begin(self) -> None:
        note_unclean(self._machine)
        await self._saving.start(lambda document: self._report(progress=document))
        await self._wiring.set_links()
        self._running_now()

    def _running_now(self) -> None:
        note_running(self._machine, True)
        self._note.phase = WorkerPhase.RUNNING
        with contextlib.suppress(VmmError):
            self._note.write(self._runtime)
        self._running.in_background(self._filler.run())

    def _may_recover(self) -> bool:
        """True if the current definition asks for a restart, up to a limit; never while the host is stopping."""
        if self._leaving.has_begun:
            return False
        with contextlib.suppress(VmmError):
            self._spec = registry.read_definition(self._machine.definition)
        if self._spec.automatic.recovery != "restart":
            return False
        now = time.monotonic()
        self._recoveries = [then for then in self._recoveries if now - then < RECOVERY_WINDOW_SECONDS] + [now]
        if len(self._recoveries) > MAX_RECOVERIES:
            self._tell("recovery-given-up", problem=f"{MAX_RECOVERIES} times within {RECOVERY_WINDOW_SECONDS:.0f} s")
            return False
        return True

    async def _put_away(self, watch: asyncio.Future[Any]) -> None:
        """Have the disk server flush and end, answer waiting callers, then end. The supervisor does the rest."""
        note_running(self._machine, self._leaving.has_begun)  # if the host stopped it, the host also restarts it
        self._note.phase = WorkerPhase.ENDED
        with contextlib.suppress(VmmError):
            self._note.write(self._runtime)
        try:
            await self._end_server()
            if self._is_clean:
                note_clean(self._machine)
            await asyncio.to_thread(saved.note_disks, self._machine, self._running.spec)
            await asyncio.to_thread(self._start_merging)
        except VmmError as error:
            self._problem = error
            self._tell("disks-failed", problem=str(error))
        await self._wiring.put_away()
        self._tell("off")
        self._off.set()
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        await self._running.hub.close()
        await self._control.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._runtime.control)
        if self._reverts:
            with contextlib.suppress(OSError):
                spawn_detached(
                    python_command("vmm.api.revert", self._machine.folder),
                    log_path=self._machine.log("worker"),
                    environment=python_environment(),
                )

    def _start_merging(self) -> None:
        """Merge what deleted snapshots left, in a separate process, which waits until this one ends."""
        if has_tree(self._machine) and not saved.is_saved(self._machine):
            with contextlib.suppress(OSError):
                fold.spawn(self._machine, self._runtime)

    async def _end_server(self) -> None:
        supervisor = self._supervision.note()
        server = supervisor.server if supervisor is not None else None
        if server is None or not server.is_alive():
            return
        try:
            await self._running.server.call("shutdown")
        except VmmError:  # it is not listening yet, or has just ended
            server.send(SERVER_END_SIGNAL)
        if not await asyncio.to_thread(server.wait, SERVER_END_SECONDS):
            await asyncio.to_thread(server.end, 1.0, SERVER_END_SIGNAL)

    async def _reachable_no_more(self) -> None:
        """Save the machine, or else power it off: without the runtime folder, commands can no longer find it."""
        self._tell("runtime-folder-gone", problem="the machine can no longer be reached: it is saved")
        try:
            await self._saving.save(lambda document: None)
        except VmmError as error:
            self._tell("save-failed", problem=str(error))
            await self._running.stop()

    def _leave_for_signal(self, name: str) -> None:
        """Carry out the stop action: the host is stopping, or the session that started the machine is ending."""
        self._leaving.begin(name, SIGNAL_SECONDS, lambda: self._rest)

    # -- what the control socket offers --------------------------------------------------------------------------

    def _methods(self) -> dict[str, Method]:
        """All methods; those that need QEMU wait until its monitor is connected."""
        methods: dict[str, Method] = {
            "pause": self._pause,
            "resume": self._resume,
            "reset": self._reset,
            "stop": self._stop,
            "shutdown": self._shutdown,
            **self._wiring.methods(),
            **{name: self._filler.before(method) for name, method in self._recovery.methods().items()},
            **GuestServices(self._running).methods(),
        }
        if_settled: dict[str, Method] = {
            "save": self._save,
            "leave": self._leave,
            "backup-freeze": self._freezes.freeze,
            **self._plugging.methods(),
            **self._capture.methods(),
            **self._merges.methods(),
        }
        for name in ("disk-status", "snapshot-merge-cancel"):  # they only inspect, or end what settling waits for
            methods[name] = if_settled.pop(name)
        # The host stops: a filling that hangs with its repository ends with the disk server.
        methods["leave"] = self._recovery.before(if_settled.pop("leave"))
        methods |= {name: self._filler.before(self._recovery.before(method)) for name, method in if_settled.items()}
        return {"status": self._status, **{name: self._when_reachable(method) for name, method in methods.items()}}

    def _when_reachable(self, method: Method) -> Method:
        async def called(params: dict[str, Any], progress: Progress) -> object:
            await self._running.wait_reachable()
            return await method(params, progress)

        return called

    async def _status(self, params: dict[str, Any], progress: Progress) -> object:
        """The status of the machine; {"guest": true} queries the guest's agent too."""
        await self._running.wait_known()
        document = self._running.document()
        if parameter(params, "guest", bool, False) and self._running.agent.is_open:
            document["guest"] = asdict(await self._running.agent.summary())
        return {**document, "worker_pid": os.getpid()}

    async def _pause(self, params: dict[str, Any], progress: Progress) -> object:
        await self._running.pause()
        return self._running.document()

    async def _resume(self, params: dict[str, Any], progress: Progress) -> object:
        await self._running.resume()
        return self._running.document()

    async def _reset(self, params: dict[str, Any], progress: Progress) -> object:
        await self._running.reset()
        return self._running.document()

    async def _stop(self, params: dict[str, Any], progress: Progress) -> object:
        await self._running.stop()
        return await self._when_off(progress)

    async def _shutdown(self, params: dict[str, Any], progress: Progress) -> object:
        seconds = float(parameter(params, "seconds", int | float, SHUTDOWN_SECONDS))
        alive = asyncio.create_task(_signs_of_life(progress, "shutting down"))
        try:
            await self._running.shutdown(seconds)
        finally:
            alive.cancel()
        return await self._when_off(progress)

    async def _save(self, params: dict[str, Any], progress: Progress) -> object:
        await self._saving.save(progress)
        return await self._when_off(progress)

    async def _leave(self, params: dict[str, Any], progress: Progress) -> object:
        """Carry out the automatic stop action, because the host is stopping; {"done": "saved" and the like}."""
        alive = asyncio.create_task(_signs_of_life(progress, "stopping with the host"))
        try:
            done = await asyncio.shield(self._leaving.begin("vmm", HOST_SECONDS, lambda: self._rest))
        finally:
            alive.cancel()
        await self._when_off(progress)
        return {"done": done}

    async def _when_off(self, progress: Progress) -> object:
        """Answer once the disks are released. Raises the error that occurred with them."""
        alive = asyncio.create_task(_signs_of_life(progress, "closing the disks"))
        try:
            await self._off.wait()
        finally:
            alive.cancel()
        if self._problem is not None:
            raise self._problem
        return {"state": "saved" if saved.is_saved(self._machine) else "off"}


async def _signs_of_life(progress: Progress, step: str) -> None:
    """Report every second, so that the waiting caller knows that the worker is alive."""
    while True:
        await asyncio.sleep(1)  # the rate of the reports
        progress({"step": step})


def _is_supervisors(runtime: RuntimePaths) -> bool:
    """True if the supervisor of this folder started this process."""
    note = SupervisorNote.read(runtime)
    return note is not None and note.supervisor is not None and note.supervisor.pid == os.getppid()


def main() -> None:
    """Entry point of the process."""
    machine, runtime = MachinePaths(sys.argv[1]), RuntimePaths(sys.argv[2])
    ready = int(sys.argv[3]) if len(sys.argv) > 3 else None
    if ready is not None:
        os.set_inheritable(ready, False)
    os.chdir("/")
    os.umask(0o077)
    if ready is None and WorkerNote.read(runtime) is None and not _is_supervisors(runtime):
        return  # the machine that was to be run is gone, and another start has taken its folder
    lock = Lock(runtime.lock("worker"))
    try:
        if not lock.try_take():
            return  # another worker is already running
    except FileNotFoundError:
        return  # the folder is gone, and so is the machine
    try:
        asyncio.run(Worker(machine, runtime, ready).run())
    except Exception as error:
        traceback.print_exc()
        problem = error if isinstance(error, VmmError) else VmmError(f"internal error: {error!r}")
        if isinstance(error, OSError):
            problem = of_os_error(error, "run the machine")
        add_event(machine.events, "worker-failed", problem=str(problem))
        if ready is not None:
            with contextlib.suppress(OSError):
                os.write(ready, json.dumps({"error": to_document(problem)}).encode() + b"\n")
            note = WorkerNote.read(runtime) or WorkerNote()
            if note.qemu is None:  # nothing is running: another start would fail again
                note.phase = WorkerPhase.ENDED
                with contextlib.suppress(VmmError):
                    note.write(runtime)


if __name__ == "__main__":
    main()
