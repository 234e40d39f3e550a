# SPDX-License-Identifier: Apache-2.0
"""Starting a machine, with its saved memory if there is any, and saving it: memory and devices to disk and back.

Decides the order: what can fail comes before the guest stops; a saved state is complete before QEMU is asked to quit,
and used up before the guest continues. What belongs to a saved state and what is compared is decided in `saved`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

from vmm.kvm import accel, background, tray
from vmm.kvm.qemu_errors import reason_of
from vmm.model.errors import QemuFailed, TimedOut, VmmError
from vmm.model.paths import runtime_home
from vmm.model.spec import MachineSpec
from vmm.model.waiting import async_looks
from vmm.processes.rpc import Progress
from vmm.store import saved
from vmm.store.media import changed_drives
from vmm.worker.adapter_hotplug import announced_mtus
from vmm.worker.conversation import STOP_SECONDS
from vmm.worker.running import START_SECONDS, Running
from vmm.worker.states import End, Verb

_FASTEST_BYTES = 1 << 36  # a second: no limit, because the guest stands still while memory is saved


class Saving:
    """Starting and saving one machine."""

    def __init__(self, running: Running) -> None:
        self._running = running

    async def start(self, progress: Progress) -> None:
        """Start QEMU, with the saved memory if there is any. Raises VmmError; then nothing is left running."""
        evidence = await asyncio.to_thread(accel.gather, cache_folder=runtime_home())
        if not saved.is_saved(self._running.machine):
            await self._running.launch(accel.choose(evidence, self._running.spec.accelerator).name, incoming=False)
            return
        descriptor = -1
        try:
            descriptor, description = await asyncio.to_thread(
                saved.open_saved_memory, self._running.machine, self._running.spec, evidence.qemu_version,
                tell=self._running.tell,
            )  # fmt: skip
            accelerator = accel.choose(evidence, description.accelerator).name
            self._running.note.details["restoring"] = True
            await self._running.launch(
                accelerator, incoming=True, had_kernel=description.had_kernel, mtus=description.mtus
            )
            await self._restore(descriptor, description, progress)
        except VmmError as error:
            error.hint = error.hint or (
                f"the saved state is kept; vmm start {self._running.spec.name} --discard-saved starts without it"
            )
            await self._running.kill()
            raise
        finally:
            if descriptor >= 0:
                os.close(descriptor)
            self._running.note.details.pop("restoring", None)

    async def _restore(self, descriptor: int, description: saved.Description, progress: Progress) -> None:
        await self._running.qmp.send_descriptor("saved", descriptor)
        await self._running.qmp.execute("migrate-incoming", uri="fd:saved", timeout_seconds=STOP_SECONDS)
        async for _ in async_looks():
            if self._running.exited.is_set():
                raise self._running.failure_with_reason("the saved memory cannot be restored")
            try:
                migration = await self._running.qmp.execute("query-migrate")
            except QemuFailed:
                continue  # it is about to end, and its last message gives the reason
            if migration.get("status") == "completed":
                break
            if migration.get("status") == "failed":
                raise self._running.failure_with_reason(
                    "the saved memory cannot be restored", migration.get("error-desc")
                )
            done = os.lseek(descriptor, 0, os.SEEK_CUR)
            progress({"step": "restoring memory", "done": done, "total": description.memory_file_bytes})
        await self._tell_of_other_media(description)
        saved.use_up(self._running.machine)
        if description.was_running:
            await self._running.qmp.execute("cont", timeout_seconds=STOP_SECONDS)
            self._running.clock.bring_to_now("restore")
        else:
            self._running.note.details["paused"] = True
        await self._running.refresh()

    async def _tell_of_other_media(self, description: saved.Description) -> None:
        """Show the guest that a drive has another medium, so that it does not use cached data of the old one."""
        running = self._running
        for drive_id in changed_drives(running.spec, description.media, description.accepted, running.media):
            await tray.tell_guest(running.qmp, drive_id)
            running.tell("medium-changed", drive=drive_id, path=_path_of(running.spec, drive_id))

    async def finish_interrupted(self) -> None:
        """After a worker died while it saved: continue without saving, or end QEMU if everything was saved."""
        if self._running.note.operation != "save":
            self._running.note.operation = None
            return
        if saved.is_saved(self._running.machine):
            await self._running.quit(End.SAVED)
            return
        async for _ in async_looks(START_SECONDS):
            if self._running.exited.is_set():
                break
            with contextlib.suppress(VmmError):
                await self._running.qmp.execute("migrate_cancel")
                if self._running.note.details.pop("was_running", False):
                    await self._running.qmp.execute("cont", timeout_seconds=STOP_SECONDS)
                    self._running.clock.bring_to_now("save")
                break
        saved.discard_part(self._running.machine)
        self._running.note.operation = None
        self._running.write_note()
        self._running.tell("save-failed", problem="the worker died while it saved the machine")

    async def save(self, progress: Progress, *, give_up_at: float | None = None) -> None:
        """Save memory and devices to disk, then switch off. After an error the machine continues.

        `give_up_at` (of the monotonic clock): stop saving if the memory is not written by then. Raises NoSpace,
        TimedOut and other VmmErrors.
        """
        self._running.need(Verb.SAVE)
        with self._running.busy("save"):
            await self._running.refresh()
            was_running = self._running.status == "running"
            version = (await self._running.qmp.execute("query-version"))["qemu"]
            mtus = await announced_mtus(self._running.qmp, self._running.spec)
            descriptor = await asyncio.to_thread(saved.open_memory_file, self._running.machine, self._running.spec)
            self._running.note.details["was_running"] = was_running
            self._running.write_note()
            try:
                if was_running:
                    await self._running.qmp.execute("stop", timeout_seconds=STOP_SECONDS)
                await self._write_memory(descriptor, progress, give_up_at)
                await asyncio.to_thread(
                    saved.complete, self._running.machine, descriptor, self._running.spec,
                    qemu_version=f"{version['major']}.{version['minor']}.{version['micro']}",
                    accelerator=str(self._running.note.accelerator), was_running=was_running,
                    media=self._running.media, mtus=mtus,
                )  # fmt: skip
            except BaseException:
                saved.discard_part(self._running.machine)
                with contextlib.suppress(VmmError):
                    await self._running.qmp.execute("migrate_cancel")
                if was_running:
                    await self._let_go_on()
                raise
            finally:
                os.close(descriptor)
            self._running.tell("saved")
            await self._running.quit(End.SAVED)

    async def _let_go_on(self) -> None:
        """Resume the guest. A migration that is being cancelled may refuse this for a moment."""
        async for _ in async_looks(STOP_SECONDS):
            if self._running.exited.is_set():
                return
            with contextlib.suppress(VmmError):
                await self._running.qmp.execute("cont", timeout_seconds=STOP_SECONDS)
                self._running.clock.bring_to_now("save")
                return

    async def _write_memory(self, descriptor: int, progress: Progress, give_up_at: float | None) -> None:
        qmp = self._running.qmp
        await qmp.execute("migrate-set-parameters", max_bandwidth=_FASTEST_BYTES)
        await qmp.send_descriptor("saved", descriptor)
        await qmp.execute("migrate", uri="fd:saved", timeout_seconds=STOP_SECONDS)
        async for _ in async_looks():
            migration = await qmp.execute("query-migrate", timeout_seconds=STOP_SECONDS)
            status = migration.get("status")
            if status == "completed":
                await background.check_written(qmp, descriptor, os.lseek(descriptor, 0, os.SEEK_CUR))
                return
            if status in ("failed", "cancelled"):
                reason = reason_of(migration)
                raise QemuFailed(f"the memory could not be saved: {reason}")
            if give_up_at is not None and time.monotonic() > give_up_at:
                raise TimedOut("not enough time is left to write all the memory")
            if ram := migration.get("ram"):
                progress({"step": "saving memory", "done": ram["total"] - ram["remaining"], "total": ram["total"]})


def _path_of(spec: MachineSpec, drive_id: str) -> str | None:
    drive = spec.disk(drive_id)
    return None if drive is None else drive.path
