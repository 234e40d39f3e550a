# SPDX-License-Identifier: Apache-2.0
"""UEFI firmware for guests, as distributions install it.

Decides where it is searched. A machine needs two files: the code, which all machines share, and an empty variable
store, of which it gets a copy. Must not know machines.
"""

from __future__ import annotations

import os

PLACES = (  # code, empty variables
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
)


def find() -> tuple[str, str] | None:
    """(code, empty variables) of the first firmware with both files present, or None."""
    for code, variables in PLACES:
        if os.path.exists(code) and os.path.exists(variables):
            return code, variables
    return None
