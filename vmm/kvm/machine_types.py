# SPDX-License-Identifier: Apache-2.0
"""The versioned machine types that this host's QEMU has.

Decides nothing but which version a family's name stands for today: a machine keeps it for life, because its saved
memory and its guest's idea of the hardware depend on it.
"""

from __future__ import annotations

import re

from vmm.errors import QemuFailed
from vmm.kvm import program

_ALIAS = re.compile(r"^(\S+)\s.*\(alias of (\S+)\)")


def newest(family: str) -> str:
    """The versioned type behind `pc`. Raises Unsupported where there is no QEMU, QemuFailed."""
    return newest_in(program.answer([program.find(), "-machine", "help"]), family)


def newest_in(listing: str, family: str) -> str:
    """The same, in what QEMU lists. Raises QemuFailed where the family is not in it."""
    for line in listing.splitlines():
        found = _ALIAS.match(line)
        if found is not None and found[1] == family:
            return found[2]
    raise QemuFailed(f"this QEMU has no machine type {family}")
