# SPDX-License-Identifier: Apache-2.0
"""Mounting: the order in which the layers of a mount are stacked.

Decides what is refused before anything is opened, that a mount is usable when `mount` returns, and that a failure
leaves nothing behind. Must not know libfuse (`fuse`), how the kernel is asked (`host`), or the drivers'
options (`drivers`).

    image -> server process -> FUSE mount                              a folder, or one file
                                   -> loop device -> file system       --fs as root: direct I/O
                                   -> FUSE driver -> file system       --fs otherwise

Unmounting, and the list of mounts: `unmounting`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from vhdkit import errors
from vhdkit.folder import real_path, remove_file
from vhdkit.formats.filesystems import FileSystem
from vhdkit.serve.mount import drivers, host, table
from vhdkit.serve.mount import fuse as fuse_mount
from vhdkit.serve.mount.tree import DISK_NAME, PARTITIONS, Model, MountTree, build_file, build_folder, model_of
from vhdkit.serve.mount.unmounting import umount
from vhdkit.serve.opening import ExportRequest, ImageExport, OpenMode, open_exports
from vhdkit.sockets import PrivateFolder

log = logging.getLogger(__name__)

# Runs a body in a new process, and returns when that is ready or has ended: (body, whether it prints).
Start: TypeAlias = Callable[[Callable[[Callable[[], None]], int], bool], host.Child]

_WITHOUT_JOURNAL = (
    "the file system was not cleanly unmounted: it is shown without the changes in its journal (--overlay replays the"
    " journal, and discards the result at the end)"
)


@dataclass(frozen=True, slots=True)
class MountRequest:
    """What to mount, and where. `partition` and `file_system` are the command line's --partition and --fs.

    `stays`: the caller waits for the server, which then writes to its standard error.
    """

    image: str
    mountpoint: str
    open_mode: OpenMode
    as_file: bool = False
    partition: int | None = None
    file_system: bool = False
    allow_other: bool = False
    stays: bool = False


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount ready for use. `base` is the FUSE mount, which differs from `mountpoint` if a file system is mounted."""

    mountpoint: str
    base: str
    image: str
    size_bytes: int
    writable: bool
    child: host.Child
    driver: str | None = None
    file_system: FileSystem | None = None
    notes: tuple[str, ...] = ()


def mount(request: MountRequest, start: Start) -> Mounted:
    """Mount an image; returns when it can be used. `start` creates the server process.

    Raises what opening the image raises, InvalidArgument, NotFound, AccessDenied, AlreadyExists (something is mounted
    there), UnsupportedFormat (no file system, or no driver for it), IoFailed.
    """
    host.check_fuse()
    mountpoint = check_mountpoint(request)
    fuse_mount.load()
    export = open_exports([ExportRequest(request.image, "disk")], request.open_mode)[0]
    with contextlib.ExitStack() as undo:
        if request.open_mode.keep_overlay is not None:
            undo.callback(_remove_quietly, request.open_mode.keep_overlay)
        undo.callback(_let_go, export)
        model = model_of(export, time.time_ns())
        found = _wanted_file_system(request, model) if request.file_system else None
        base = mountpoint
        if found is not None:
            folder = PrivateFolder()
            undo.callback(folder.close)
            base = real_path(folder.path)
        tree = _tree(request, model, mountpoint)
        plan = _plan(request, found, model.writable) if found is not None else []
        child = _start(start, request, export, tree, base, root_needed=any(one.runs_as_root for one in plan[:1]))
        undo.callback(_take_down, base)
        if device := _device(base):
            host.read_ahead(device)
        driver: str | None = None
        notes: tuple[str, ...] = ()
        if found is not None:
            driver, notes = _mount_inside(plan, found, _file_of(request, base), mountpoint, export)
        undo.pop_all()
    _let_go(export)
    return Mounted(
        mountpoint,
        base,
        os.path.abspath(export.image_path),
        tree.size_bytes,
        model.writable,
        child,
        driver,
        found,
        notes,
    )


def check_mountpoint(request: MountRequest) -> str:
    """The real path of the mount point, checked for use. Raises NotFound, InvalidArgument, AlreadyExists."""
    path = request.mountpoint
    kind = host.kind_of_place(path)
    real = real_path(path)
    if kind == "dead":
        raise errors.AlreadyExists(
            "a mount is there whose server has died", path=path, hint=f"run: vhdkit umount {errors.quoted(path)}"
        )
    if kind == "missing":
        made = "touch" if request.as_file else "mkdir"
        raise errors.NotFound("the mount point does not exist", path=path, hint=f"run: {made} {errors.quoted(path)}")
    if table.top_at(host.mounts(), real) is not None:
        raise errors.AlreadyExists(
            "something is already mounted there",
            path=path,
            hint="`vhdkit mounts` lists what vhdkit mounted, `vhdkit umount` unmounts it",
        )
    if request.as_file and kind != "file":
        raise errors.InvalidArgument("is not a file: --file mounts the disk over a regular file", path=path)
    if not request.as_file and kind != "folder":
        raise errors.InvalidArgument(
            "is not a folder", path=path, hint="to mount the disk over a regular file, add --file"
        )
    if not request.as_file and not host.is_empty(path):
        raise errors.InvalidArgument(
            "is not empty: a mount would hide its content", path=path,
            hint="choose an empty folder",
        )  # fmt: skip
    return real


