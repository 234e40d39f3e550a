# SPDX-License-Identifier: Apache-2.0
"""A machine's screen: a picture of it, and viewers for it.

Decides how a picture gets out of a QEMU that may not open files (it writes to a memory file of ours, of which we read
at most a limited amount), what is accepted as a picture, and which viewers can reach a VNC server on a unix socket. It
is a PNG for people, a pixmap (`kvm.picture`) for who compares.
Must not know where a picture goes or how a viewer is started.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

from vmm.kvm.picture import MAX_PIXMAP_BYTES
from vmm.kvm.qmp import Qmp
from vmm.model.errors import QemuFailed

MAX_PICTURE_BYTES: Final = 8 * 1024 * 1024  # a text screen takes about 10 KiB
PICTURE_SECONDS: Final = 20.0
_SET_NUMBER: Final = 9000  # a descriptor set of QEMU; disks use lower numbers
_PNG_BEGIN: Final = b"\x89PNG\r\n\x1a\n"
_PNG_END: Final = b"IEND\xaeB`\x82"
# Viewers that accept a unix socket, best first, with the form of their argument.
_VIEWERS: Final = (("remote-viewer", "vnc+unix://{path}"), ("vncviewer", "{path}"), ("gvncviewer", "{path}"))


async def screendump(qmp: Qmp) -> bytes:
    """A picture of the screen, as PNG. Raises QemuFailed (no screen, or no PNG in this QEMU), TimedOut.

    Not concurrently with this or `pixmap`: all calls use the same descriptor set.
    """
    picture = await _dump(qmp, MAX_PICTURE_BYTES, format="png")
    if not is_png(picture):
        raise QemuFailed("QEMU's picture of the screen is incomplete")
    return picture


async def pixmap(qmp: Qmp) -> bytes:
    """A picture of the screen for `Picture.parsed`. Raises QemuFailed (no screen), TimedOut. Not concurrently."""
    return await _dump(qmp, MAX_PIXMAP_BYTES)


async def _dump(qmp: Qmp, most_bytes: int, **form: str) -> bytes:
    descriptor = os.memfd_create("screen", os.MFD_CLOEXEC)
    # QEMU requires a write-only descriptor; this one is used for nothing else.
    writable = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(QemuFailed):  # the remains of an abandoned picture
            await qmp.execute("remove-fd", fdset_id=_SET_NUMBER)
        await qmp.add_descriptor_to_set(_SET_NUMBER, writable)
        try:
            await qmp.execute(
                "screendump", timeout_seconds=PICTURE_SECONDS, filename=f"/dev/fdset/{_SET_NUMBER}", **form
            )
        finally:
            if qmp.is_connected:
                with contextlib.suppress(QemuFailed):
                    await qmp.execute("remove-fd", fdset_id=_SET_NUMBER)
        return os.pread(descriptor, most_bytes, 0)
    finally:
        os.close(writable)
        os.close(descriptor)


def is_png(data: bytes) -> bool:
    """True if the data begins and ends like a PNG file."""
    return data.startswith(_PNG_BEGIN) and data.endswith(_PNG_END)


def viewer_command(path: str, found: dict[str, str]) -> list[str] | None:
    """The command that shows the VNC server on that socket, with the best of `found` (name -> path), or None."""
    for name, address in _VIEWERS:
        if name in found:
            return [found[name], address.format(path=path)]
    return None


def viewers() -> tuple[str, ...]:
    """The names of supported viewers, best first."""
    return tuple(name for name, _ in _VIEWERS)
