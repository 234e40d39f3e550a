# SPDX-License-Identifier: Apache-2.0
"""Unmounting, and the list of current mounts.

Decides in which order the mounts stacked on an image are unmounted, and how long that may take. Must not know libfuse
(`fuse`), or how the kernel is asked (`host`).

    file system -> loop device -> FUSE mount -> the server, which flushes and closes the image last

The mounts are read from the kernel's tables, so a mount whose server was killed is found and removed like any other.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from vhdkit import errors
from vhdkit.folder import real_path
from vhdkit.serve.mount import host, table
from vhdkit.serve.mount.tree import INFO_NAME
from vhdkit.waiting import looks

_BUSY_SECONDS = 120.0  # a FUSE driver may still be writing after its mount is gone
_LOOKED_AT_SECONDS = 0.3  # an `umount` of another path reads a file of each of our mounts (`_left_behind`)
_EVERY_SECONDS = 0.05  # each try starts a program


def found_stacks() -> list[table.Stack]:
    """All of our mounts, oldest first."""
    return list(table.stacks(host.mounts(), host.loop_files()))


def umount(path: str, *, lazy: bool = False, force: bool = False) -> str | None:
    """Unmount one of our mounts with everything stacked on it, and wait until the image is closed.

    `lazy`: unmount at once, even while in use; the image is closed when its last user is done, without a wait here.
    `force` (root): fail pending requests and lose what was not flushed; for a server that hangs.
    Returns the error that occurred when the image was closed, if any.
    Raises NotFound, InvalidArgument, ImageInUse, AccessDenied, IoFailed.
    """
    real = _real_mountpoint(path)
    found = found_stacks()
    stack = table.stack_at(found, real) or _left_behind(found, real)
    if stack is None:
        raise _not_ours(path, real)
    server = host.find_server(stack.base)
    lazy = lazy or force
    if force:  # ends all pending requests; whether it also unmounts does not matter
        host.run(["umount", "-i", "-f", stack.base.mountpoint])
    try:
        for mounted, _ in reversed(stack.inside):
            _umount_one(mounted.mountpoint, lazy=lazy)
        if not force or table.top_at(host.mounts(), stack.base.mountpoint) is not None:
            _umount_base(stack, patient=stack.base.mountpoint != real, lazy=lazy)
    except BaseException:
        if server is not None:
            server.close()
        raise
    if server is None or lazy:
        return None
    return server.wait()


def _left_behind(found: list[table.Stack], real: str) -> table.Stack | None:
    """The mount under a file system that was at this path and was unmounted by another program."""
    for stack in found:
        server = None if stack.inside else host.find_server(stack.base)
        if server is not None:
            server.close()
            facts = host.read_json(os.path.join(stack.base.mountpoint, INFO_NAME))
            if facts.get("mounted_at") == real:
                return stack
    return None


def _umount_base(stack: table.Stack, *, patient: bool, lazy: bool) -> None:
    base = stack.base.mountpoint
    for is_last in looks(_BUSY_SECONDS if patient else _LOOKED_AT_SECONDS, every_seconds=_EVERY_SECONDS):
        try:
            _umount_one(base, lazy=lazy)
            break
        except errors.ImageInUse:
            if is_last:
                raise
    if patient:
        host.remove_folder(base)


def _umount_one(mountpoint: str, *, lazy: bool) -> None:
    if host.is_root():
        command = ["umount", "-i", *(["-l"] if lazy else []), mountpoint]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint]
    done = host.run(command)
    if done.code == 0:
        return
    if "busy" in done.text:
        users = host.users_of(mountpoint)
        by = f" by {', '.join(users[:3])}" if users else ""
        more = f" and {len(users) - 3} more" if len(users) > 3 else ""
        raise errors.ImageInUse(
            f"is in use{by}{more}", path=mountpoint,
            hint="close what is open there, or add --lazy to release the mount when the last program closes it",
        )  # fmt: skip
    if "not permitted" in done.text or "must be superuser" in done.text or "not found in /etc/mtab" in done.text:
        raise errors.AccessDenied(f"cannot be unmounted: {done.text}", path=mountpoint)
    raise errors.IoFailed(f"cannot be unmounted: {done.text or f'exit code {done.code}'}", path=mountpoint)


def _real_mountpoint(path: str) -> str:
    """The real path, without accessing what is mounted there: its server may be dead."""
    folder, name = os.path.split(os.path.abspath(path))
    plain = os.path.join(real_path(folder), name)
    if table.top_at(host.mounts(), plain) is not None:
        return plain
    return real_path(path)


def _not_ours(path: str, real: str) -> errors.VhdkitError:
    there = table.top_at(host.mounts(), real)
    if there is None:
        return errors.NotFound("nothing is mounted there", path=path, hint="`vhdkit mounts` lists what is")
    return errors.InvalidArgument(
        f"is a mount of {there.file_system}, not of vhdkit",
        path=path,
        hint="use the system's own umount, as for any other mount",
    )


@dataclass(frozen=True, slots=True)
class Listed:
    """One of our mounts. `driver` mounts a file system in it; `pid` is None if the server is dead."""

    mountpoint: str
    base: str
    image: str
    writable: bool
    driver: str | None
    loop: str | None
    pid: int | None


def listed() -> list[Listed]:
    """All of our mounts, oldest first; a file system in a mount represents the mount."""
    found = []
    for stack in found_stacks():
        base = stack.base
        server = host.find_server(base)
        pid = None if server is None else server.pid
        if server is not None:
            server.close()
        if not stack.inside:
            found.append(Listed(base.mountpoint, base.mountpoint, base.source, base.is_writable, None, None, pid))
        for one, loop in stack.inside:
            writable = base.is_writable and one.is_writable
            found.append(
                Listed(one.mountpoint, base.mountpoint, base.source, writable, table.driver_name(one), loop, pid)
            )
    return found
