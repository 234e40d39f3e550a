# SPDX-License-Identifier: Apache-2.0
"""Copies of a machine's disks in a new folder, which appears complete or not at all.

Decides what the folder contains and what it is called while it is being written. Must not know how the disks are kept
from changing meanwhile, nor how an image is copied: a separate `vhdkit convert` process does that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator

from vmm.host.proc import python_command, python_environment
from vmm.model.errors import AlreadyExists, StoreFailed, VmmError, WrongState, hint_of_vhdkit, of_os_error
from vmm.model.formats import child_format
from vmm.model.paths import MachinePaths, sync_folder, write_whole
from vmm.model.spec import DiskSpec, MachineSpec
from vmm.processes.rpc import Progress

UEFI_VARIABLES = "uefi-vars.fd"  # in a backup
_MAX_VARIABLES_BYTES = 64 << 20  # UEFI firmware has a few MiB
_LOOK_SECONDS = 0.2  # between reports of the progress


def disks_to_copy(spec: MachineSpec) -> list[DiskSpec]:
    """The machine's images. Raises Refused if the machine has disks that cannot be frozen."""
    from vmm.store.devices import refuse_passed_through

    refuse_passed_through(spec, "a backup", hint="back up those disks from inside the guest")
    return [disk for disk in spec.disks if disk.is_image]


def copy_name(disk: DiskSpec) -> str:
    """The file name of a copy of a disk that has no parent: a VHDX of a VHDX disk, else a VHD."""
    return f"{disk.id}.{child_format(disk.format)}"


def check_target(folder: str) -> str:
    """The absolute path of a folder that must not exist yet, while its parent must. Raises AlreadyExists, NotFound."""
    target = os.path.abspath(folder)
    if os.path.lexists(target):
        raise AlreadyExists("already exists", path=target, hint="name a new folder")
    try:
        os.stat(os.path.dirname(target))
    except OSError as error:
        raise of_os_error(error, "use the folder", path=os.path.dirname(target)) from error
    return target


def make_part(target: str, name: str) -> str:
    """Create the folder beside the target that collects the copies. Raises AlreadyExists, AccessDenied, NoSpace."""
    part = f"{target}.part"
    try:
        os.mkdir(part, 0o700)
    except FileExistsError as error:  # it may belong to another user or a running command: do not remove it
        raise AlreadyExists(
            "is in the way of the new folder", machine=name, path=part,
            hint="remove it if an interrupted backup or export left it there, or name another folder",
        ) from error  # fmt: skip
    except OSError as error:
        raise of_os_error(error, "make the folder", machine=name, path=part) from error
    return part


async def copy_disks(
    machine: MachinePaths,
    spec: MachineSpec,
    disks: list[DiskSpec],
    target: str,
    progress: Progress,
    ended: Callable[[], bool] = lambda: False,
) -> dict[str, str]:
    """Copy these images, the definition and the UEFI variables into the new folder `target`; disk id -> its copy.

    `ended`: stop copying when this returns True. Raises StoreFailed and other VmmErrors; nothing is left behind then.
    """
    variables = uefi_variables_of(machine, spec)  # from the same moment as the disks
    part = make_part(target, spec.name)
    try:
        copies = {}
        for disk in disks:
            name = copy_name(disk)
            await _convert(disk, os.path.join(part, name), progress, ended)
            copies[disk.id] = os.path.join(target, name)
        write_whole(MachinePaths(part).definition, spec.to_json())
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
    return copies


def copy_disks_now(
    machine: MachinePaths, spec: MachineSpec, disks: list[DiskSpec], target: str, progress: Progress
) -> dict[str, str]:
    """As `copy_disks`, for callers without an event loop."""
    return asyncio.run(copy_disks(machine, spec, disks, target, progress))


def uefi_variables_of(machine: MachinePaths, spec: MachineSpec) -> bytes | None:
    """The current UEFI variables; None if the machine has none. Raises AccessDenied, VmmError."""
    if spec.firmware != "uefi":
        return None
    try:
        with open(machine.uefi_variables, "rb") as file:
            return file.read(_MAX_VARIABLES_BYTES)
    except FileNotFoundError:
        return None  # the machine has never been started
    except OSError as error:
        raise of_os_error(error, "read the UEFI variables", path=machine.uefi_variables) from error


async def _convert(disk: DiskSpec, copy: str, progress: Progress, ended: Callable[[], bool]) -> None:
    assert disk.path is not None
    kind = "vhdx" if child_format(disk.format) == "vhdx" else "dynamic"
    words = ["convert", disk.path, copy, "--to", kind, "--json"]
    words += parent_words(disk)
    words += ["--format", disk.format] if disk.format is not None else []
    process = await asyncio.create_subprocess_exec(
        *python_command("vhdkit", *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=python_environment(),
        umask=0o077,  # a copy is readable by its owner only
    )
    talking = asyncio.create_task(process.communicate())
    try:
        while not talking.done():
            await asyncio.wait({talking}, timeout=_LOOK_SECONDS)
            progress({"step": f"copying {disk.id}"})
            if ended():
                raise WrongState("was switched off during the copy, or is stopping with its host")
    finally:
        if not talking.done():
            process.terminate()
        _, said = await talking
    if process.returncode != 0:
        raise error_in(said, disk)


def parent_words(disk: DiskSpec) -> list[str]:
    """The options that let vhdkit find the parents of a disk's image."""
    words = [word for folder in disk.parent_dirs for word in ("--allow-parent-dir", folder)]
    return words + (["--allow-raw-parent"] if disk.allow_raw_parent or disk.format == "raw" else [])


def error_in(said: bytes, disk: DiskSpec) -> VmmError:
    """The error that a `vhdkit … --json` process reported on its standard error."""
    with contextlib.suppress(ValueError, IndexError, KeyError, TypeError):
        reported = json.loads(said.strip().splitlines()[-1])["error"]
        problem, hint = str(reported.get("problem") or reported["message"]), hint_of_vhdkit(reported.get("hint"))
        error = StoreFailed(problem, path=reported.get("path"), hint=hint)
        error.exit_code = int(reported["exit_code"])
        return error
    return StoreFailed("could not be copied", path=disk.path)


@contextlib.contextmanager
def recording_failure(tell: Callable[..., None], target: str) -> Iterator[None]:
    """Record an event with the reason if this block fails or is interrupted, for instance by Ctrl-C."""
    try:
        yield
    except VmmError as error:
        tell("backup-failed", folder=target, problem=str(error))
        raise
    except (KeyboardInterrupt, asyncio.CancelledError):
        tell("backup-failed", folder=target, problem="it was interrupted")
        raise