def _wanted_file_system(request: MountRequest, model: Model) -> FileSystem:
    path = model.export.image_path
    if request.partition is not None:
        partition = model.partition(request.partition)
        found, file = partition.file_system, f"{PARTITIONS}/{partition.file_name}"
    elif model.table is not None and model.partitions:
        raise errors.InvalidArgument(
            "has partitions, and --fs mounts one of them",
            path=path,
            hint=f"choose one with --partition N: {_partitions_of(model)}",
        )
    else:
        found, file = model.whole, DISK_NAME
    if found is not None and any(drivers.attempts(found, writable=False, is_root=host.is_root())):
        return found
    what = "no file system that vhdkit recognises" if found is None else f"{found.kind}, which cannot be mounted here"
    hint = drivers.advice(found, is_root=host.is_root(), file=file)
    if found is None and any(one.file_system is not None for one in model.partitions):
        hint += f"; the partitions are {_partitions_of(model)}"
    raise errors.UnsupportedFormat(f"{file} holds {what}", path=path, hint=hint)


def _partitions_of(model: Model) -> str:
    """The numbers of the partitions, each with its file system."""
    kinds = [(one.partition.number, one.file_system) for one in model.partitions]
    return ", ".join(f"{number} ({found.kind if found else 'no known file system'})" for number, found in kinds)


def _plan(request: MountRequest, found: FileSystem, writable: bool) -> list[drivers.Attempt]:
    """The installed drivers, in the order in which they are tried. Raises UnsupportedFormat if there are none."""
    is_root, safe_loop = host.is_root(), host.loop_writes_are_safe()
    possible = list(
        drivers.attempts(
            found, writable=writable, is_root=is_root, allow_other=request.allow_other, safe_loop=safe_loop
        )
    )
    here = [one for one in possible if host.find_program(one.words[0]) is not None]
    if here:
        return here
    if not possible:
        hint = (
            "the memory limit of this process (cgroup version 1) could make the kernel's driver wait for itself: mount"
            " outside of that limit, with CAP_SYS_RESOURCE, or read-only"
        )
    else:
        hint = drivers.advice(found, is_root=is_root, file=DISK_NAME)
    raise errors.UnsupportedFormat(f"no driver for its {found.kind} is installed", path=request.image, hint=hint)


def _tree(request: MountRequest, model: Model, mountpoint: str) -> MountTree:
    if request.as_file:
        return build_file(model, request.partition)
    facts: dict[str, Any] = {"mounted_at": mountpoint}
    return build_folder(model, facts)


def _file_of(request: MountRequest, base: str) -> str:
    if request.partition is None:
        return os.path.join(base, DISK_NAME)
    return os.path.join(base, PARTITIONS, f"{request.partition}.raw")


def _device(path: str) -> str | None:
    found = table.top_at(host.mounts(), path)
    return found.device if found is not None else None


# -- the server ---------------------------------------------------------------------------------------------------


def _let_go(export: ImageExport) -> None:
    """Close the files without flushing the image: it belongs to the server, or was never written to."""
    for layer in export.disk.chain.layers:
        layer.store.close()


def _remove_quietly(path: str) -> None:
    """Remove a child that was never used."""
    with contextlib.suppress(errors.VhdkitError):
        remove_file(path)


def _take_down(base: str) -> None:
    """Unmount a FUSE mount that was never used."""
    with contextlib.suppress(errors.VhdkitError):
        umount(base)


def _start(
    start: Start, request: MountRequest, export: ImageExport, tree: MountTree, base: str, *, root_needed: bool
) -> host.Child:
    others = request.allow_other or (root_needed and not host.is_root())  # then the base is in our private folder
    options = table.option_text(
        {
            "fsname": os.path.abspath(export.image_path),
            "subtype": table.OUR_TYPE.partition(".")[2],
            "ro": not tree.is_writable,
            "default_permissions": True,
            "allow_other": others,
        }
    )
    child = start(lambda ready: _serve(export, tree, base, options, ready), request.stays)
    if not child.is_ready:
        child.wait()
        raise _refused(child.output, base, others_wanted=request.allow_other)
    return child


