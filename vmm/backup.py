# SPDX-License-Identifier: Apache-2.0
"""A copy of all disks of a machine at one moment, while it runs or not.

Decides the order in which a snapshot is taken, copied and merged away again, and what is left to do after a crash. The
machine's definition does not change meanwhile: a note in its folder (`backup.json`) says that the newest image on each
disk is the one to serve, until it has been merged away.

    note -> guest's file systems frozen -> all disks frozen at one moment (new children take the writes) -> thawed
         -> the frozen chains copied -> children merged into the frozen images while the guest runs -> note removed

The copies appear in their folder whole or not at all. Must not know how an image is copied: `vhdkit convert` does this
in a process of its own, so that the worker stays small.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from vmm.backup_note import Stacked, child_name, has_note, read_note, remove_note, write_note
from vmm.errors import AlreadyExists, StoreFailed, VmmError, WrongState, hint_of_vhdkit, of_os_error
from vmm.paths import MachinePaths, sync_folder, write_whole
from vmm.proc import python_command, python_environment
from vmm.rpc import Progress
from vmm.snapshots.store import holding
from vmm.spec import DiskSpec, MachineSpec

if TYPE_CHECKING:
    from vmm.running import Running

MERGE_SECONDS = 24 * 3600.0
FREEZE_SECONDS = 10.0
UEFI_VARIABLES = "uefi-vars.fd"  # in a backup
_MAX_VARIABLES_BYTES = 64 << 20  # of UEFI firmware: some MiB
_LOOK_SECONDS = 0.2


def disks_to_copy(spec: MachineSpec) -> list[DiskSpec]:
    """The images of a machine. Raises Refused for one whose disks cannot be frozen."""
    from vmm.devices import refuse_passed_through

    refuse_passed_through(spec, "a backup", hint="back those up from inside the guest")
    return [disk for disk in spec.disks if disk.kind == "vhd"]


def check_target(folder: str) -> str:
    """The absolute path of a folder that is not there yet, in one that is. Raises AlreadyExists, NotFound."""
    target = os.path.abspath(folder)
    if os.path.lexists(target):
        raise AlreadyExists("is there already", path=target, hint="name a new folder")
    try:
        os.stat(os.path.dirname(target))
    except OSError as error:
        raise of_os_error(error, "use the folder", path=os.path.dirname(target)) from error
    return target


def make_part(target: str, name: str) -> str:
    """A new folder beside the target, in which it is made. Raises AlreadyExists, AccessDenied, NoSpace."""
    part = f"{target}.part"
    try:
        os.mkdir(part, 0o700)
    except FileExistsError as error:  # of somebody else's, or one that is being made: not ours to remove
        raise AlreadyExists(
            "is in the way of the new folder", machine=name, path=part,
            hint="where a backup or export that was interrupted left it: remove it; or name another folder",
        ) from error  # fmt: skip
    except OSError as error:
        raise of_os_error(error, "make the folder", machine=name, path=part) from error
    return part


# -- copying -------------------------------------------------------------------------------------------------------


async def copy_disks(
    machine: MachinePaths,
    spec: MachineSpec,
    disks: list[DiskSpec],
    target: str,
    progress: Progress,
    ended: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Copy these images, the definition and the UEFI variables into a new folder; {"folder", "disks": {id: path}}.

    `ended`: give up when this says so. Raises StoreFailed and its like; nothing is left then.
    """
    variables = uefi_variables_of(machine, spec)  # of the moment that the disks are of
    part = make_part(target, spec.name)
    try:
        copies = {}
        for disk in disks:
            name = f"{disk.id}.vhd"
            await _convert(disk, os.path.join(part, name), progress, ended)
            copies[disk.id] = os.path.join(target, name)
        write_whole(os.path.join(part, "machine.json"), spec.to_json())
        if variables is not None:
            write_whole(os.path.join(part, UEFI_VARIABLES), variables)
        os.rename(part, target)
        sync_folder(os.path.dirname(target))
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise of_os_error(error, "write the backup", machine=spec.name, path=target) from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return {"folder": target, "disks": copies}


