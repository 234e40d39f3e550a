# SPDX-License-Identifier: Apache-2.0
"""The disks of a running machine: the server that serves them, and QEMU's nodes and devices.

Decides the order in which a disk is added, removed and resized, so that a failure half-way leaves it as it was, and
when it is worth resuming a machine whose disks had failed. Must not know machine states.

Adding:   the server opens the image -> QEMU connects (a node) -> a device on a SCSI controller
Removing: the device (the guest is asked, and agrees) -> the node -> the server closes the image
Growing:  QEMU can read -> the chain grows -> QEMU is disconnected and reconnects, with the new size -> the guest is
          notified
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import vhdkit
from vmm.kvm.cmdline import RECONNECT_SECONDS, Medium, chain_node, disk_device
from vmm.kvm.qmp import Qmp
from vmm.model.errors import InUse, QemuFailed, TimedOut, VmmError, of_os_error, store_error
from vmm.model.paths import RuntimePaths
from vmm.model.spec import DiskSpec
from vmm.model.waiting import async_becomes, async_looks

SERVER_SECONDS = 60.0  # for an answer of the server, which may be flushing a slow disk
UNPLUG_SECONDS = 20.0  # for the guest to release a disk
NODE_SECONDS = RECONNECT_SECONDS * 3.0
FIRST_OTHER_SET = 9000  # descriptor sets with lower numbers are for disks, the others for screenshots
MIN_FREE_BYTES = 1 << 20  # free space with which another attempt to write is worthwhile


class DiskServer:
    """The control socket of the machine's disk server, which may be down for a moment."""

    def __init__(self, runtime: RuntimePaths) -> None:
        self._runtime = runtime

    async def call(self, method: str, *, timeout_seconds: float = SERVER_SECONDS, **params: object) -> Any:
        """Call a method of the server. Raises StoreFailed with the server's message, InUse, NoSpace.

        If this is cancelled, its thread ends, too: a server that hangs with a file system cannot hold up our end.
        """
        connected: list[vhdkit.ControlClient] = []

        def ask() -> Any:
            with vhdkit.ControlClient(self._runtime.nbd_control, timeout_seconds=timeout_seconds) as client:
                connected.append(client)
                return client.call(method, **params)

        try:
            return await asyncio.to_thread(ask)
        except asyncio.CancelledError:
            for client in connected:
                client.interrupt()
            raise
        except vhdkit.VhdkitError as error:
            raise store_error(error) from error

    async def is_serving(self) -> bool:
        """True if the server answers."""
        try:
            await self.call("status", timeout_seconds=5)
        except VmmError:
            return False
        return True

    async def wait_serving(self, timeout_seconds: float) -> None:
        """Return when the server answers. Raises TimedOut."""
        if not await async_becomes(self.is_serving, timeout_seconds):
            raise TimedOut(f"the disk server did not answer within {timeout_seconds:g} s")


# -- adding and removing ---------------------------------------------------------------------------------------------


async def add_disk(
    qmp: Qmp, server: DiskServer, disk: DiskSpec, nbd_socket: str, *, export: dict[str, Any], medium: Medium | None
) -> None:
    """Plug a disk into the running machine; on an error everything is undone.

    `export` is its entry for the disk server; `medium` describes a pass-through disk.
    """
    async with contextlib.AsyncExitStack() as undo:
        if disk.is_image:
            await server.call("add", **export)
            undo.push_async_callback(_quietly_remove_export, server, disk.id)
            node = chain_node(disk, nbd_socket)
        else:
            assert medium is not None
            undo.push_async_callback(_quietly_take_back, qmp, disk.id)
            for set_number, descriptor in medium.descriptors:
                await qmp.add_descriptor_to_set(set_number, descriptor, disk.id)
            for one in medium.objects:
                await qmp.execute_raw("object-add", dict(one))
            node = medium.node
        await qmp.execute_raw("blockdev-add", dict(node), timeout_seconds=NODE_SECONDS)
        undo.push_async_callback(_quietly_remove_node, qmp, disk.id)
        await qmp.execute_raw("device_add", dict(disk_device(disk)))
        undo.pop_all()


async def remove_disk(qmp: Qmp, server: DiskServer, disk: DiskSpec) -> None:
    """Unplug a disk. Raises TimedOut, and leaves it plugged in, if the guest does not release it."""
    if await has_device(qmp, disk.id):
        await qmp.execute("device_del", id=disk.id)
        if not await async_becomes(lambda: has_no_device(qmp, disk.id), UNPLUG_SECONDS):
            raise TimedOut(
                f"the guest does not release {disk.id}", hint="unmount it in the guest, or shut the machine down"
            )
    if disk.id in {node["node-name"] for node in await qmp.execute("query-named-block-nodes")}:
        await _insist(lambda: qmp.execute("blockdev-del", node_name=disk.id, timeout_seconds=NODE_SECONDS))
    if disk.is_image:
        await _remove_export(server, disk.id)
    else:
        await take_back(qmp, disk.id)