def _serve(export: ImageExport, tree: MountTree, base: str, options: str, ready: Callable[[], None]) -> int:
    """The server's main function, in its own process, up to the last flush."""
    presence = host.Presence()

    def usable() -> None:
        presence.show(base)
        ready()

    code = fuse_mount.serve(tree, base, options, usable)
    presence.leave()
    try:
        export.disk.close()
    except errors.VhdkitError as error:
        log.error("%s", error)
        presence.report(str(error))
        return error.exit_code
    return code


def _refused(output: str, mountpoint: str, *, others_wanted: bool) -> errors.VhdkitError:
    """The error for a mount that libfuse refused, from its output."""
    words = " ".join(line.strip() for line in output.splitlines() if "max threads" not in line)
    if "allow_other" in words or "allow_root" in words:
        what = "other users" if others_wanted else "the driver of this file system runs as root, which"
        otherwise = ", or leave out --allow-other" if others_wanted else ", or mount as root"
        return errors.AccessDenied(
            f"{what} cannot be given access by an ordinary user here", path=mountpoint,
            hint=f"ask root to add the line user_allow_other to /etc/fuse.conf{otherwise}",
        )  # fmt: skip
    if "Permission denied" in words or "not permitted" in words or "no write access" in words:
        hint = "an ordinary user can only mount on folders that the user owns"
        return errors.AccessDenied(f"cannot be mounted on: {words}", path=mountpoint, hint=hint)
    return errors.IoFailed(f"cannot be mounted on: {words or 'libfuse gave no reason'}", path=mountpoint)


# -- a file system in it ------------------------------------------------------------------------------------------


def _mount_inside(
    plan: list[drivers.Attempt], found: FileSystem, file: str, mountpoint: str, export: ImageExport
) -> tuple[str, tuple[str, ...]]:
    """Mount the file system in `file`; (the driver's name, notes for the user). Raises UnsupportedFormat.

    A file system that the kernel's driver examined and refused is not written to by another driver, which may be less
    careful. Read-only, or over an overlay, the next driver is tried, and the kernel's message becomes a note.
    """
    failures: list[str] = []
    refusals: list[str] = []
    unknown = True
    may_destroy = export.disk.writable and not export.is_temporary
    for attempt in plan:
        failure = _try(attempt, file, mountpoint, export.disk.writable)
        if failure is None:
            notes = [f"refused by another driver, {one}" for one in dict.fromkeys(refusals)]
            return attempt.name, (*([_WITHOUT_JOURNAL] if attempt.leaves_journal else []), *notes)
        failures.append(f"{attempt.name}: {failure.text}")
        unknown = unknown and "unknown filesystem type" in failure.text
        if failure.is_verdict and not attempt.leaves_journal:
            refusals.append(failures[-1])
            if may_destroy:
                raise errors.UnsupportedFormat(
                    f"its {found.kind} was refused by {failures[-1]}",
                    path=export.image_path,
                    hint="see `dmesg` for the reason. Check it with its own tools, on a copy or a child; without --rw"
                    " it may still be readable",
                )
    hint = drivers.advice(found, is_root=host.is_root(), file=file) if unknown else None
    raise errors.UnsupportedFormat(
        f"its {found.kind} cannot be mounted: {'; '.join(dict.fromkeys(failures))}", path=export.image_path, hint=hint
    )


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why an attempt failed. `is_verdict`: a driver examined the file system and refused it."""

    text: str
    is_verdict: bool = False


def _try(attempt: drivers.Attempt, file: str, mountpoint: str, writable: bool) -> _Failure | None:
    """Make one attempt: None if it is mounted, else the failure, which leaves nothing behind."""
    source = file
    if attempt.needs_loop:
        setup = host.run(
            ["losetup", "--find", "--show", "--direct-io=on", *([] if writable else ["--read-only"]), file]
        )
        if setup.code != 0:
            return _Failure(setup.text or "no loop device")
        source = setup.text
        if writable and not host.loop_is_direct(source):
            host.run(["losetup", "--detach", source])
            return _Failure("the loop device has no direct I/O here, without which a writable mount could deadlock")
    try:
        done = host.run(attempt.command(source, mountpoint))
    finally:
        if attempt.needs_loop:
            host.run(["losetup", "--detach", source])  # takes effect when it is unmounted
    if done.code == 0 and table.top_at(host.mounts(), mountpoint) is not None:
        return None
    text = done.text.removeprefix(f"mount: {mountpoint}: ").partition("; dmesg(1)")[0]
    text = text.rstrip(".") or f"exit code {done.code}"
    return _Failure(text, is_verdict=attempt.needs_loop and drivers.is_verdict(text))
