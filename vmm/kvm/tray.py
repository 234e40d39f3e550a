# SPDX-License-Identifier: Apache-2.0
"""Changing or removing the medium in a drive of a running machine.

Decides the order, so that a failure leaves the drive as it was, or empty:

    the tray opens (the guest may have locked it) -> the new medium is opened -> the old one is removed -> the new one
    is inserted -> the tray closes

A guest learns from opening and closing that the medium has changed. Must not know where media come from.
Sources: QEMU's qapi/block.json (blockdev-open-tray and its like), MMC-6 6.18 (a locked tray).
"""

from __future__ import annotations

from dataclasses import dataclass

from vmm.kvm.cmdline import Medium
from vmm.kvm.drives import NODE_SECONDS, take_back
from vmm.kvm.qmp import Qmp
from vmm.model.errors import Refused
from vmm.model.waiting import async_becomes

EJECT_SECONDS = 5.0  # for a guest that has locked the tray: it is asked, and may release it


@dataclass(frozen=True, slots=True)
class Drive:
    """The state of a drive in QEMU. `node` is its medium."""

    is_open: bool
    is_locked: bool
    node: str | None


async def look(qmp: Qmp, drive_id: str) -> Drive:
    """Query the state of a drive. Raises QemuFailed."""
    for one in await qmp.execute("query-block"):
        if one.get("qdev") == drive_id:
            inserted = one.get("inserted") or {}
            return Drive(bool(one.get("tray_open")), bool(one.get("locked")), inserted.get("node-name"))
    return Drive(is_open=False, is_locked=False, node=None)


async def open_tray(qmp: Qmp, drive_id: str, *, force: bool) -> None:
    """Open the tray. Raises Refused if the guest has locked it and does not release it, unless `force`."""
    await qmp.execute("blockdev-open-tray", id=drive_id, force=force)

    async def is_open() -> bool:
        return (await look(qmp, drive_id)).is_open

    if not await async_becomes(is_open, EJECT_SECONDS):
        raise Refused(
            f"the guest has locked the drive {drive_id} and does not release its medium",
            hint="eject it in the guest, or use --force: the guest's further reads from it then fail",
        )


async def change_medium(qmp: Qmp, drive_id: str, medium: Medium | None) -> None:
    """Replace the medium in the open drive and close it; without a medium it stays open. Raises QemuFailed.

    The caller keeps ownership of the medium's descriptors.
    """
    old = (await look(qmp, drive_id)).node
    if medium is not None:
        for set_number, descriptor in medium.descriptors:
            await qmp.add_descriptor_to_set(set_number, descriptor, medium.node["node-name"])
        try:
            await qmp.execute_raw("blockdev-add", dict(medium.node), timeout_seconds=NODE_SECONDS)
        except BaseException:
            await take_back(qmp, medium.node["node-name"])
            raise
    if old is not None:
        await qmp.execute("blockdev-remove-medium", id=drive_id)
        await qmp.execute("blockdev-del", node_name=old, timeout_seconds=NODE_SECONDS)
        await take_back(qmp, old)
    if medium is not None:
        await qmp.execute("blockdev-insert-medium", id=drive_id, node_name=medium.node["node-name"])
        await qmp.execute("blockdev-close-tray", id=drive_id)


async def tell_guest(qmp: Qmp, drive_id: str) -> None:
    """Notify the guest that the medium was changed or removed. Raises QemuFailed."""
    await qmp.execute("blockdev-open-tray", id=drive_id, force=True)
    await qmp.execute("blockdev-close-tray", id=drive_id)


async def free_node(qmp: Qmp) -> str:
    """An unused node name for a medium, which no disk can have."""
    used = {one["node-name"] for one in await qmp.execute("query-named-block-nodes")}
    return next(name for number in range(len(used) + 1) if (name := f"medium.{number}") not in used)
