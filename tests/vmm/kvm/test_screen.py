# SPDX-License-Identifier: Apache-2.0
"""Pictures of the screens of real machines: BIOS text, UEFI, none at all."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from tests.pictures import Picture, read_png
from tests.support import not_available, require_boot_sector_guest, require_qemu
from tests.vmm.guests import boot_sector, launch
from tests.waiting import wait_until
from vmm.kvm.qmp import Qmp
from vmm.kvm.screen import is_png, screendump, viewer_command
from vmm.model.errors import QemuFailed

pytestmark = pytest.mark.kvm
OVMF = Path("/usr/share/OVMF")


def take(guest: launch.Guest) -> Picture:
    """A picture of the guest's screen, made twice on one connection."""

    async def scene() -> bytes:
        qmp = await Qmp.connect(str(guest.qmp))
        try:
            await screendump(qmp)
            return await screendump(qmp)
        finally:
            await qmp.close()

    return read_png(asyncio.run(scene()))


def test_bios_text(tmp_path: Path) -> None:
    """The screen of a machine in text mode is a picture of 720 x 400 points with text on black."""
    qemu = require_boot_sector_guest()
    boot_sector.write_raw_disk(tmp_path / "disk.raw")
    words = ["-device", "VGA", *launch.drive(tmp_path / "disk.raw", "ide")]
    with launch.running(qemu, tmp_path, *words) as guest:
        with launch.connect(guest.serial) as serial:
            launch.read_until(serial, b"READY")
        picture = take(guest)
    assert (picture.width, picture.height) == (720, 400)
    assert picture.colour_count >= 2
    # Some lines of text: neither empty nor full.
    assert 0.002 < picture.share_of_other_than((0, 0, 0)) < 0.3


@pytest.mark.nightly  # every day a machine with a worker has such a picture (tests/vmm/api/test_guest_access.py)
def test_uefi(tmp_path: Path) -> None:
    """The screen drawn by UEFI firmware is a picture with more than one colour."""
    code = OVMF / "OVMF_CODE.fd"
    if not code.exists():
        not_available("needs UEFI firmware: run script/setup, or install Debian's package ovmf")
    shutil.copy(OVMF / "OVMF_VARS.fd", tmp_path / "vars.fd")
    words = [
        "-device", "VGA", "-drive", f"if=pflash,format=raw,readonly=on,file={code}",
        "-drive", f"if=pflash,format=raw,file={tmp_path}/vars.fd",
    ]  # fmt: skip
    with launch.running(require_qemu(), tmp_path, *words, memory="96") as guest:
        launch.connect(guest.serial).close()  # (the firmware would wait for a client that connects and does not read)
        wait_until(lambda: take(guest).colour_count >= 3, "the firmware draws", pause=0.2)  # text mode at first
        picture = take(guest)
    assert picture.width >= 640 and picture.height >= 400


def test_no_screen(tmp_path: Path) -> None:
    """The request fails, and QEMU's descriptors are as before."""
    with launch.running(require_qemu(), tmp_path) as guest, launch.connect(guest.serial):

        async def scene() -> None:
            qmp = await Qmp.connect(str(guest.qmp))
            with pytest.raises(QemuFailed, match="screendump"):
                await screendump(qmp)
            assert await qmp.execute("query-fdsets") == []
            await qmp.close()

        asyncio.run(scene())


@pytest.mark.parametrize("data", [b"", b"P6 1 1 255", b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"])
def test_an_incomplete_picture(data: bytes) -> None:
    """An incomplete picture is refused."""
    assert not is_png(data)


def test_viewers() -> None:
    """The best installed viewer is started with the address of the screen in its own syntax."""
    assert viewer_command("/run/x/vnc.sock", {}) is None
    assert viewer_command("/x", {"vncviewer": "/bin/vncviewer"}) == ["/bin/vncviewer", "/x"]
    both = {"vncviewer": "/bin/vncviewer", "remote-viewer": "/bin/remote-viewer"}
    assert viewer_command("/x", both) == ["/bin/remote-viewer", "vnc+unix:///x"]