def uefi_variables_of(machine: MachinePaths, spec: MachineSpec) -> bytes | None:
    """The UEFI variables as they are now; None where there are none. Raises AccessDenied, VmmError."""
    if spec.firmware != "uefi":
        return None
    try:
        with open(machine.uefi_variables, "rb") as file:
            return file.read(_MAX_VARIABLES_BYTES)
    except FileNotFoundError:
        return None  # it has never been started
    except OSError as error:
        raise of_os_error(error, "read the UEFI variables", path=machine.uefi_variables) from error


async def _convert(disk: DiskSpec, copy: str, progress: Progress, ended: Callable[[], bool]) -> None:
    assert disk.path is not None
    words = ["convert", disk.path, copy, "--to", "dynamic", "--json"]
    words += _parent_words(disk)
    words += ["--format", disk.format] if disk.format is not None else []
    process = await asyncio.create_subprocess_exec(
        *python_command("vhdkit", *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=python_environment(),
        umask=0o077,  # a copy is ours alone
    )
    talking = asyncio.create_task(process.communicate())
    try:
        while not talking.done():
            await asyncio.wait({talking}, timeout=_LOOK_SECONDS)
            progress({"step": f"copying {disk.id}"})
            if ended():
                raise WrongState("was switched off while it was copied, or stops with its host")
    finally:
        if not talking.done():
            process.terminate()
        _, said = await talking
    if process.returncode != 0:
        raise _error_in(said, disk)


def _parent_words(disk: DiskSpec) -> list[str]:
    """Where vhdkit may find the parents of a disk's image."""
    words = [word for folder in disk.parent_dirs for word in ("--allow-parent-dir", folder)]
    return words + (["--allow-raw-parent"] if disk.allow_raw_parent or disk.format == "raw" else [])


def _error_in(said: bytes, disk: DiskSpec) -> VmmError:
    """What vhdkit said."""
    with contextlib.suppress(ValueError, IndexError, KeyError, TypeError):
        told = json.loads(said.strip().splitlines()[-1])["error"]
        problem, hint = str(told.get("problem") or told["message"]), hint_of_vhdkit(told.get("hint"))
        error = StoreFailed(problem, path=told.get("path"), hint=hint)
        error.exit_code = int(told["exit_code"])
        return error
    return StoreFailed("could not be copied", path=disk.path)


@contextlib.contextmanager
def told_when_failed(tell: Callable[..., None], target: str) -> Iterator[None]:
    """An event with the reason when this block ends early, be it by Ctrl-C."""
    try:
        yield
    except VmmError as error:
        tell("backup-failed", folder=target, problem=str(error))
        raise
    except (KeyboardInterrupt, asyncio.CancelledError):
        tell("backup-failed", folder=target, problem="it was interrupted")
        raise


# -- of a running machine --------------------------------------------------------------------------------------------


class Backup:
    """Backups of a running machine, and the rest of one that was interrupted."""

    def __init__(self, running: Running) -> None:
        self._running = running

    async def take(self, params: dict[str, Any], progress: Progress) -> object:
        """Copy all disks as they are at one moment; {"folder": absolute path}."""
        running = self._running
        folder = str(params.get("folder", ""))
        with told_when_failed(running.tell, folder):
            target = check_target(folder)
            disks = disks_to_copy(running.spec)
            with running.busy("backup"):
                result, consistent = await self._take(disks, target, progress)
        running.tell("backed-up", folder=target, consistent=consistent)
        return {**result, "consistent": consistent}

    async def _take(self, disks: list[DiskSpec], target: str, progress: Progress) -> tuple[dict[str, Any], bool]:
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
            result = await copy_disks(running.machine, running.spec, disks, target, progress, self._is_over)
        finally:
            if not running.exited.is_set():
                await self.merge_away(progress)
        return result, consistent

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
            *python_command("vhdkit", "merge", one.child, "--into", one.frozen, *_parent_words(disk), "--json"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=python_environment(),
        )
        _, said = await process.communicate()
        if process.returncode != 0:
            raise _error_in(said, disk)
    remove_note(machine)
