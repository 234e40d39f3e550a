# SPDX-License-Identifier: Apache-2.0
"""A quick fingerprint of a LUN's content: saved memory does not fit content that has changed.

A target does not count writes, and other hosts may reach it, so samples of its content are compared: its size, its
first 2 MiB, where partition tables, volume groups and most file systems keep what changes when they are used, and
64 KiB at each power of two after that. QEMU's own tool, which speaks iSCSI, does the reading. Decides what is read and
how long it may take; must not know what the fingerprint is used for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from typing import Final

from vmm.kvm import iscsi
from vmm.kvm.iscsi import Lun

SECONDS: Final = 20.0  # an unreachable target must not delay a machine's start for longer
_HEAD_BYTES, _SAMPLE_BYTES = 2 << 20, 64 << 10
_FIRST_POWER, _LAST_POWER = 22, 45  # 4 MiB to 32 TiB
_DUMPED = re.compile(rb"[0-9a-f]{8,16}: ")  # a line of qemu-io's hex dump; other lines report times
_SECRET_ID = "password"


def look_at_lun(lun: Lun, *, initiator: str, password: bytes | None = None) -> str | None:
    """The fingerprint of the content; None if it cannot be read now, or without qemu-io."""
    tool = shutil.which("qemu-io")
    if tool is None:
        return None
    secret = _SECRET_ID if password is not None else None
    node = iscsi.blockdev_of_lun("lun", lun, initiator=initiator, read_only=True, secret_id=secret)
    places = [(0, _HEAD_BYTES), *((1 << power, _SAMPLE_BYTES) for power in range(_FIRST_POWER, _LAST_POWER))]
    command = [tool, "-r", "-c", "length"]
    for offset_bytes, size_bytes in places:
        command += ["-c", f"read -v {offset_bytes} {size_bytes}"]
    descriptors: tuple[int, ...] = ()
    try:
        if password is not None:
            descriptors = (_with_content(password),)
            command += ["--object", f"secret,id={_SECRET_ID},file=/dev/fd/{descriptors[0]}"]
        done = subprocess.run(
            [*command, f"json:{json.dumps(node)}"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, pass_fds=descriptors, timeout=SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return digest_of(done.stdout)


def digest_of(said: bytes) -> str | None:
    """The fingerprint of qemu-io's output: size and bytes, without times. None if the beginning was not read."""
    lines = said.splitlines()
    dumped = [line for line in lines if _DUMPED.match(line)]
    if len(dumped) < _HEAD_BYTES // 16:
        return None
    return hashlib.sha256(b"\n".join([lines[0], *dumped])).hexdigest()


def _with_content(content: bytes) -> int:
    memory = os.memfd_create("password", os.MFD_CLOEXEC)
    os.write(memory, content)
    os.lseek(memory, 0, os.SEEK_SET)
    return memory
