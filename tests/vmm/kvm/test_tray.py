# SPDX-License-Identifier: Apache-2.0
"""Media are changed in a drive of a bare QEMU, and QEMU itself is asked about the result."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import require_qemu
from tests.vmm.discs import make_iso
from tests.vmm.guests import launch
from vmm.kvm import tray
from vmm.kvm.cmdline import Medium, file_node
from vmm.kvm.drives import free_set
from vmm.kvm.qmp import Qmp
from vmm.model.errors import QemuFailed

pytestmark = pytest.mark.kvm


async def put_in(qmp: Qmp, path: Path | None) -> None:
    """Put this medium into the drive, as the worker does."""
    await tray.open_tray(qmp, "cd", force=False)
    if path is None:
        await tray.change_medium(qmp, "cd", None)
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        number, name = await free_set(qmp), await tray.free_node(qmp)
        await tray.change_medium(qmp, "cd", Medium(file_node(name, number, read_only=True), ((number, opened),)))
    finally:
        os.close(opened)


async def size_in(qmp: Qmp) -> int | None:
    """The size of the medium in the drive, according to QEMU."""
    (drive,) = (one for one in await qmp.execute("query-block") if one.get("qdev") == "cd")
    return drive["inserted"]["image"]["virtual-size"] if "inserted" in drive else None


@contextlib.contextmanager
def guest_with_drive(folder: Path) -> Iterator[launch.Guest]:
    """A running machine with an empty drive.

    The real firmware resets the drive, which closes the tray at any moment; this one halts the processor.
    """
    firmware = folder / "firmware"
    firmware.write_bytes(b"\xf4\xeb\xfd".ljust(16, b"\0").rjust(64 << 10, b"\0"))
    words = ["-bios", str(firmware), "-device", "ide-cd,id=cd,bus=ide.0"]
    with launch.running(require_qemu(), folder, *words) as guest:
        launch.connect(guest.serial).close()
        yield guest


def test_media_are_inserted_changed_and_ejected(tmp_path: Path) -> None:
    """An empty drive gets a medium, another one, and none; the tray closes on a medium, and old media are released."""
    small = make_iso(tmp_path / "small.iso", "small", size_bytes=128 << 10)
    large = make_iso(tmp_path / "large.iso", "large", size_bytes=256 << 10)

    async def scene(path: str) -> None:
        qmp = await Qmp.connect(path)
        try:
            assert await tray.look(qmp, "cd") == tray.Drive(is_open=False, is_locked=False, node=None)
            for medium in (small, large):
                await put_in(qmp, medium)
                assert await size_in(qmp) == medium.stat().st_size
                drive = await tray.look(qmp, "cd")
                assert not drive.is_open and drive.node is not None
            await tray.tell_guest(qmp, "cd")
            assert await tray.look(qmp, "cd") == drive
            await put_in(qmp, None)
            assert await tray.look(qmp, "cd") == tray.Drive(is_open=True, is_locked=False, node=None)
            assert await qmp.execute("query-fdsets") == []
            nodes = await qmp.execute("query-named-block-nodes")
            assert [one["node-name"] for one in nodes if one["node-name"].startswith("medium")] == []
        finally:
            await qmp.close()

    with guest_with_drive(tmp_path) as guest:
        asyncio.run(scene(str(guest.qmp)))


def test_a_medium_that_cannot_be_opened_changes_nothing(tmp_path: Path) -> None:
    """If QEMU cannot open the new medium, the old one is in the drive as before, and no descriptor is left."""
    image = make_iso(tmp_path / "small.iso", "small", size_bytes=128 << 10)

    async def scene(path: str) -> None:
        qmp = await Qmp.connect(path)
        try:
            await put_in(qmp, image)
            before = await tray.look(qmp, "cd")
            number = await free_set(qmp)
            opened = os.open(tmp_path, os.O_RDONLY)  # a folder
            try:
                node = file_node(await tray.free_node(qmp), number, read_only=True)
                with pytest.raises(QemuFailed):
                    await tray.change_medium(qmp, "cd", Medium(node, ((number, opened),)))
            finally:
                os.close(opened)
            assert await tray.look(qmp, "cd") == before
            assert len(await qmp.execute("query-fdsets")) == 1
        finally:
            await qmp.close()

    with guest_with_drive(tmp_path) as guest:
        asyncio.run(scene(str(guest.qmp)))
