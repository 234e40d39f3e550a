# SPDX-License-Identifier: Apache-2.0
"""Checks that a target has a LUN before a machine gets it, using a QEMU without a machine.

Decides how long this may take, and which results are certain enough to refuse the LUN: that the target accepts our
login and has no such LUN, or that the password is wrong. Anything else may be different when the machine starts: the
target may be down, or may not yet admit the machine's initiator.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess

from vmm.kvm import iscsi, program
from vmm.kvm.qemu_errors import explain
from vmm.model.errors import NotFound, Refused

LOOK_SECONDS = 5.0  # for one look at the target, which connects to it
_LEAVE = b'{"execute": "qmp_capabilities"} {"execute": "quit"}\n'
_NO_LUN, _WRONG_PASSWORD = "LOGICAL_UNIT_NOT_SUPPORTED", "Authentication failure"
_SECRET = "password"


def refuse_missing(url: str, lun: iscsi.Lun, machine_id: str, password: bytes | None) -> None:
    """Raise NotFound or Refused if the target certainly does not give this machine the LUN."""
    words = _complaint(lun, machine_id, password)
    for sign, kind in ((_NO_LUN, NotFound), (_WRONG_PASSWORD, Refused)):
        if sign in words and (meaning := explain(sign)) is not None:
            raise kind(meaning[0], path=url, hint=meaning[1])


def _complaint(lun: iscsi.Lun, machine_id: str, password: bytes | None) -> str:
    """QEMU's error message when it opens the LUN; empty if there is none, or none in time."""
    secret_id = None if password is None else _SECRET
    node = iscsi.blockdev_of_lun(
        "lun", lun, initiator=iscsi.initiator_name(machine_id), read_only=True, secret_id=secret_id
    )
    command = [program.find(), "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S"]
    command += ["-qmp", "stdio"]
    with contextlib.ExitStack() as stack:
        kept: tuple[int, ...] = ()
        if password is not None:  # neither in a command line nor in a file that others may read
            kept = (os.memfd_create("vmm-password"),)
            stack.callback(os.close, kept[0])
            os.write(kept[0], password)
            command += ["-object", json.dumps({"qom-type": "secret", "id": _SECRET, "file": f"/dev/fd/{kept[0]}"})]
        command += ["-blockdev", json.dumps(node)]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(
                command, input=_LEAVE, capture_output=True, check=False, timeout=LOOK_SECONDS, pass_fds=kept
            )
            return done.stderr.decode(errors="replace") if done.returncode else ""
    return ""
