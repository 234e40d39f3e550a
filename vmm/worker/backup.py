# SPDX-License-Identifier: Apache-2.0
"""A copy of all disks of a machine at one moment, while it runs or not.

Decides the order in which a snapshot is taken, copied and merged away again, and what is left to do after a crash. The
machine's definition does not change meanwhile: a note in its folder (`backup.json`) says that the newest image on each
disk is the one to serve, until it has been merged away.

    note -> guest's file systems frozen -> all disks frozen at one moment (new children take the writes) -> thawed
         -> the frozen chains copied -> children merged into the frozen images while the guest runs -> note removed

Must not know how an image is copied (`vmm.processes.disk_copies`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any

from vmm.host.proc import python_command, python_environment
from vmm.model.errors import VmmError
from vmm.model.paths import MachinePaths
from vmm.model.spec import DiskSpec, MachineSpec
from vmm.processes.disk_copies import (
    check_target,
    copy_disks,
    disks_to_copy,
    error_in,
    parent_words,
    told_when_failed,
)
from vmm.processes.rpc import Progress
from vmm.store.backup_note import Stacked, child_name, has_note, read_note, remove_note, write_note
from vmm.store.snapshots.store import holding

if TYPE_CHECKING:
    from vmm.worker.running import Running

MERGE_SECONDS = 24 * 3600.0
FREEZE_SECONDS = 10.0


class Backup:
    """Backups of a running machine, and the rest of one that was interrupted."""

    def __init__(self, running: Running) -> None:
        self._running = running

    async def take(self, params: dict[str, Any], progress: Progress) -> object:
        """Copy all disks as they are at one moment; {"folder": absolute path}: {"folder", "disks", "consistent"}."""
        running = self._running
        folder = str(params.get("folder", ""))
        with told_when_failed(running.tell, folder):
            target = check_target(folder)
            disks = disks_to_copy(running.spec)
            with running.busy("backup"):
                copies, consistent = await self._take(disks, target, progress)
        running.tell("backed-up", folder=target, consistent=consistent)
        return {"folder": target, "disks": copies, "consistent": consistent}

    async def _take(self, disks: list[DiskSpec], target: str, progress: Progress) -> tuple[dict[str, str], bool]:
        running = self._running
        if has_note(running.machine):
            await self.merge_away(progress)
        children = {disk.id: child_name(str(disk.path)) for disk in disks if not disk.read_only}
        with holding(running.machine, running.spec.name) as held:
            held.need_settled()
            write_note(running.machine, {
                disk.id: Stacked(str(disk.path), children[disk.id]) for disk in disks if disk.id in children
            })  # fmt: skip
        try:
            consistent = await self._freeze(children) if children else True
            copies = await copy_disks(running.machine, running.spec, disks, target, progress, self._is_over)
        finally:
            if not running.exited.is_set():
                await self.merge_away(progress)
        return copies, consistent

    def _is_over(self) -> bool:
        return self._running.exited.is_set() or self._running.gives_way

    async def _freeze(self, children: dict[str, str]) -> bool:
        """All disks at one moment, the guest's file systems written out where its agent can; True when it did."""
        running = self._running
        async with contextlib.AsyncExitStack() as frozen:
            consistent = False
            if running.spec.integration.backup and running.agent.is_open:
                with contextlib.suppress(VmmError):
                    await frozen.enter_async_context(running.agent.frozen(max_seconds=FREEZE_SECONDS))
                    consistent = True
            await running.server.call("snapshot", exports=children)
        return consistent

    async def merge_away(self, progress: Progress) -> None:
        """Merge the children of a backup into the images they stand on, while the guest runs. Raises StoreFailed."""
        running = self._running
        for disk_id, one in read_note(running.machine).items():
            if not os.path.exists(one.child):
                continue
            progress({"step": f"merging {disk_id}"})
            await running.server.call("merge", export=disk_id, into=one.frozen, timeout_seconds=MERGE_SECONDS)
        remove_note(running.machine)


async def merge_away_offline(machine: MachinePaths, spec: MachineSpec) -> None:
    """The same when nothing serves the disks any more. Raises StoreFailed; the next start tries again."""
    for disk_id, one in read_note(machine).items():
        disk = spec.disk(disk_id) or DiskSpec(id=disk_id, path=one.child)
        if not os.path.exists(one.child):
            continue
        process = await asyncio.create_subprocess_exec(
            *python_command("vhdkit", "merge", one.child, "--into", one.frozen, *parent_words(disk), "--json"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=python_environment(),
        )
        _, said = await process.communicate()
        if process.returncode != 0:
            raise error_in(said, disk)
    remove_note(machine)
