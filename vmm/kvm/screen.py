# SPDX-License-Identifier: Apache-2.0
"""A machine's screen: a picture of it, and how to look at it.

Decides how a picture gets out of a QEMU that may open no files (it writes to a memory file of ours, of which we read
no more than a limit), what is believed to be a picture, and which viewers can reach a VNC server on a unix socket.
Must not know where a picture goes or how a viewer is started.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

from vmm.kvm.qmp import Qmp
from vmm.model.errors import QemuFailed

MAX_PICTURE_BYTES: Final = 8 * 1024 * 1024  # a screen of text has about ten KiB
PICTURE_SECONDS: Final = 20.0
_SET_NUMBER: Final = 9000  # of QEMU's descriptor sets; disks have the ones below
_PNG_BEGIN: Final = b"\x89PNG\r\n\x1a\n"
_PNG_END: Final = b"IEND\xaeB`\x82"
# Viewers that take a unix socket, best first, and how each is told.
_VIEWERS: Final = (("remote-viewer", "vnc+unix://{path}"), ("vncviewer", "{path}"), ("gvncviewer", "{path}"))


async def screendump(qmp: Qmp) -> bytes:
    """A picture of the screen, as PNG. Raises QemuFailed (no screen, or no PNG in this QEMU), TimedOut.

    One at a time: all have the same set of descriptors.
    """
    descriptor = os.memfd_create("screen", os.MFD_CLOEXEC)
    # QEMU wants a descriptor for writing only, and gets one that has no other use.
    writable = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(QemuFailed):  # what a picture left that was given up
            await qmp.execute("remove-fd", fdset_id=_SET_NUMBER)
        await qmp.add_descriptor_to_set(_SET_NUMBER, writable)
        try:
            await qmp.execute(
                "screendump", timeout_seconds=PICTURE_SECONDS, filename=f"/dev/fdset/{_SET_NUMBER}", format="png"
            )
        finally:
            if qmp.is_connected:
                with contextlib.suppress(QemuFailed):
                    await qmp.execute("remove-fd", fdset_id=_SET_NUMBER)
        picture = os.pread(descriptor, MAX_PICTURE_BYTES, 0)
    finally:
        os.close(writable)
        os.close(descriptor)
    if not is_png(picture):
        raise QemuFailed("QEMU's picture of the screen is not whole")
    return picture


def is_png(data: bytes) -> bool:
    """True for what begins and ends as a PNG file does."""
    return data.startswith(_PNG_BEGIN) and data.endswith(_PNG_END)


def viewer_command(path: str, found: dict[str, str]) -> list[str] | None:
    """The command that shows the VNC server on that socket, with a viewer of `found` (name to its path), or None."""
    for name, address in _VIEWERS:
        if name in found:
            return [found[name], address.format(path=path)]
    return None


def viewers() -> tuple[str, ...]:
    """The names of the viewers that could be used, best first."""
    return tuple(name for name, _ in _VIEWERS)