async def free_set(qmp: Qmp) -> int:
    """An unused descriptor set number."""
    used = [one["fdset-id"] for one in await qmp.execute("query-fdsets") if one["fdset-id"] < FIRST_OTHER_SET]
    return max(used, default=0) + 1


async def take_back(qmp: Qmp, disk_id: str) -> None:
    """Have QEMU close its descriptors of a disk, which ends the claim on a device, and delete the disk's objects."""
    for one in await qmp.execute("query-fdsets"):
        if any(descriptor.get("opaque") == disk_id for descriptor in one["fds"]):
            await qmp.execute("remove-fd", fdset_id=one["fdset-id"])
    for name in [one["name"] for one in await qmp.execute("qom-list", path="/objects")]:
        if name.startswith(f"{disk_id}-"):
            await qmp.execute("object-del", id=name)


async def _quietly_take_back(qmp: Qmp, disk_id: str) -> None:
    with contextlib.suppress(VmmError):
        await take_back(qmp, disk_id)


async def has_device(qmp: Qmp, device_id: str) -> bool:
    """True while the device is plugged in."""
    return any(one["name"] == device_id for one in await qmp.execute("qom-list", path="/machine/peripheral"))


async def has_no_device(qmp: Qmp, device_id: str) -> bool:
    """True once the guest has released the device."""
    return not await has_device(qmp, device_id)


async def _remove_export(server: DiskServer, name: str) -> None:
    """Have the server close an image; it may take a moment until QEMU's connection is seen as closed."""
    async for is_last in async_looks(NODE_SECONDS):
        try:
            await server.call("remove", export=name)
            return
        except InUse:
            if is_last:
                raise


async def _quietly_remove_export(server: DiskServer, name: str) -> None:
    with contextlib.suppress(VmmError):
        await _remove_export(server, name)


async def _quietly_remove_node(qmp: Qmp, name: str) -> None:
    with contextlib.suppress(VmmError):
        await qmp.execute("blockdev-del", node_name=name)


# -- resizing --------------------------------------------------------------------------------------------------------


async def resize_disk(qmp: Qmp, server: DiskServer, disk: DiskSpec, size_bytes: int) -> dict[str, Any]:
    """Enlarge a disk while the guest uses it; returns the server's answer. Raises StoreFailed, QemuFailed.

    QEMU learns the size when it connects, and only then allows a disk to be resized to it. Steps that can fail are
    tried first.
    """
    await _read_from(qmp, disk.id)
    result: dict[str, Any] = await server.call("resize", export=disk.id, size_bytes=size_bytes)
    size_bytes = int(result["size_bytes"])  # rounded as the format requires

    async def resize() -> None:
        await _read_from(qmp, disk.id)
        await qmp.execute("block_resize", node_name=disk.id, size=size_bytes, timeout_seconds=NODE_SECONDS)

    try:
        await server.call("disconnect", export=disk.id)
        await _insist(resize)
    except VmmError as error:
        error.hint = error.hint or f"the image now has {size_bytes} bytes; the guest sees them after a restart"
        raise
    return result


async def _read_from(qmp: Qmp, node_name: str) -> None:
    """Have QEMU connect, which it does when it reads; the guest may not read for a long time. Raises QemuFailed.

    Uses the node and not the device: the device of a virtio disk is a child without a name.
    """
    read = f'qemu-io {node_name} "read 0 512"'
    said = await qmp.execute("human-monitor-command", command_line=read, timeout_seconds=NODE_SECONDS)
    if str(said).startswith("Error"):
        raise QemuFailed(f"QEMU cannot read from {node_name}: {str(said).strip()}")


async def _insist(work: Callable[[], Awaitable[object]]) -> None:
    """Repeat this for a while if QEMU is not ready for it. Raises the last error."""
    async for is_last in async_looks(NODE_SECONDS):
        try:
            await work()
            return
        except QemuFailed:
            if is_last:
                raise


# -- when disks have failed ------------------------------------------------------------------------------------------


def problem_of_store(disks: tuple[DiskSpec, ...], nbd_socket: str) -> str | None:
    """Why the disks cannot work now, as far as visible from outside; None if another attempt is worthwhile."""
    if not any(disk.is_image for disk in disks):
        return None
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            probe.connect(nbd_socket)
            if not probe.recv(8):
                return "the disk server closes the connection"
    except OSError as error:
        return f"the disk server does not answer: {error.strerror or 'time-out'}"
    for disk in disks:
        if disk.is_writable_image and disk.path is not None:
            folder = os.path.dirname(disk.path)
            try:
                facts = os.statvfs(folder)
            except OSError as error:
                return str(of_os_error(error, "check the file system", path=folder))
            if facts.f_bavail * facts.f_frsize < MIN_FREE_BYTES:
                return f"the file system of {disk.path} is full"
    return None
